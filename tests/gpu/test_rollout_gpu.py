"""Rollouts on a GPU: fused and captured, against the eager steps, the replay and the CPU."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from pte.method.float8 import float8_refusal
from pte.model.load import round_to_float8
from pte.model.policy import BoundedPolicy
from pte.rollout.generate import RolloutEngine
from pte.rollout.record import collate_rollouts, logprob_gap
from pte.rollout.replay import Replay
from pte.timing import step_clock
from sampled import SETTINGS, recorded, requests_for
from tiny import random_sequences, tiny_base, tiny_policy

if TYPE_CHECKING:
    from pte.rollout.record import Rollout

PROMPTS = [(5,), (6,) * 14, *random_sequences(9, prompt=(2, 9), seed=3)[0]]
SAMPLED = ["thought", "paper rule", "lora", "no adapter", "random eviction", "sinks", "full cache", "h2o", "rkv"]


def policy_on(device: str, setting: str, *, dtype: torch.dtype = torch.float32) -> BoundedPolicy:
    base = tiny_base("qwen2", dtype=dtype, hidden_size=64, intermediate_size=96).to(device)
    return tiny_policy(base=base, dtype=torch.float32, up_std=0.1, **SETTINGS[setting])


def rollouts(policy: BoundedPolicy, *, captures: bool = True) -> tuple[str, list[Rollout]]:
    class Uncaptured(RolloutEngine):
        def make_token_step(self) -> None:
            super().make_token_step()
            self.token_step.captures = False

    engine = (RolloutEngine if captures else Uncaptured)(
        policy, slots=6, max_new_tokens=40, temperature=1.0, stop_token_ids=(3,)
    )
    return engine.path, engine.run(requests_for(PROMPTS, first_seed=5))


@pytest.mark.parametrize("setting", SAMPLED)
def test_a_captured_rollout_is_the_one_of_single_launches_and_of_the_cpu(setting: str) -> None:
    path, captured = rollouts(policy_on("cuda", setting))
    assert path.startswith("eager, CUDA graph (" if setting in ("h2o", "rkv") else "fused kernels, CUDA graph")
    _, launched = rollouts(policy_on("cuda", setting), captures=False)
    _, on_cpu = rollouts(policy_on("cpu", setting))
    assert len({len(rollout.completion_ids) for rollout in on_cpu}) > 3
    for mine, single, theirs in zip(captured, launched, on_cpu, strict=True):
        assert mine.completion_ids == single.completion_ids == theirs.completion_ids
        torch.testing.assert_close(mine.rollout_logprobs, single.rollout_logprobs, rtol=0, atol=1e-6)
        torch.testing.assert_close(mine.rollout_logprobs, theirs.rollout_logprobs, rtol=0, atol=5e-5)


@pytest.mark.parametrize("clocked", [False, True])
def test_eager_steps_are_captured_too_with_a_clock_and_without(clocked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pte.rollout.token_step.fused_refusal", lambda policy: "as a test")
    policy = policy_on("cuda", "thought")
    with step_clock(policy.device) if clocked else nullcontext():
        path, captured = rollouts(policy)
    assert path == "eager, CUDA graph (as a test)"
    _, launched = rollouts(policy, captures=False)
    for mine, single in zip(captured, launched, strict=True):
        assert mine.completion_ids == single.completion_ids
        torch.testing.assert_close(mine.rollout_logprobs, single.rollout_logprobs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("setting", SAMPLED)
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_rollout_and_replay_are_one_policy_on_a_gpu(setting: str, dtype: torch.dtype, most: float) -> None:
    policy = policy_on("cuda", setting, dtype=dtype)
    _, found = rollouts(policy)
    batch = collate_rollouts(found, device="cuda")
    output = Replay(policy)(batch)
    gap = logprob_gap(output.policy_logprobs, recorded(found).to("cuda"), completion_mask=batch.completion_mask)
    assert (gap.max if dtype == torch.float32 else gap.mean) <= most


@pytest.mark.skipif(float8_refusal(torch.device("cuda")) is not None, reason="needs a GPU with float8")
@pytest.mark.parametrize("setting", SAMPLED)
def test_rollout_and_replay_in_float8_are_one_policy_on_a_gpu(setting: str) -> None:
    base = tiny_base("qwen2", dtype=torch.bfloat16, hidden_size=64, intermediate_size=96, num_key_value_heads=4)
    round_to_float8(base, "cuda")
    policy = tiny_policy(base=base.to("cuda"), dtype=torch.float32, up_std=0.1, **SETTINGS[setting])
    path, found = rollouts(policy)
    assert ("eager" if setting in ("h2o", "rkv") else "fused kernels, CUDA graph, float8") in path
    batch = collate_rollouts(found, device="cuda")
    output = Replay(policy)(batch)
    gap = logprob_gap(output.policy_logprobs, recorded(found).to("cuda"), completion_mask=batch.completion_mask)
    assert gap.mean <= 2e-2
