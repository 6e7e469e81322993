"""Layers that a backward pass computes again: the same gradients, the same choices, less memory."""

from dataclasses import replace

import pytest
import torch

from live_bytes import LiveBytes
from pte.method.eviction.h2o import HeavyHitters
from pte.model.policy import BoundedPolicy
from pte.rollout import walk
from pte.rollout.record import ReplayBatch, collate, collate_rollouts
from pte.rollout.replay import Replay
from reference import Reference
from sampled import SCORED, SETTINGS, recorded, requests_for, sample
from tiny import ARCHITECTURES, random_sequences, tiny_base, tiny_policy

pytestmark = pytest.mark.system

MODES = [("chain", None), ("horizon", 2), ("exact", None)]
CHOSEN = (
    "thought",
    "paper rule",
    "read rule",
    "one adapted layer",
    "lora",
    "global_only",
    "random eviction",
    "sinks, two blocks a stretch",
    "h2o",
    "snapkv",
    "window of one token",
)


def ragged(count: int = 5) -> ReplayBatch:
    """From completions that end in the first stretch to several evictions, and one of a single token."""
    prompts, completions = random_sequences(count, completion=(3, 26))
    completions[1] = completions[1][:1]
    return collate(prompts, completions, stream_seeds=range(count), temperature=0.7)


def gradients_of(
    policy: BoundedPolicy, batch: ReplayBatch, mode: tuple[str, int | None], again: bool, **given: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """Log-probs that the walk found and the gradients of a loss that is not linear in them."""
    replay = Replay(policy, gradient_mode=mode[0], horizon=mode[1], gradient_checkpointing=again)
    output = replay(batch, **given)
    loss = (output.policy_logprobs.square() * batch.completion_mask).sum()
    found = torch.autograd.grad(loss, list(policy.adapter.parameters()), allow_unused=True)
    return output.replayed_logprobs, list(found)


def check_same(policy: BoundedPolicy, batch: ReplayBatch, mode: tuple[str, int | None], **given: torch.Tensor) -> None:
    ours, theirs = (gradients_of(policy, batch, mode, again, **given) for again in (True, False))
    assert torch.equal(ours[0], theirs[0])
    assert any(gradient is not None and gradient.any() for gradient in theirs[1])
    for mine, plain in zip(ours[1], theirs[1], strict=True):
        assert (mine is None) == (plain is None)
        assert mine is None or torch.equal(mine, plain)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode[0])
@pytest.mark.parametrize("setting", CHOSEN)
def test_gradients_are_the_same_bit_for_bit_in_every_setting(setting: str, mode: tuple[str, int | None]) -> None:
    check_same(tiny_policy(**SETTINGS[setting]), ragged(), mode)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode[0])
@pytest.mark.parametrize("architecture", ARCHITECTURES[1:])
def test_gradients_are_the_same_for_every_architecture(architecture: str, mode: tuple[str, int | None]) -> None:
    check_same(tiny_policy(architecture), ragged(), mode)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode[0])
@pytest.mark.parametrize("setting", SCORED)
def test_what_is_computed_again_is_not_observed_again(setting: str, mode: tuple[str, int | None]) -> None:
    # Given log-probs and no record of evictions, the backward walk itself chooses, from what it observes.
    policy = tiny_policy(**SETTINGS[setting])
    if policy.adapter is None:
        return
    rollouts = sample(policy, requests_for([(5, 6, 7), (8,), (9, 10, 11, 12)]), max_new_tokens=26, stop=(3, 4))
    batch = replace(collate_rollouts(rollouts), evicted_tokens=None)
    check_same(policy, batch, mode, recorded=recorded(rollouts))
    found, _ = gradients_of(policy, batch, mode, True, recorded=recorded(rollouts))
    torch.testing.assert_close(found, recorded(rollouts), rtol=0, atol=1e-10)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode[0])
def test_every_layer_is_observed_once_a_stretch(mode: tuple[str, int | None], monkeypatch: pytest.MonkeyPatch) -> None:
    noted = []
    note = walk.note_attention

    def noting(cache: object, received: torch.Tensor, **where: object) -> None:
        noted.append(received.clone())
        note(cache, received, **where)

    monkeypatch.setattr(walk, "note_attention", noting)
    policy, batch = tiny_policy(eviction=HeavyHitters(2)), ragged()
    known = torch.zeros(batch.completion_ids.shape, dtype=torch.float64)
    gradients_of(policy, batch, mode, True, recorded=known)
    assert len(noted) >= 3
    # Each of 2 layers and 4 heads gives 1 a query; 8 queries in the first stretch, 4 in each later one.
    for index, received in enumerate(noted):
        expected = torch.full((len(received),), 2.0 * 4 * (4 if index else 8), dtype=torch.float64)
        torch.testing.assert_close(received.sum(1), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode[0])
@pytest.mark.parametrize("setting", ["thought", "paper rule", "snapkv"])
def test_the_gradients_are_the_reference_s(setting: str, mode: tuple[str, int | None]) -> None:
    policy = tiny_policy(**SETTINGS[setting])
    prompts, completions = [(3, 4, 5), (8,)], [tuple(range(3, 22)), tuple(range(9, 19))]
    batch = collate(prompts, completions, stream_seeds=range(2), temperature=0.7)
    logprobs = Replay(policy, gradient_mode=mode[0], horizon=mode[1], gradient_checkpointing=True)(
        batch
    ).policy_logprobs
    theirs = [
        Reference(policy, gradient_mode=mode[0], horizon=mode[1], temperature=0.7, stream_seed=row).logprobs(*sequence)
        for row, sequence in enumerate(zip(prompts, completions, strict=True))
    ]
    names, parameters = zip(*policy.adapter.named_parameters(), strict=True)
    found = torch.autograd.grad(logprobs.square().sum(), parameters, allow_unused=True)
    expected = torch.autograd.grad(sum(one.square().sum() for one in theirs), parameters, allow_unused=True)
    for name, mine, reference in zip(names, found, expected, strict=True):
        assert mine is not None and reference is not None, name
        assert (mine - reference).abs().max() < 2e-5 * reference.abs().max(), name


def peak_of(policy: BoundedPolicy, *, again: bool, tokens: int = 100, mode: str = "chain") -> int:
    batch = collate([(3, 4, 5)] * 2, [tuple([5] * tokens)] * 2, stream_seeds=range(2), temperature=1.0)
    replay = Replay(
        policy,
        gradient_mode=mode,
        horizon=2 if mode == "horizon" else None,
        gradient_checkpointing=again,
    )
    parameters = list(policy.adapter.parameters())
    with LiveBytes() as probe:
        torch.autograd.grad(replay(batch).policy_logprobs.sum(), parameters, allow_unused=True)
    return probe.peak


@pytest.mark.parametrize("mode", ["chain", "horizon"])
def test_one_layer_s_graph_is_alive_at_once(mode: str) -> None:
    # A layer more costs its graph without, its input and its keys and values with.
    peaks = {}
    for layers in (2, 6):
        wide = tiny_base(layers=layers, hidden_size=64, intermediate_size=256, dtype=torch.float32)
        policy = tiny_policy(base=wide, dtype=torch.float32, window=32, block=8, targets=("o_proj",))
        for again in (False, True):
            peaks[layers, again] = peak_of(policy, again=again, mode=mode)
    grown = {again: peaks[6, again] - peaks[2, again] for again in (False, True)}
    assert grown[True] < 0.35 * grown[False]


@pytest.mark.parametrize("window", [8, None], ids=["window", "full cache"])
def test_a_graph_that_nobody_walks_back_is_freed(window: int | None) -> None:
    # Layers that are computed again hold the attention, which held their keys, which held the graph.
    policy = tiny_policy(window=window)
    batch = ragged()
    with LiveBytes() as probe:
        output = Replay(policy, gradient_mode="exact", gradient_checkpointing=True)(batch)
        assert output.policy_logprobs.requires_grad
        held = probe.live
        del output
        assert probe.live < 0.1 * held
