"""The token step: captured it is what it is launched singly, whoever observes, and a stop token costs it nothing."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pte.model.policy import BoundedPolicy
from pte.rollout.generate import RolloutEngine
from pte.rollout.record import Rollout
from recorded_graph import RecordedGraph, recorded
from sampled import SETTINGS, requests_for
from tiny import random_sequences, tiny_policy

PROMPTS = random_sequences(5, prompt=(1, 6), seed=11)[0]
OBSERVERS = ["h2o", "rkv", "scissorhands", "tova", "snapkv"]


class Capturing(RolloutEngine):
    """An engine whose steps are captured, on whatever device."""

    def make_token_step(self) -> None:
        super().make_token_step()
        self.token_step.captures = True
        self.steps = [*getattr(self, "steps", ()), self.token_step]


def rollouts(kind: type[RolloutEngine], policy: BoundedPolicy) -> tuple[RolloutEngine, list[Rollout]]:
    engine = kind(policy, slots=3, max_new_tokens=26, temperature=1.0, stop_token_ids=(3, 4))
    engine.look_every_tokens = 3
    return engine, engine.run(requests_for(PROMPTS, first_seed=20))


@pytest.mark.parametrize("setting", ["thought", "random eviction", "full cache", *OBSERVERS])
def test_replaying_a_captured_step_is_computing_it_again(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.CUDAGraph", RecordedGraph)
    monkeypatch.setattr("torch.cuda.graph", recorded)
    monkeypatch.setattr("torch.cuda.synchronize", lambda device: None)
    monkeypatch.setattr("torch.cuda.device", lambda device: nullcontext())
    policy = tiny_policy(**SETTINGS[setting])
    _, launched = rollouts(RolloutEngine, policy)
    engine, replayed = rollouts(Capturing, policy)
    captured = {observes for step in engine.steps for observes in step.replayed}
    # All attention counts, or the last queries before an eviction, or none.
    expected = {"tova": {True, False}, "snapkv": {True, False}, "h2o": {True}, "rkv": {True}, "scissorhands": {True}}
    assert captured == expected.get(setting, {False})
    assert max(rollout.evictions for rollout in launched) >= (0 if setting == "full cache" else 2)
    assert len({len(rollout.completion_ids) for rollout in launched}) > 2
    for mine, theirs in zip(replayed, launched, strict=True):
        assert mine.completion_ids == theirs.completion_ids
        torch.testing.assert_close(mine.rollout_logprobs, theirs.rollout_logprobs, rtol=0, atol=1e-12)
        assert mine.state_norm == pytest.approx(theirs.state_norm, rel=1e-6)
        if theirs.evicted_tokens is not None:
            assert torch.equal(mine.evicted_tokens, theirs.evicted_tokens)


class Operations(TorchDispatchMode):
    """Counts the operations of a block."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.count += 1
        return function(*arguments, **(keywords or {}))


def operations(policy: BoundedPolicy, *, stop: tuple[int, ...]) -> int:
    """Of one step under a full window, no eviction due, the host's look at it included."""
    engine = RolloutEngine(policy, slots=2, max_new_tokens=20, temperature=1.0, stop_token_ids=stop)
    engine.open(rows=2, prompt_slots=4, on_finish=lambda order, rollout: None)
    for request in requests_for([(5, 6, 7), (8, 9)]):
        engine.submit(request)
    engine.refill()
    while engine.running[0].entering < 10:
        engine.step()
    with Operations() as counted:
        engine.step()
    assert engine.running[0].entering == 11
    return counted.count


def test_a_step_takes_few_operations_and_stop_tokens_none() -> None:
    # A token that cannot be drawn: the host looks, and nothing stops.
    policy = tiny_policy(dtype=torch.float32)
    found = operations(policy, stop=(policy.vocab,))
    assert found == operations(policy, stop=())
    # Two layers, torch 2.13: 60 in each (7 of them in each norm), 55 for slots, mask, angles, head and draw.
    assert found <= 175
