"""Replay and rollout against the slow reference: log-probs, and gradients of every parameter in every mode.

The library's base computes norms and rotary angles in float32 inside a float64 model, the reference does not: that
is the 1e-6 between them. A wrong equation is off by 1e-2 and more.
"""

import pytest
import torch

from pte.model.policy import BoundedPolicy
from pte.rollout.record import collate
from pte.rollout.replay import Replay
from reference import Reference
from sampled import SCORED, SETTINGS, requests_for, sample
from tiny import ARCHITECTURES, VOCAB, tiny_base, tiny_policy

# Window 8 in blocks of 4: one token, two, W + 1 (nothing evicted yet), W + 2 (the first eviction), three evictions.
LENGTHS = (1, 2, 9, 10, 19)
PROMPTS = ((3, 4, 5), (8,), (9, 10), (14, 15, 16, 17), (18,))
TEMPERATURE = 0.7
SEEDS = tuple(range(40, 40 + len(LENGTHS)))


def completions_and_weights() -> tuple[list[tuple[int, ...]], list[torch.Tensor]]:
    """Random tokens, and what each token's log-prob counts in the loss."""
    generator = torch.Generator().manual_seed(6)
    completions = [tuple(torch.randint(3, VOCAB, (n,), generator=generator).tolist()) for n in LENGTHS]
    return completions, [torch.randn(n, generator=generator, dtype=torch.float64) for n in LENGTHS]


def check_against_reference(policy: BoundedPolicy, mode: str, horizon: int | None = None) -> None:
    completions, weights = completions_and_weights()
    reference_logprobs = [
        Reference(policy, gradient_mode=mode, horizon=horizon, temperature=TEMPERATURE, stream_seed=seed).logprobs(
            prompt, completion
        )
        for prompt, completion, seed in zip(PROMPTS, completions, SEEDS, strict=True)
    ]
    batch = collate(PROMPTS, completions, stream_seeds=SEEDS, temperature=TEMPERATURE)
    ours = Replay(policy, gradient_mode=mode, horizon=horizon)(batch).policy_logprobs
    assert ours.shape == (len(LENGTHS), max(LENGTHS))
    assert not ours[~batch.completion_mask].any()
    for row, theirs in enumerate(reference_logprobs):
        torch.testing.assert_close(ours[row, : len(theirs)], theirs, rtol=0, atol=1e-5)
    if policy.adapter is None:
        assert not ours.requires_grad
        return
    names, parameters = zip(*policy.adapter.named_parameters(), strict=True)
    loss = sum((ours[row, : len(weight)] * weight).sum() for row, weight in enumerate(weights))
    reference_loss = sum((theirs * weight).sum() for theirs, weight in zip(reference_logprobs, weights, strict=True))
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    expected = torch.autograd.grad(reference_loss, parameters, allow_unused=True)
    for name, mine, theirs in zip(names, found, expected, strict=True):
        if theirs is None or not theirs.any():
            assert mine is None or not mine.any(), name
            continue
        assert mine is not None, name
        assert (mine - theirs).abs().max() < 2e-5 * theirs.abs().max(), name


@pytest.mark.parametrize("mode", [("chain", None), ("horizon", 2), ("exact", None)], ids=lambda m: m[0])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_replay_is_the_reference_for_every_architecture(architecture: str, mode: tuple[str, int | None]) -> None:
    check_against_reference(tiny_policy(architecture), *mode)


@pytest.mark.parametrize("setting", [name for name in SETTINGS if name != "thought"])
def test_replay_is_the_reference_for_every_setting(setting: str) -> None:
    check_against_reference(tiny_policy("qwen2", **SETTINGS[setting]), "chain")


@pytest.mark.parametrize("mode", [("horizon", 1), ("exact", None)], ids=lambda m: m[0])
@pytest.mark.parametrize(
    "setting", ["paper rule", "global_only", "lora", "random eviction", "sinks", "h2o", "rkv", "snapkv"]
)
def test_settings_are_the_reference_in_every_mode(setting: str, mode: tuple[str, int | None]) -> None:
    check_against_reference(tiny_policy("qwen2", **SETTINGS[setting]), *mode)


@pytest.mark.parametrize("horizon", [3, 100])
def test_a_horizon_reaches_over_several_stretches(horizon: int) -> None:
    # Window 4 in blocks of 2: two evictions a stretch, eight in the longest completion.
    check_against_reference(tiny_policy("llama", window=4, block=2), "horizon", horizon)


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_tied_embeddings_are_the_reference_too(architecture: str) -> None:
    base = tiny_base(architecture, tied=True)
    assert base.get_output_embeddings().weight is base.get_input_embeddings().weight
    check_against_reference(tiny_policy(base=base), "chain")


@pytest.mark.parametrize("heads", [(4, 4), (4, 1)], ids=["one query head per key head", "four"])
def test_other_head_groups_are_the_reference_too(heads: tuple[int, int]) -> None:
    base = tiny_base("llama", num_attention_heads=heads[0], num_key_value_heads=heads[1])
    check_against_reference(tiny_policy(base=base), "chain")


RECORDED = ["thought", "paper rule", "lora", "no adapter", "random eviction", "sinks", *SCORED]


@pytest.mark.parametrize("setting", RECORDED)
def test_a_rollout_records_the_reference_s_logprobs(setting: str) -> None:
    policy = tiny_policy("qwen3", **SETTINGS[setting])
    prompts = [(5, 6, 7, 8, 9, 10), (11,), (12, 13, 14), (15, 16)]
    rollouts = sample(policy, requests_for(prompts), slots=2, max_new_tokens=22, temperature=1.3, stop=(3,))
    assert max(rollout.evictions for rollout in rollouts) >= 3
    with torch.no_grad():
        for rollout in rollouts:
            reference = Reference(policy, temperature=1.3, stream_seed=rollout.stream_seed)
            theirs = reference.logprobs(rollout.prompt_ids, rollout.completion_ids)
            torch.testing.assert_close(rollout.rollout_logprobs, theirs, rtol=0, atol=1e-5)
            if rollout.evicted_tokens is not None:
                assert rollout.evicted_tokens.tolist() == reference.left


def test_gradient_modes_differ_where_they_should() -> None:
    # Otherwise the tests above would compare one mode with itself.
    policy = tiny_policy()
    completions, _ = completions_and_weights()
    batch = collate(PROMPTS, completions, stream_seeds=SEEDS, temperature=1.0)
    gradients = {}
    for mode in (("chain", None), ("horizon", 1), ("exact", None)):
        loss = Replay(policy, gradient_mode=mode[0], horizon=mode[1])(batch).policy_logprobs.sum()
        (gradients[mode[0]],) = torch.autograd.grad(loss, [policy.adapter.encoder.key_map])
    size = gradients["exact"].abs().max()
    assert (gradients["chain"] - gradients["exact"]).abs().max() > 0.01 * size
    assert (gradients["chain"] - gradients["horizon"]).abs().max() > 0.01 * size
