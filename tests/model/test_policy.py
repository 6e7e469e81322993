"""Law 3: a fresh adapter is the identity, a detached one leaves no trace, and the base never moves."""

import pytest
import torch

from pte.method.adapter import LINEAR_MAPS, LayerSizes, ThoughtAdapter, ThoughtLinear
from pte.method.eviction.sinks import AttentionSinks
from pte.method.schedule import EvictionSchedule
from pte.model.policy import BoundedPolicy, attach_adapter, detach_adapter, home_of, layer_sizes, linear_of, query_maps
from pte.rollout.record import collate
from pte.rollout.replay import Replay
from tiny import ARCHITECTURES, random_sequences, tiny_base, tiny_policy


def linear_modules(base: torch.nn.Module) -> list[torch.nn.Module]:
    return [getattr(home_of(layer, name), name) for layer in base.get_decoder().layers for name in LINEAR_MAPS]


def logits(base: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return base(torch.tensor([[3, 4, 5, 6, 7, 8]])).logits


def small_batch():
    prompts, completions = random_sequences(3, completion=(14, 20))
    return collate(prompts, completions, stream_seeds=range(3), temperature=1.0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_detaching_restores_the_model_bit_for_bit(architecture: str) -> None:
    base = tiny_base(architecture, dtype=torch.float32)
    modules, names, before = linear_modules(base), [n for n, _ in base.named_parameters()], logits(base)
    policy = tiny_policy(base=base, dtype=torch.float32)
    assert all(isinstance(module, ThoughtLinear) for module in linear_modules(base))
    # Attached and moved, but not bound: the library's own forward is the base's.
    assert torch.equal(logits(base), before)
    Replay(policy)(small_batch()).policy_logprobs.sum().backward()
    detach_adapter(base)
    assert all(mine is theirs for mine, theirs in zip(linear_modules(base), modules, strict=True))
    assert [n for n, _ in base.named_parameters()] == names
    assert torch.equal(logits(base), before)
    detach_adapter(base)
    assert torch.equal(logits(base), before)


def test_a_policy_without_its_adapter_is_the_bare_base() -> None:
    base = tiny_base(dtype=torch.float32)
    bare = tiny_policy(base=base, kind=None, dtype=torch.float32)
    expected = Replay(bare)(small_batch()).policy_logprobs
    policy = tiny_policy(base=base, dtype=torch.float32)
    assert (Replay(policy)(small_batch()).policy_logprobs - expected).abs().max() > 0.01
    assert torch.equal(Replay(policy.without_adapter())(small_batch()).policy_logprobs, expected)


@pytest.mark.parametrize("mode", ["chain", "horizon", "exact"])
def test_only_the_adapter_s_parameters_are_trained(mode: str) -> None:
    policy = tiny_policy(dtype=torch.float32)
    base_before = {name: parameter.clone() for name, parameter in policy.base.named_parameters()}
    assert not any(parameter.requires_grad for parameter in policy.base.parameters())
    Replay(policy, gradient_mode=mode, horizon=1 if mode == "horizon" else None)(
        small_batch()
    ).policy_logprobs.sum().backward()
    assert all(parameter.grad is None for parameter in policy.base.parameters())
    trainable = dict(policy.adapter.named_parameters())
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in trainable.values())
    torch.optim.AdamW(trainable.values(), lr=0.1).step()
    for name, parameter in policy.base.named_parameters():
        assert torch.equal(parameter, base_before[name]), name


def test_one_step_at_the_paper_s_learning_rate_moves_the_adapter_beside_a_bfloat16_base() -> None:
    # Paper: "lr 1e-5". A bfloat16 parameter of 0.1 has steps of 5e-4 and would stay where it is.
    policy = tiny_policy(base=tiny_base(dtype=torch.bfloat16), dtype=torch.bfloat16, up_std=0.1)
    parameters = list(policy.adapter.parameters())
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    before = [parameter.detach().clone() for parameter in parameters]
    Replay(policy)(small_batch()).policy_logprobs.sum().backward()
    torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.0).step()
    moved = sum((a != b).sum().item() for a, b in zip(parameters, before, strict=True))
    assert moved > 0.9 * sum(parameter.numel() for parameter in parameters)


def test_a_second_adapter_is_refused() -> None:
    policy = tiny_policy()
    with pytest.raises(ValueError) as caught:
        attach_adapter(policy.base, ThoughtAdapter(layer_sizes(policy.base), rank=2))
    assert str(caught.value) == "a base can carry one adapter, got a second; call detach_adapter first"
    detach_adapter(policy.base)
    attach_adapter(policy.base, ThoughtAdapter(layer_sizes(policy.base), rank=2))


def test_an_adapter_of_another_base_is_refused() -> None:
    base = tiny_base(layers=2)
    other = ThoughtAdapter(layer_sizes(tiny_base(layers=3)), rank=2)
    with pytest.raises(
        ValueError, match=r"must be made for the base's sizes, got .*; make it with layer_sizes\(base\)"
    ):
        attach_adapter(base, other)
    assert not any(isinstance(module, ThoughtLinear) for module in base.modules())


@pytest.mark.parametrize(("architecture", "head_dim"), [("qwen2", 4), ("qwen3", 8)])
def test_sizes_are_read_from_the_base(architecture: str, head_dim: int) -> None:
    base = tiny_base(architecture, layers=3)
    expected = LayerSizes(
        layers=3,
        kv_dim=2 * head_dim,
        hidden_size=16,
        maps={
            "q_proj": (16, 4 * head_dim),
            "k_proj": (16, 2 * head_dim),
            "v_proj": (16, 2 * head_dim),
            "o_proj": (4 * head_dim, 16),
            "gate_proj": (16, 24),
            "up_proj": (16, 24),
            "down_proj": (24, 16),
        },
    )
    assert layer_sizes(base) == expected
    policy = tiny_policy(base=base)
    assert layer_sizes(base) == expected
    shape = policy.cache_shape
    assert (shape.layers, shape.kv_heads, shape.head_dim) == (3, 2, head_dim)


def test_an_eviction_policy_that_cannot_work_is_refused_with_the_policy() -> None:
    with pytest.raises(ValueError, match=r"sink_tokens \+ evict_tokens must not exceed window_tokens \(8\)"):
        BoundedPolicy(tiny_base(), None, EvictionSchedule(8, 4), AttentionSinks(6))
    policy = tiny_policy(kind=None)
    with pytest.raises(ValueError, match="use sink_tokens of at most 4"):
        policy.with_cache(policy.schedule, AttentionSinks(6))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_query_maps_are_the_mean_query_of_the_heads_that_share_a_key_head(architecture: str) -> None:
    base = tiny_base(architecture)
    x = torch.randn(base.config.hidden_size, dtype=torch.float64)
    found = query_maps(base)
    assert len(found) == 2
    for layer, query_map in zip(base.get_decoder().layers, found, strict=True):
        queries = linear_of(layer, "q_proj").weight @ x
        heads = queries.view(4, -1)  # heads 0 and 1 read key head 0, heads 2 and 3 key head 1
        expected = torch.cat([(heads[0] + heads[1]) / 2, (heads[2] + heads[3]) / 2])
        torch.testing.assert_close(query_map @ x, expected, rtol=0, atol=1e-12)
