"""Rollouts through the fused decode step, in triton's interpreter: those of the eager one, token for token."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from kernel_cases import DEVICE
from pte.model.decode import DecodeStep
from pte.model.fused import FusedDecodeStep
from pte.model.fused_support import unsupported
from pte.model.load import round_to_float8
from pte.model.policy import BoundedPolicy, attach_adapter, detach_adapter
from pte.rollout.generate import RolloutEngine
from pte.rollout.record import Rollout
from sampled import gap, requests_for
from tiny import tiny_base, tiny_policy

pytestmark = pytest.mark.system

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
    assert len({len(rollout.completion_ids) for rollout in eager}) >= 2
    assert max(rollout.evictions for rollout in eager) >= 4
    for mine, theirs in zip(fused, eager, strict=True):
        assert mine.completion_ids == theirs.completion_ids
        torch.testing.assert_close(mine.rollout_logprobs, theirs.rollout_logprobs, rtol=0, atol=1e-5)
        assert mine.state_norm == pytest.approx(theirs.state_norm, rel=1e-4)
    # Law 1 on the fast path: the replay, which knows nothing of it, is no further away than from the eager steps.
    assert gap(policy, fused) <= max(1e-5, 2 * gap(policy, eager))


def test_fused_rollouts_in_float8_are_the_eager_ones_and_the_policy_of_the_replay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = tiny_base("qwen2", dtype=torch.float32, hidden_size=64, intermediate_size=48).to(DEVICE)
    round_to_float8(base, DEVICE)
    policy = tiny_policy(base=base, dtype=torch.float32, window=4, block=2, up_std=0.1)
    eager = rollouts(policy, DecodeStep)
    monkeypatch.setattr("pte.rollout.token_step.fused_refusal", unsupported)
    fused = rollouts(policy, FusedDecodeStep)
    assert max(rollout.evictions for rollout in eager) >= 4
    assert [mine.completion_ids for mine in fused] == [theirs.completion_ids for theirs in eager]
    # A sum that ends on the other side of the edge of a code moves a few tokens by a thousandth; none did here.
    assert gap(policy, fused) <= max(1e-5, 2 * gap(policy, eager))


def test_engines_of_two_adapters_take_turns_on_one_base(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base("qwen2", dtype=torch.float32, hidden_size=64, intermediate_size=48).to(DEVICE)
    policies = []
    for seed in (0, 1):
        policies.append(tiny_policy(base=base, dtype=torch.float32, window=4, block=2, up_std=0.1, seed=seed))
        detach_adapter(base)
    monkeypatch.setattr("pte.rollout.token_step.fused_refusal", unsupported)
    requests = requests_for(PROMPTS[:2], first_seed=31)

    def opened(policy: BoundedPolicy, found: dict[int, tuple[int, ...]]) -> RolloutEngine:
        engine = RolloutEngine(policy, slots=2, max_new_tokens=9, temperature=1.0, stop_token_ids=())
        engine.open(
            rows=2, prompt_slots=3, on_finish=lambda order, rollout: found.update({order: rollout.completion_ids})
        )
        for request in requests:
            engine.submit(request)
        with_adapter(policy, engine.refill)
        return engine

    def with_adapter(policy: BoundedPolicy, work: Callable[[], None]) -> None:
        attach_adapter(base, policy.adapter)
        work()
        detach_adapter(base)

    alone: list[dict[int, tuple[int, ...]]] = [{}, {}]
    for policy, found in zip(policies, alone, strict=True):
        engine = opened(policy, found)
        while engine.busy:
            with_adapter(policy, engine.step)
    in_turns: list[dict[int, tuple[int, ...]]] = [{}, {}]
    engines = [opened(policy, found) for policy, found in zip(policies, in_turns, strict=True)]
    while any(engine.busy for engine in engines):
        for policy, engine in zip(policies, engines, strict=True):
            if engine.busy:
                with_adapter(policy, engine.step)
    assert alone[0] != alone[1]
    assert in_turns == alone
