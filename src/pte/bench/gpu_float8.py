"""Part `float8`: PTE's decode step with linear maps and cache in float8 beside the same in the plan's dtype.

Decides: that both arms run the same code on random weights of the same seed, each against a bound of its own bytes, and
how far rollout and replay are from each other: completions of two windows, all tokens of a few sequences, which is what
one precision for both is for. Where a device has no float8 its rows say so.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import torch
from torch.nn.utils.rnn import pad_sequence

from pte.bench.arms import OurRollout, attached
from pte.bench.gpu_bench import Bench
from pte.bench.gpu_rollout import bounded_steps
from pte.bench.rows import Case, NotMeasured, Values
from pte.bench.workload import random_ids
from pte.method.float8 import float8_refusal
from pte.model.load import round_to_float8
from pte.model.policy import BoundedPolicy
from pte.plan.roofline import DecodeWork
from pte.plan.shapes import random_base
from pte.rollout.record import collate_rollouts, logprob_gap
from pte.rollout.replay import Replay

if TYPE_CHECKING:
    from pte.bench.gpu_plan import GpuPlan

BATCHES = 3
GAP_SEQUENCES = 4


def float8_cases(plan: GpuPlan) -> list[Case]:
    """Both arms at the first batches."""
    return [
        Case("float8", arm, batch, plan.window_tokens)
        for batch in plan.batches[:BATCHES]
        for arm in ("float8", plan.dtype)
    ]


def measure_float8(bench: Bench, case: Case) -> Values:
    """A row of part `float8`.

    Raises:
        NotMeasured: The device has no float8.
    """
    assert case.window_tokens is not None
    ours = float8_bench(bench) if case.arm == "float8" else bench
    values = bounded_steps(ours, "pte", batch=case.batch, window_tokens=case.window_tokens).values
    gap = policy_gap(ours, sequences=min(case.batch, GAP_SEQUENCES), window_tokens=case.window_tokens)
    return {**values, "gap": gap}


def float8_bench(bench: Bench) -> Bench:
    """The same bench on a base in float8, which is made for one row and goes with it.

    Raises:
        NotMeasured: The device has no float8.
    """
    if (reason := float8_refusal(bench.device)) is not None:
        raise NotMeasured(reason)
    dtype = bench.plan.torch_dtype
    base = random_base(bench.shape, dtype=dtype, device=bench.device)
    round_to_float8(base, bench.device)
    return replace(bench, base=base, work=DecodeWork.of(bench.shape, dtype, float8=True), bounded={})


@torch.no_grad()
def policy_gap(bench: Bench, *, sequences: int, window_tokens: int) -> Values:
    """Distance of rollout and replay over completions of two windows."""
    plan = bench.plan
    with attached(bench.base, "thought", rank=plan.rank, global_tokens=plan.global_tokens) as adapter:
        policy = BoundedPolicy(bench.base, adapter, plan.schedule(window_tokens))
        prompts = random_ids(bench.shape.vocab, batch=sequences, tokens=plan.prompt_tokens)
        rollouts = OurRollout(policy, prompts).sample(2 * window_tokens, 0)
        batch = collate_rollouts(rollouts, device=bench.device)
        recorded = pad_sequence([one.rollout_logprobs for one in rollouts], batch_first=True).to(bench.device)
        found = Replay(policy)(batch).policy_logprobs
        return {**asdict(logprob_gap(found, recorded, completion_mask=batch.completion_mask))}
