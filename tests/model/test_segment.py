"""One forward for all uses: states travel as arguments, and nothing stays bound."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from pte.method.attention import StretchAttention, stretch_mask
from pte.model.policy import BoundedPolicy
from pte.model.segment import adapter_weights, first_state, read_state, run_layers
from tiny import ARCHITECTURES, tiny_base, tiny_policy

TOKENS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])


def plain_attention() -> StretchAttention:
    nothing = torch.zeros(2, 1, 0, dtype=torch.bool)
    mask = stretch_mask(nothing, torch.ones(2, 4, dtype=torch.bool), dtype=torch.float64)
    return StretchAttention(None, None, mask=mask, segments=1)


def hidden_states(policy: BoundedPolicy, states: torch.Tensor | None) -> torch.Tensor:
    return run_layers(
        policy,
        TOKENS,
        positions=torch.arange(4).expand(2, 4),
        attention=plain_attention(),
        states=states,
        weights=adapter_weights(policy),
    )


def random_states(policy: BoundedPolicy, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 2, 4, 4, generator=generator, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_forward_is_the_library_s_up_to_and_with_the_final_norm(architecture: str) -> None:
    policy = tiny_policy(architecture, kind=None)
    assert (policy.base.get_decoder().norm.weight - 1).abs().max() > 0.1
    with torch.no_grad():
        expected = policy.base.get_decoder()(TOKENS, use_cache=False).last_hidden_state
        torch.testing.assert_close(hidden_states(policy, None), expected, rtol=0, atol=1e-12)


def test_two_checkpointed_segments_have_the_gradients_of_plain_ones() -> None:
    # A state read from an attribute set outside would be the last one when both segments are computed again.
    policy = tiny_policy()
    states = [random_states(policy, seed) for seed in (1, 2)]
    wanted = [*states, *(p for n, p in policy.adapter.named_parameters() if n.startswith("layers"))]
    gradients = []
    for checkpointed in (False, True):
        total = 0.0
        for state in states:
            if checkpointed:
                hidden = checkpoint(hidden_states, policy, state, use_reentrant=False)
            else:
                hidden = hidden_states(policy, state)
            total = total + hidden.sin().sum()
        gradients.append(torch.autograd.grad(total, wanted))
    for plain, again in zip(*gradients, strict=True):
        assert plain.any()
        torch.testing.assert_close(again, plain, rtol=0, atol=1e-12)


def test_nothing_stays_bound_after_a_forward() -> None:
    policy = tiny_policy()
    implementation = policy.base.config._attn_implementation
    before = policy.base(TOKENS).logits
    hidden_states(policy, random_states(policy, 1))
    assert policy.adapter.binding.current is None
    assert policy.base.config._attn_implementation == implementation != "pte_bounded"
    assert torch.equal(policy.base(TOKENS).logits, before)


def test_nothing_stays_bound_after_a_failure() -> None:
    class Failing:
        def attend(self, layer, query, *, key, value, scaling):
            if layer == 1:
                assert policy.adapter.binding.current is not None
                raise RuntimeError("out of memory")
            return query.transpose(1, 2)

    policy = tiny_policy()
    implementation = policy.base.config._attn_implementation
    before = policy.base(TOKENS).logits
    with pytest.raises(RuntimeError, match="out of memory"):
        run_layers(
            policy,
            TOKENS,
            positions=torch.arange(4).expand(2, 4),
            attention=Failing(),
            states=random_states(policy, 1),
            weights=adapter_weights(policy),
        )
    assert policy.adapter.binding.current is None
    assert policy.base.config._attn_implementation == implementation
    assert torch.equal(policy.base(TOKENS).logits, before)


def test_each_row_reads_its_own_state() -> None:
    policy = tiny_policy()
    first, second = (random_states(policy, seed).detach() for seed in (1, 2))
    mixed = torch.stack((first[:, 0], second[:, 1]), dim=1)
    with torch.no_grad():
        hidden = hidden_states(policy, mixed)
        torch.testing.assert_close(hidden[0], hidden_states(policy, first)[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(hidden[1], hidden_states(policy, second)[1], rtol=0, atol=1e-12)
        assert (hidden[0] - hidden_states(policy, second)[0]).abs().max() > 1e-3


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_the_first_state_is_made_of_the_base_s_keys_and_values(architecture: str) -> None:
    # The base's projections, with their biases and the key norm, without A and B.
    policy = tiny_policy(architecture, update_rule="read")
    with torch.no_grad():
        first = first_state(policy)
        for layer_index, layer in enumerate(policy.base.get_decoder().layers):
            attention = layer.self_attn
            tokens = policy.adapter.encoder.global_tokens
            keys, values = attention.k_proj.base(tokens), attention.v_proj.base(tokens)
            if architecture == "qwen3":
                keys = attention.k_norm(keys.view(3, 2, 8)).view(3, 16)
            encoder = policy.adapter.encoder
            queries = encoder.query[layer_index] @ encoder.query_map[layer_index].T
            expected = queries @ (keys @ encoder.key_map[layer_index].T).T @ (values @ encoder.value_map[layer_index].T)
            torch.testing.assert_close(first[layer_index], expected.T, rtol=0, atol=1e-11)


def test_lora_and_the_bare_base_have_no_state() -> None:
    base = tiny_base()
    assert first_state(tiny_policy(base=base, kind=None)) is None
    policy = tiny_policy(base=base, kind="lora")
    assert first_state(policy) is None and read_state(policy, None) is None
