"""Rollouts through the fused decode step, in triton's interpreter: those of the eager one, token for token."""

from __future__ import annotations

import pytest
import torch

from kernel_cases import DEVICE
from pte.model.decode import DecodeStep
from pte.model.fused import FusedDecodeStep
from pte.model.fused_support import unsupported
from pte.rollout.generate import RolloutEngine
from pte.rollout.record import Rollout
from sampled import gap, requests_for
from tiny import tiny_base, tiny_policy

PROMPTS = [(5, 6, 7), (8,), (9, 10, 11, 12, 13)]


def rollouts(policy, forward: type) -> list[Rollout]:
    seen = set()

    class Watched(RolloutEngine):
        def step(self) -> None:
            seen.add(type(self.decode))
            super().step()

    engine = Watched(policy, slots=2, max_new_tokens=14, temperature=1.0, stop_token_ids=(3, 4))
    engine.look_every_tokens = 3
    found = engine.run(requests_for(PROMPTS, first_seed=31))
    assert seen == {forward}
    return found


@pytest.mark.parametrize("kind", ["thought", "lora", None])
def test_fused_rollouts_are_the_eager_ones(kind: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base("qwen2", dtype=torch.float32, hidden_size=64, intermediate_size=48).to(DEVICE)
    policy = tiny_policy(base=base, kind=kind, dtype=torch.float32, window=4, block=2, up_std=0.1)
    eager = rollouts(policy, DecodeStep)
    monkeypatch.setattr("pte.rollout.token_step.fused_refusal", unsupported)
    fused = rollouts(policy, FusedDecodeStep)
    assert len({len(rollout.completion_ids) for rollout in eager}) == 3
    assert max(rollout.evictions for rollout in eager) >= 4
    for mine, theirs in zip(fused, eager, strict=True):
        assert mine.completion_ids == theirs.completion_ids
        torch.testing.assert_close(mine.rollout_logprobs, theirs.rollout_logprobs, rtol=0, atol=1e-5)
        assert mine.state_norm == pytest.approx(theirs.state_norm, rel=1e-4)
    # Law 1 on the fast path: the replay, which knows nothing of it, scores the same.
    assert gap(policy, fused) <= 1e-5


def test_two_runs_on_one_base_take_turns_with_its_spare_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pte.rollout.token_step.fused_refusal", unsupported)
    base = tiny_base("qwen2", dtype=torch.float32, hidden_size=64, intermediate_size=48).to(DEVICE)
    policy = tiny_policy(base=base, dtype=torch.float32, window=4, block=2, up_std=0.1)
    first = rollouts(policy, FusedDecodeStep)
    rollouts(policy.without_adapter(), FusedDecodeStep)
    again = rollouts(policy, FusedDecodeStep)
    assert [one.completion_ids for one in again] == [one.completion_ids for one in first]
