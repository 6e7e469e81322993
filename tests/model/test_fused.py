"""The fused decode step against `DecodeStep`."""

import pytest
import torch

from kernel_cases import DEVICE, check_close
from pte.kernels.available import kernels_available
from pte.method.adapter import LINEAR_MAPS
from pte.method.attention import DecodeAttention
from pte.method.cache import BoundedCache
from pte.method.eviction.h2o import HeavyHitters
from pte.model.decode import DecodeStep
from pte.model.fused import FusedDecodeStep
from pte.model.fused_support import fused_refusal, unsupported
from pte.model.load import round_to_float8
from pte.model.policy import BoundedPolicy, detach_adapter
from pte.model.segment import adapter_weights
from tiny import ARCHITECTURES, tiny_base, tiny_policy

# Ragged prompts in three slots, holes where blocks left, a window with one token; the new token is the last one.
HELD = torch.tensor(
    [
        [0, 1, -1, 9, -1, -1, 6, 7],
        [0, -1, -1, 1, -1, -1, -1, -1],
        [0, 1, 2, 40, 41, 37, 38, 39],
    ]
)

pytestmark = pytest.mark.system
TOKENS = torch.tensor([5, 9, 28])


def policy_of(
    architecture: str = "qwen2",
    *,
    dtype: torch.dtype = torch.float32,
    base_changes: dict | None = None,
    float8: bool = False,
    **options: object,
) -> BoundedPolicy:
    base = tiny_base(architecture, dtype=dtype, **(base_changes or {})).to(DEVICE)
    if float8:
        round_to_float8(base, DEVICE)
    return tiny_policy(base=base, dtype=dtype, **options)


def held_cache(policy: BoundedPolicy, rows: int = 3) -> BoundedCache:
    """A cache with random keys and values, in empty slots too."""
    cache = BoundedCache.allocate(
        policy.cache_shape,
        batch=rows,
        prompt_slots=3,
        window_slots=5,
        dtype=policy.dtype,
        device=DEVICE,
        float8=policy.float8,
    )
    generator = torch.Generator().manual_seed(7)
    for stored in (cache.keys, cache.values):
        layers, _, *shape = stored.shape
        stored.copy_(torch.randn(layers, 3, *shape, generator=generator)[:, :rows])
    cache.positions.copy_(HELD[:rows])
    return cache


def random_states(policy: BoundedPolicy, rows: int = 3) -> torch.Tensor | None:
    if policy.adapter is None or policy.adapter.encoder is None:
        return None
    rank, layers = policy.adapter.rank, len(policy.base.get_decoder().layers)
    states = torch.randn(layers, 3, rank, rank, generator=torch.Generator().manual_seed(3))
    return states[:, :rows].to(DEVICE)


@torch.no_grad()
def run_plain(policy: BoundedPolicy, rows: int = 3) -> tuple[torch.Tensor, BoundedCache]:
    cache = held_cache(policy, rows)
    slots, positions = HELD[:rows].argmax(1).to(DEVICE), HELD[:rows].amax(1).to(DEVICE)
    step = DecodeStep(policy, adapter_weights(policy), num_positions=64)
    attention = DecodeAttention(cache, slots, attended_slots=8, dtype=policy.dtype)
    states = random_states(policy, rows)
    return step(TOKENS[:rows].to(DEVICE), positions=positions, attention=attention, states=states), cache


def fused_step(policy: BoundedPolicy) -> FusedDecodeStep:
    return FusedDecodeStep(policy, adapter_weights(policy), num_positions=64)


@torch.no_grad()
def run_fused(
    policy: BoundedPolicy, rows: int = 3, step: FusedDecodeStep | None = None
) -> tuple[torch.Tensor, BoundedCache]:
    cache = held_cache(policy, rows)
    slots, positions = HELD[:rows].argmax(1).to(DEVICE), HELD[:rows].amax(1).to(DEVICE)
    step = step or fused_step(policy)
    states = random_states(policy, rows)
    return step(TOKENS[:rows].to(DEVICE), positions=positions, cache=cache, slots=slots, states=states), cache


def check_equal(policy: BoundedPolicy, *, rows: int = 3) -> None:
    (expected, theirs), (hidden, ours) = run_plain(policy, rows), run_fused(policy, rows)
    check_close(hidden, expected)
    everything = (slice(None),) * 4
    for mine, other in zip(ours.stores(), theirs.stores(), strict=True):
        check_close(ours.wide(mine, everything), theirs.wide(other, everything))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_fused_step_is_the_decode_step(architecture: str) -> None:
    check_equal(policy_of(architecture))


# The interpreter takes a quarter of a second for a row of a layer.
@pytest.mark.parametrize("kind", ["lora", "global_only", None])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kind_of_adapter_is_that_of_the_decode_step(architecture: str, kind: str | None) -> None:
    check_equal(policy_of(architecture, base_changes={"layers": 1}, kind=kind), rows=1)


def test_a_single_row_is_its_row_of_a_batch() -> None:
    policy = policy_of("qwen3", base_changes={"layers": 1})
    torch.testing.assert_close(run_fused(policy, 1)[0], run_fused(policy)[0][:1], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"targets": ("q_proj", "v_proj"), "scale": 1.6},
        {"targets": ("up_proj", "k_proj", "o_proj")},
        {"targets": LINEAR_MAPS[4:], "rank": 20},
        {"layers": (1,)},
        {"layers": (0,), "kind": "lora", "targets": ("down_proj",)},
    ],
    ids=str,
)
def test_some_maps_and_layers_may_be_adapted(options: dict) -> None:
    policy = policy_of("llama", **options)
    check_equal(policy, rows=1)
    assert (run_plain(policy, 1)[0] - run_plain(policy.without_adapter(), 1)[0]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("qwen3", {"attention_bias": True, "num_key_value_heads": 4}),
        ("qwen2", {"num_key_value_heads": 1, "num_attention_heads": 2, "intermediate_size": 37}),
        ("mistral", {"hidden_size": 28, "num_attention_heads": 7, "num_key_value_heads": 1}),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["thought", None])
def test_biases_head_groups_and_odd_widths_count(architecture: str, changes: dict, kind: str | None) -> None:
    check_equal(policy_of(architecture, base_changes={"layers": 1, **changes}, kind=kind), rows=1)


@pytest.mark.parametrize("kind", ["thought", None])
@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_half_precision_is_rounded_at_the_same_places(architecture: str, kind: str | None) -> None:
    # Attention rounds its weights before they meet the values, which the eager step on a CPU does not.
    policy = policy_of(architecture, dtype=torch.bfloat16, kind=kind)
    (expected, theirs), (hidden, ours) = run_plain(policy, 2), run_fused(policy, 2)
    for mine, other in ((hidden, expected), (ours.keys, theirs.keys), (ours.values, theirs.values)):
        assert mine.dtype == torch.bfloat16
        assert (mine.float() - other.float()).abs().mean() < 2e-3 * other.float().abs().mean()


@pytest.mark.parametrize(
    ("architecture", "changes", "options"),
    [
        ("qwen2", {}, {}),
        ("qwen3", {"attention_bias": True}, {"kind": "lora"}),
        ("llama", {"attention_bias": True, "mlp_bias": True}, {"targets": ("q_proj", "v_proj", "up_proj")}),
        ("mistral", {"layers": 1}, {"kind": None}),
    ],
)
def test_a_fused_step_in_float8_is_the_decode_step_in_float8(architecture: str, changes: dict, options: dict) -> None:
    policy = policy_of(architecture, base_changes=changes, float8=True, **options)
    check_equal(policy, rows=2)
    # And not what it would be without rounding.
    plain = policy_of(architecture, base_changes=changes, **options)
    assert (run_fused(policy, 1)[0] - run_fused(plain, 1)[0]).abs().max() > 1e-3


def test_a_step_follows_the_adapter_that_is_loaded_into_it() -> None:
    policy = policy_of(base_changes={"layers": 1})
    assert policy.adapter is not None
    step = fused_step(policy)
    before, _ = run_fused(policy, 1, step)
    for parameter in policy.adapter.parameters():
        parameter.data.mul_(1.5)
    assert torch.equal(run_fused(policy, 1, step)[0], before)
    weights = adapter_weights(policy)
    assert weights is not None
    step.load_adapter(weights)
    after, _ = run_fused(policy, 1, step)
    check_close(after, run_plain(policy, 1)[0])
    assert (after - before).abs().max() > 1e-3


def test_a_step_whose_b_was_overwritten_says_so_and_the_base_alone_overwrites_nothing() -> None:
    policy = policy_of(base_changes={"layers": 1})
    first = fused_step(policy)
    fused_step(policy.without_adapter())
    check_close(run_fused(policy, 1, first)[0], run_plain(policy, 1)[0])
    fused_step(policy)
    with pytest.raises(RuntimeError, match="another step has loaded its own since; call claim"):
        run_fused(policy, 1, first)


def test_larger_and_smaller_ranks_on_one_base_are_exact() -> None:
    policy = policy_of(rank=4, base_changes={"layers": 1})
    for rank in (4, 40, 4):
        detach_adapter(policy.base)
        policy = tiny_policy(base=policy.base, dtype=torch.float32, rank=rank)
        check_equal(policy, rows=1)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"hidden_act": "gelu"}, {}, "computes silu, got activation GELUActivation; use DecodeStep"),
        ({}, {"rank": 129}, "serves ranks up to 128, got 129; use DecodeStep or a smaller rank"),
        ({}, {"eviction": HeavyHitters(4), "block": 2}, "does not observe attention, which policy 'h2o' needs"),
    ],
    ids=["activation", "rank", "observed attention"],
)
def test_what_the_kernels_do_not_serve_is_refused_with_the_reason(changes: dict, options: dict, message: str) -> None:
    policy = policy_of("llama", base_changes=changes, **options)
    with pytest.raises(ValueError, match=message):
        fused_step(policy)


def test_float64_is_refused_and_so_is_a_cpu_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny_policy()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "got torch.float64; use DecodeStep" in str(unsupported(policy))
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "kernels need a CUDA device, got cpu" in str(unsupported(policy))
    assert not kernels_available(torch.device("cpu"))


def test_a_rollout_on_a_cpu_never_takes_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny_policy(base=tiny_base(dtype=torch.float32), dtype=torch.float32)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert unsupported(policy) is None
    assert "the fused decode step is for CUDA devices, got cpu; use DecodeStep" in str(fused_refusal(policy))
