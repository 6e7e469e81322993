"""Part `update`: one optimizer step on given completions, by length: time, model FLOPs, peak memory.

Decides: that completions are random and carry the log-prob of a uniform distribution, so that an update costs what it
costs after a rollout and no rollout is needed. Ours in each gradient mode under the window, `chain` with our gradient
checkpointing, too; plain LoRA GRPO with a full cache and the library's gradient checkpointing, with one sequence where
the batch does not fit. Weights and adapter are in the peak.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from pte.bench.arms import OurStep, attached, given_rollouts
from pte.bench.device import clear, elapsed_seconds, peak_memory
from pte.bench.gpu_bench import Bench, reading
from pte.bench.plain import PlainLoraStep, detach_plain_lora
from pte.bench.rows import Case, Values
from pte.bench.workload import random_ids
from pte.model.policy import BoundedPolicy
from pte.plan.roofline import update_flops

if TYPE_CHECKING:
    from pte.bench.gpu_plan import GpuPlan
    from pte.rollout.replay import GradientMode

PLAIN = "plain_lora"
CHECKPOINTED = "chain_checkpointed"
MODES: dict[str, GradientMode] = {"chain": "chain", CHECKPOINTED: "chain", "horizon": "horizon", "exact": "exact"}
COMPLETION_SEED = 3


def update_cases(plan: GpuPlan) -> list[Case]:
    """The dense update in both ways, then every arm from short to long."""
    batch, window = plan.update_batch, plan.window_tokens
    sequences, tokens = plan.dense_update
    cases = [Case("update", arm, sequences, window, tokens) for arm in ("chain", CHECKPOINTED)]
    arms = (("horizon", window), ("chain", window), (PLAIN, None), (CHECKPOINTED, window), ("exact", window))
    for arm, kept in arms:
        cases += [Case("update", arm, batch, kept, length) for length in plan.update_lengths]
    return list(dict.fromkeys(cases))


def measure_update(bench: Bench, case: Case) -> Values:
    """A row of part `update`."""
    tokens = case.tokens
    assert tokens is not None
    if case.arm != PLAIN:
        return our_update(bench, case, tokens)
    for sequences in dict.fromkeys((case.batch, 1)):
        try:
            return plain_update(bench, sequences, tokens)
        except torch.OutOfMemoryError:
            if sequences == 1:
                raise
        # Only here, where the error holds nothing any more, can what it held be given back.
        clear(bench.device)
    raise AssertionError("one sequence fits or raises")


def our_update(bench: Bench, case: Case, tokens: int) -> Values:
    """The replay, its backward, the optimizer."""
    plan, vocab = bench.plan, bench.shape.vocab
    schedule = plan.schedule(case.window_tokens)
    rollouts = given_rollouts(
        random_ids(vocab, batch=case.batch, tokens=plan.prompt_tokens),
        random_ids(vocab, batch=case.batch, tokens=tokens, seed=COMPLETION_SEED),
        logprob=-math.log(vocab),
    )
    with attached(bench.base, "thought", rank=plan.rank, global_tokens=plan.global_tokens) as adapter:
        policy = BoundedPolicy(bench.base, adapter, schedule)
        step = OurStep(
            policy,
            [rollout.prompt_ids for rollout in rollouts],
            mode=MODES[case.arm],
            horizon=plan.horizon,
            micro_batch=case.batch,
            gradient_checkpointing=case.arm == CHECKPOINTED,
        )
        values = timed_update(bench, lambda: step.update(rollouts))
    rates = update_rates(bench, values, case.window_tokens, sequences=case.batch, tokens=tokens)
    if MODES[case.arm] != "chain":
        return {**values, **rates}
    evicted_tokens = schedule.num_evictions(tokens) * (schedule.evict_tokens or 0)
    return {**values, **rates, "evicted_bytes": case.batch * evicted_tokens * bench.work.kv_token_bytes}


def plain_update(bench: Bench, sequences: int, tokens: int) -> Values:
    """Plain LoRA under a full cache with gradient checkpointing."""
    plan, vocab = bench.plan, bench.shape.vocab
    prompts = random_ids(vocab, batch=sequences, tokens=plan.prompt_tokens)
    completions = random_ids(vocab, batch=sequences, tokens=tokens, seed=COMPLETION_SEED)
    sampled = torch.tensor([p + c for p, c in zip(prompts, completions, strict=True)], device=bench.device)
    try:
        step = PlainLoraStep(bench.base, prompts, rank=plan.rank, micro_batch=sequences, gradient_checkpointing=True)
        values = timed_update(bench, lambda: step.update(sampled))
    finally:
        detach_plain_lora(bench.base)
    return {**values, **update_rates(bench, values, None, sequences=sequences, tokens=tokens)}


def timed_update(bench: Bench, update: Callable[[], object]) -> Values:
    """Time and peak of an update, after one that is not read: the optimizer has its state."""
    update()
    with peak_memory(bench.device) as peak:
        seconds = bench.readings(lambda _: elapsed_seconds(bench.device, update))
    return {"seconds": reading(seconds), "median_seconds": statistics.median(seconds), "peak_bytes": peak.bytes}


def update_rates(bench: Bench, values: Values, window_tokens: int | None, *, sequences: int, tokens: int) -> Values:
    """Tokens per second, and model FLOPs against the measured matrix rate."""
    seconds = values["median_seconds"]
    assert isinstance(seconds, float)
    plan = bench.plan
    flops = update_flops(
        bench.work,
        plan.schedule(window_tokens),
        sequences=sequences,
        prompt_tokens=plan.prompt_tokens,
        tokens=tokens,
    )
    return {
        "sequences": sequences,
        "tokens_per_second": sequences * tokens / seconds,
        "model_flops": flops,
        "model_flops_fraction": flops / seconds / bench.rates.flops_per_second,
        "how": f"{sequences} random completions of {tokens} tokens in one batch",
    }
