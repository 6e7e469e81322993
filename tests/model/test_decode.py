"""The rollout's forward against the naive one, `run_layers` with one token a row, and against the slow reference."""

from dataclasses import replace

import pytest
import torch

from live_bytes import LiveBytes
from pte.method.adapter import LINEAR_MAPS
from pte.method.attention import DecodeAttention
from pte.method.cache import BoundedCache
from pte.model.decode import DecodeNorm, DecodeStep, rotations
from pte.model.policy import BoundedPolicy, detach_adapter
from pte.model.segment import adapter_weights, run_layers
from pte.rollout.generate import RolloutEngine
from reference import Reference
from sampled import gap, requests_for, sample
from tiny import ARCHITECTURES, tiny_base, tiny_policy

KINDS = ("thought", "lora", "global_only", None)
ROPES = {
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 1.37,
    },
}
# Three prompt slots and five window slots. Ragged prompts, holes where blocks left, one window with nothing in it yet;
# each row's new token is the entry with the largest position.
HELD = torch.tensor(
    [
        [0, 1, -1, 9, -1, -1, 6, 7],
        [0, -1, -1, 1, -1, -1, -1, -1],
        [0, 1, 2, 40, 41, 37, 38, 39],
    ]
)
SLOTS = HELD.argmax(dim=1)
POSITIONS = HELD.amax(dim=1)
TOKENS = torch.tensor([5, 9, 28])


def held_cache(policy: BoundedPolicy) -> BoundedCache:
    """A cache with random keys and values, in empty slots too."""
    shape, dtype = policy.cache_shape, policy.dtype
    cache = BoundedCache.allocate(
        shape, batch=3, prompt_slots=3, window_slots=5, dtype=dtype, device=torch.device("cpu")
    )
    generator = torch.Generator().manual_seed(7)
    for stored in (cache.keys, cache.values):
        stored.copy_(torch.randn(stored.shape, generator=generator))
    cache.positions.copy_(HELD)
    return cache


def random_states(policy: BoundedPolicy) -> torch.Tensor | None:
    """A state of its own for every layer and row, or None where the adapter has none."""
    if policy.adapter is None or policy.adapter.encoder is None:
        return None
    generator = torch.Generator().manual_seed(3)
    rank = policy.adapter.rank
    states = torch.randn(len(policy.base.get_decoder().layers), 3, rank, rank, generator=generator)
    return states.to(policy.adapter.encoder.key_map.dtype)


@torch.no_grad()
def both(policy: BoundedPolicy) -> tuple[tuple[torch.Tensor, BoundedCache], tuple[torch.Tensor, BoundedCache]]:
    """Hidden states and the cache after them: of the decode step and of the naive forward."""
    states, weights = random_states(policy), adapter_weights(policy)
    ours, theirs = held_cache(policy), held_cache(policy)
    step = DecodeStep(policy, weights, num_positions=64)
    mine, naive = (DecodeAttention(cache, SLOTS, attended_slots=8, dtype=policy.dtype) for cache in (ours, theirs))
    hidden = step(TOKENS, positions=POSITIONS, attention=mine, states=states)
    expected = run_layers(
        policy, TOKENS[:, None], positions=POSITIONS[:, None], attention=naive, states=states, weights=weights
    )
    return (hidden, ours), (expected[:, 0], theirs)


def check_equal(policy: BoundedPolicy, *, atol: float = 1e-12) -> None:
    (hidden, ours), (expected, theirs) = both(policy)
    assert hidden.dtype == policy.dtype and expected.std() > 0.1
    torch.testing.assert_close(hidden, expected, rtol=0, atol=atol)
    torch.testing.assert_close(ours.keys, theirs.keys, rtol=0, atol=atol)
    torch.testing.assert_close(ours.values, theirs.values, rtol=0, atol=atol)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_decode_step_is_the_naive_forward(architecture: str, kind: str | None) -> None:
    check_equal(tiny_policy(architecture, kind=kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rollouts_of_the_decode_step_record_the_reference_s_logprobs(architecture: str, kind: str | None) -> None:
    # Two slots for three prompts: evictions, a refilled slot, and in the end a single row.
    policy = tiny_policy(architecture, kind=kind)
    rollouts = sample(policy, requests_for([(5, 6, 7, 8), (11,), (12, 13)]), slots=2, max_new_tokens=18)
    assert max(rollout.evictions for rollout in rollouts) >= 3
    with torch.no_grad():
        for rollout in rollouts:
            expected = Reference(policy, temperature=0.7).logprobs(rollout.prompt_ids, rollout.completion_ids)
            torch.testing.assert_close(rollout.rollout_logprobs, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "targets",
    [*((name,) for name in LINEAR_MAPS), ("q_proj", "v_proj"), ("up_proj", "v_proj", "k_proj"), LINEAR_MAPS[:4]],
    ids="-".join,
)
def test_any_of_the_linear_maps_may_be_adapted(targets: tuple[str, ...]) -> None:
    policy = tiny_policy("llama", targets=targets, scale=1.6)
    check_equal(policy)
    (adapted, _), _ = both(policy)
    (bare, _), _ = both(policy.without_adapter())
    assert (adapted - bare).abs().max() > 1e-3


def test_a_switched_off_adapter_is_the_bare_base() -> None:
    policy = tiny_policy("qwen3")
    (switched_off, _), _ = both(policy.without_adapter())
    detach_adapter(policy.base)
    (bare, _), _ = both(replace(policy, adapter=None))
    assert torch.equal(switched_off, bare)


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scaled_rotary_embeddings_are_the_model_s_own(architecture: str, rope: str) -> None:
    policy = tiny_policy(base=tiny_base(architecture, rope_parameters=ROPES[rope]))
    plain = tiny_policy(base=tiny_base(architecture))
    assert (rotations(policy, 64) - rotations(plain, 64)).abs().max() > 0.1
    check_equal(policy)


@pytest.mark.parametrize(
    ("architecture", "biases"),
    [
        ("qwen3", {"attention_bias": True}),
        ("llama", {"attention_bias": True}),
        ("llama", {"mlp_bias": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
    ],
)
@pytest.mark.parametrize("kind", ["thought", None])
def test_biases_of_every_linear_map_count(architecture: str, biases: dict[str, bool], kind: str | None) -> None:
    base = tiny_base(architecture, **biases)
    names = {name.split(".")[-2] for name, value in base.named_parameters() if name.endswith("bias") and value.all()}
    assert names == {
        *(LINEAR_MAPS[:4] if "attention_bias" in biases else ()),
        *(LINEAR_MAPS[4:] if "mlp_bias" in biases else ()),
    }
    check_equal(tiny_policy(base=base, kind=kind))


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_the_activation_is_the_model_s_own(activation: str) -> None:
    check_equal(tiny_policy(base=tiny_base("llama", hidden_act=activation)))


@pytest.mark.parametrize("heads", [(4, 4), (4, 1)], ids=["one query head per key head", "four"])
def test_other_head_groups_are_the_naive_forward_too(heads: tuple[int, int]) -> None:
    base = tiny_base("qwen3", num_attention_heads=heads[0], num_key_value_heads=heads[1])
    check_equal(tiny_policy(base=base))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tied", [False, True])
def test_tied_and_untied_heads_are_one_policy(architecture: str, tied: bool) -> None:
    policy = tiny_policy(base=tiny_base(architecture, tied=tied))
    assert gap(policy, sample(policy, requests_for([(5, 6, 7), (8,)]), max_new_tokens=14)) < 1e-10


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_half_precision_is_rounded_at_the_same_places(architecture: str, kind: str | None) -> None:
    # What may be left is a last digit here and there, from the order of sums. A norm that casts after its weight
    # instead of before, or a state cast to bfloat16, is beyond the tolerance.
    policy = tiny_policy(base=tiny_base(architecture, dtype=torch.bfloat16), dtype=torch.bfloat16, kind=kind)
    (hidden, ours), (expected, theirs) = both(policy)
    assert hidden.dtype == torch.bfloat16
    for mine, other in ((hidden, expected), (ours.keys, theirs.keys), (ours.values, theirs.values)):
        assert (mine.float() - other.float()).abs().mean() < 5e-4 * other.float().abs().mean()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_norm_rounds_where_the_library_s_does(dtype: torch.dtype) -> None:
    norm = tiny_base("qwen3", dtype=dtype).get_decoder().norm
    x = (torch.randn(64, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 7).to(dtype)
    with torch.no_grad():
        assert torch.equal(DecodeNorm.of(norm)(x), norm(x))


def test_an_idle_row_may_write_where_running_rows_do_not_look() -> None:
    # Row 2 has finished far down its window; rows 0 and 1 are short, so that five slots are attended.
    policy = tiny_policy()
    weights, states = adapter_weights(policy), random_states(policy)
    held = HELD.clone()
    held[:2, 5:] = -1
    slots = torch.tensor([3, 3, 7])
    found = []
    with torch.no_grad():
        for attended in (5, 8):
            cache = held_cache(policy)
            cache.positions.copy_(held)
            step = DecodeStep(policy, weights, num_positions=64)
            attention = DecodeAttention(cache, slots, attended_slots=attended, dtype=policy.dtype)
            found.append(step(TOKENS, positions=POSITIONS, attention=attention, states=states))
    torch.testing.assert_close(found[0][:2], found[1][:2], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_weight_is_copied(architecture: str, kind: str | None) -> None:
    policy = tiny_policy(architecture, kind=kind)
    weights = adapter_weights(policy)
    with torch.no_grad(), LiveBytes() as probe:
        step = DecodeStep(policy, weights, num_positions=64)
    # Cosine and sine of 64 positions; in Qwen3 also a weight for each query and key head of two layers.
    numbers = step.rotations.numel() + sum(layer.head_norm.weight.numel() for layer in step.layers if layer.head_norm)
    assert step.rotations.shape == (64, 2, 1, policy.cache_shape.head_dim)
    assert probe.live == 8 * numbers


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_makes_less_than_its_smallest_weight(kind: str | None) -> None:
    base = tiny_base("llama", hidden_size=256, num_key_value_heads=4, intermediate_size=256)
    policy = tiny_policy(base=base, kind=kind)
    step = DecodeStep(policy, adapter_weights(policy), num_positions=64)
    cache, states = held_cache(policy), random_states(policy)
    attention = DecodeAttention(cache, SLOTS, attended_slots=8, dtype=policy.dtype)
    with torch.no_grad(), LiveBytes() as probe:
        step(TOKENS, positions=POSITIONS, attention=attention, states=states)
    assert 0 < probe.peak < 8 * 256 * 256 / 4


def test_weights_and_angles_are_prepared_once_for_a_whole_run() -> None:
    class Watched(RolloutEngine):
        def step(self) -> None:
            prepared.add((id(self.decode), self.decode.rotations.data_ptr()))
            rows.add(len(self.running))
            super().step()

    prepared: set[tuple[int, int]] = set()
    rows: set[int] = set()
    engine = Watched(tiny_policy(), slots=3, max_new_tokens=24, temperature=1.0, stop_token_ids=(3, 4))
    engine.run(requests_for([(5, 6, 7), (8,), (9, 10), (11,), (12, 13)]))
    # Five prompts in three slots are refilled, and the last rows are compacted.
    assert len(rows) > 1
    assert len(prepared) == 1


@pytest.mark.parametrize("tied", [False, True])
def test_a_rollout_leaves_the_base_as_it_was_to_save_and_to_detach(tmp_path, tied: bool) -> None:
    base = tiny_base("qwen2", dtype=torch.float32, tied=tied)
    before = {name: (value.data_ptr(), value.clone()) for name, value in base.state_dict().items()}
    policy = tiny_policy(base=base, dtype=torch.float32)
    sample(policy, requests_for([(5, 6, 7), (8,)]), max_new_tokens=14)
    detach_adapter(base)
    after = base.state_dict()
    assert list(after) == list(before)
    for name, (pointer, value) in before.items():
        assert after[name].data_ptr() == pointer and after[name].is_contiguous(), name
        assert torch.equal(after[name], value), name
    base.save_pretrained(tmp_path)
    loaded = type(base).from_pretrained(tmp_path, dtype=torch.float32)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, before[name][1]), name
