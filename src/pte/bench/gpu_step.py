"""Part `step`: one whole GRPO step, where its time goes, and its peak beside plain LoRA's.

Decides: the two sides. Ours is a rollout, a reward, the replay in `chain` by micro-batches, with and without gradient
checkpointing, and the optimizer; the time comes from a step without a clock, the breakdown from one under `pte.timing`,
which waits for the device at every span. Plain LoRA's is `generate` with its full cache at the end of the completion,
where it takes the most memory, and the checkpointed update by the same micro-batches and chunks of logits; its
rollout's time is that of the step at half the length, for all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pte.bench.arms import OurStep, attached
from pte.bench.device import elapsed_seconds, peak_memory
from pte.bench.generate_arms import generate_steps
from pte.bench.gpu_bench import Bench, reading
from pte.bench.gpu_rollout import ADAPTERS, attended_and_seconds
from pte.bench.gpu_update import COMPLETION_SEED, PLAIN, timed_update
from pte.bench.plain import PlainLoraStep, detach_plain_lora
from pte.bench.rows import Case, Values, number_in
from pte.bench.workload import random_ids
from pte.model.policy import BoundedPolicy
from pte.timing import step_clock

if TYPE_CHECKING:
    from pte.bench.gpu_plan import GpuPlan

STATE_SPANS = ("fold", "read")
CHECKPOINTED = "pte_checkpointed"
STEP_ADAPTERS = {**ADAPTERS, CHECKPOINTED: ADAPTERS["pte"]}


def step_cases(plan: GpuPlan) -> list[Case]:
    """PTE, the same with gradient checkpointing, plain LoRA, and LoRA under the window."""
    sequences, tokens, _ = plan.step
    return [
        Case("step", "pte", sequences, plan.window_tokens, tokens),
        Case("step", CHECKPOINTED, sequences, plan.window_tokens, tokens),
        Case("step", PLAIN, sequences, None, tokens),
        Case("step", "window_lora", sequences, plan.window_tokens, tokens),
    ]


def measure_step(bench: Bench, case: Case) -> Values:
    """A row of part `step`."""
    tokens = case.tokens
    assert tokens is not None
    return plain_step(bench, case, tokens) if case.arm == PLAIN else our_step(bench, case, tokens)


def our_step(bench: Bench, case: Case, tokens: int) -> Values:
    """A step of ours, without a clock and with one."""
    plan, device = bench.plan, bench.device
    with attached(bench.base, STEP_ADAPTERS[case.arm], rank=plan.rank, global_tokens=plan.global_tokens) as adapter:
        schedule = plan.schedule(case.window_tokens)
        step = OurStep(
            BoundedPolicy(bench.base, adapter, schedule),
            random_ids(bench.shape.vocab, batch=case.batch, tokens=plan.prompt_tokens),
            mode="chain",
            horizon=plan.horizon,
            micro_batch=plan.step[2],
            gradient_checkpointing=case.arm == CHECKPOINTED,
        )
        window, block = schedule.window_tokens, schedule.evict_tokens
        assert window is not None and block is not None
        step.run(min(tokens, window + 2 * block), -1)
        with peak_memory(device) as peak:
            seconds = bench.readings(lambda repeat: elapsed_seconds(device, lambda: step.run(tokens, repeat)))
        with step_clock(device) as clock:
            step.run(tokens, plan.repeats)
    spans = clock.seconds()
    total = sum(spans.values())
    return {
        "sequences": case.batch,
        "seconds": reading(seconds),
        "peak_bytes": peak.bytes,
        "path": step.path,
        "cache_bytes": step.cache_bytes,
        "state_bytes": step.state_bytes,
        "clocked_seconds": total,
        "spans": dict(spans),
        "state_fraction": sum(spans[name] for name in STATE_SPANS) / total,
        "how": f"{case.batch} completions of {tokens} tokens, micro-batches of {plan.step[2]}; spans from a step that "
        f"waits for the device at every span; S that decode kernels read themselves is in decode, not in read",
    }


def plain_step(bench: Bench, case: Case, tokens: int) -> Values:
    """A step of plain LoRA: its rollout by samples of it, its update whole."""
    plan, vocab = bench.plan, bench.shape.vocab
    held = plan.prompt_tokens + tokens - plan.timed_steps - 1
    rollout = generate_steps(bench, batch=case.batch, held_tokens=held)
    _, step_seconds = attended_and_seconds(
        generate_steps(bench, batch=case.batch, held_tokens=plan.prompt_tokens + tokens // 2)
    )
    prompts = random_ids(vocab, batch=case.batch, tokens=plan.prompt_tokens)
    completions = random_ids(vocab, batch=case.batch, tokens=tokens, seed=COMPLETION_SEED)
    sampled = torch.tensor([p + c for p, c in zip(prompts, completions, strict=True)], device=bench.device)
    try:
        step = PlainLoraStep(bench.base, prompts, rank=plan.rank, micro_batch=plan.step[2], gradient_checkpointing=True)
        update = timed_update(bench, lambda: step.update(sampled))
    finally:
        detach_plain_lora(bench.base)
    peaks = [number_in(values, "peak_bytes") for values in (rollout, update)]
    update_seconds = number_in(update, "median_seconds")
    assert update_seconds is not None
    return {
        "sequences": case.batch,
        "rollout_seconds": tokens * step_seconds,
        "update_seconds": update["seconds"],
        "estimated_seconds": tokens * step_seconds + update_seconds,
        "rollout_peak_bytes": rollout["peak_bytes"],
        "update_peak_bytes": update["peak_bytes"],
        "peak_bytes": None if None in peaks else max(peak for peak in peaks if peak is not None),
        "path": rollout["path"],
        "cache_bytes": rollout["cache_bytes"],
        "state_bytes": 0,
        "how": f"rollout: {tokens} steps of the bare base, timed at half the length, peak at its end; update: gradient "
        f"checkpointing, logits by chunks as in ours, micro-batches of {plan.step[2]}",
    }
