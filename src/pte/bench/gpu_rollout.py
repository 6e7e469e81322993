"""Parts `rollout` (one decode step at equal batches) and `long` (whole completions, each arm at its best batch).

Decides: at which place of a rollout a step is timed. Under a window of W tokens every step from token W on is the
same, so W to 2W is timed and holds for every length; a whole completion is the run of W + 1 tokens and steady steps
after it. Under a full cache a step grows linearly with the position, so it is timed at half the length, its mean, and
at the end of it, where the batch must still fit. Full caches are filled by one random prompt that all sequences share
(ours), or with random keys and values (`generate`); their prefill is not counted, to their advantage.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from pte.bench.arms import OurRollout, attached
from pte.bench.device import elapsed_seconds, empty_kernel_cache, peak_memory
from pte.bench.generate_arms import generate_steps, static_steps
from pte.bench.gpu_bench import Bench, BoundedSteps, reading
from pte.bench.rows import Case, NotMeasured, Values, number_in
from pte.bench.vllm_arm import vllm_values
from pte.bench.workload import random_ids
from pte.model.policy import BoundedPolicy
from pte.plan.roofline import StepLine, attended_sum

if TYPE_CHECKING:
    from pte.bench.gpu_plan import GpuPlan
    from pte.method.adapter import AdapterKind

ADAPTERS: dict[str, AdapterKind | None] = {"full": None, "window": None, "window_lora": "lora", "pte": "thought"}
# The prompt gives the first token, a step as it is the second, a captured step the third, its replay the fourth.
START_TOKENS = 4


def rollout_cases(plan: GpuPlan) -> list[Case]:
    """Decode steps, in the order of their worth."""
    first, window, shortest = plan.batches[0], plan.window_tokens, plan.lengths[0]
    cases = [Case("rollout", "start", first, window)]
    cases += [Case("rollout", "pte", batch, window) for batch in plan.batches[:3]]
    cases += [Case("rollout", arm, first, window) for arm in ("window_lora", "window")]
    cases += [Case("rollout", "generate", batch, None, shortest) for batch in plan.batches[:3]]
    cases += [Case("rollout", "full", first, None, shortest), Case("rollout", "generate_static", first, None, shortest)]
    cases += [Case("rollout", "vllm", first, None, shortest)]
    cases += [Case("rollout", "pte", batch, window) for batch in plan.batches[3:]]
    cases += [Case("rollout", arm, batch, window) for arm in ("window_lora", "window") for batch in plan.batches[1:]]
    cases += [Case("rollout", "pte", batch, wider) for wider in plan.windows[1:] for batch in plan.batches[:1]]
    cases += [Case("rollout", arm, batch, None, shortest) for arm in ("full", "generate") for batch in plan.batches[1:]]
    return list(dict.fromkeys(cases))


def long_cases(plan: GpuPlan) -> list[Case]:
    """Whole completions."""
    batch, window = plan.long_batch, plan.window_tokens
    cases = [Case("long", "pte", batch, window, tokens) for tokens in plan.lengths]
    cases += [Case("long", arm, 0, None, tokens) for arm in ("generate", "full") for tokens in plan.lengths]
    return cases + [Case("long", arm, batch, window, plan.lengths[-1]) for arm in ("window_lora", "window")]


def measure_rollout(bench: Bench, case: Case) -> Values:
    """A row of part `rollout`."""
    if case.arm == "start":
        return start_values(bench, case)
    if case.window_tokens is not None:
        return bounded_steps(bench, case.arm, batch=case.batch, window_tokens=case.window_tokens).values
    tokens = case.tokens
    assert tokens is not None
    if case.arm == "vllm":
        return vllm_values(bench, batch=case.batch, tokens=tokens)
    if case.arm == "generate_static":
        return static_steps(bench, batch=case.batch, tokens=tokens)
    return full_steps(bench, case.arm, batch=case.batch, position=tokens // 2)


def measure_long(bench: Bench, case: Case) -> Values:
    """A row of part `long`."""
    tokens = case.tokens
    assert tokens is not None
    if case.window_tokens is not None:
        return bounded_completion(bench, case, tokens)
    return bench.with_largest_batch(
        bench.plan.prompt_tokens + tokens, lambda batch: full_completion(bench, case.arm, batch=batch, tokens=tokens)
    )


def bounded_steps(bench: Bench, arm: str, *, batch: int, window_tokens: int) -> BoundedSteps:
    """Steps from a full window through as many blocks as it has; timed once in a process."""
    if (arm, batch, window_tokens) in bench.bounded:
        return bench.bounded[arm, batch, window_tokens]
    plan, schedule = bench.plan, bench.plan.schedule(window_tokens)
    short, long = window_tokens + 1, 2 * window_tokens + 1
    fills: list[float] = []
    with attached(bench.base, ADAPTERS[arm], rank=plan.rank, global_tokens=plan.global_tokens) as adapter:
        policy = BoundedPolicy(bench.base, adapter, schedule)
        rollout = OurRollout(policy, random_ids(bench.shape.vocab, batch=batch, tokens=plan.prompt_tokens))

        def run(tokens: int, seed: int) -> None:
            seconds = elapsed_seconds(bench.device, lambda: rollout.run(tokens, seed))
            if tokens == short:
                fills.append(seconds)

        with peak_memory(bench.device) as peak:
            with empty_kernel_cache():
                run(short, -1)
            first = fills.pop()
            seconds = bench.steps_by_difference(run, short=short, long=long)
    attended = plan.prompt_tokens + attended_sum(schedule, range(window_tokens, 2 * window_tokens)) / window_tokens
    fill = statistics.median(fills)
    values: Values = {
        **bench.step_values(seconds, batch=batch, attended_tokens=attended),
        "path": rollout.path,
        "peak_bytes": peak.bytes,
        "cache_bytes": rollout.cache_bytes,
        "state_bytes": rollout.state_bytes,
        "fill_seconds": reading(fills),
        "warm_up_seconds": first - fill,
        "how": f"steady state: reasoning tokens {window_tokens} to {2 * window_tokens}, {plan.blocks} evictions",
    }
    steps = BoundedSteps(values, fill_seconds=fill, step_seconds=statistics.median(seconds))
    bench.bounded[arm, batch, window_tokens] = steps
    return steps


def bounded_completion(bench: Bench, case: Case, tokens: int) -> Values:
    """A whole completion of a bounded arm."""
    window = case.window_tokens
    assert window is not None
    steps = bounded_steps(bench, case.arm, batch=case.batch, window_tokens=window)
    seconds = steps.fill_seconds + (tokens - window - 1) * steps.step_seconds
    return {
        **steps.values,
        "completion_seconds": seconds,
        "tokens_per_second": case.batch * tokens / seconds,
        "how": f"the run of {window + 1} tokens, prompts and all, and {tokens - window - 1} steady steps, of which "
        f"{window} were timed",
    }


def start_values(bench: Bench, case: Case) -> Values:
    """The first rollout of a process, and a later one."""
    plan = bench.plan
    with attached(bench.base, "thought", rank=plan.rank, global_tokens=plan.global_tokens) as adapter:
        policy = BoundedPolicy(bench.base, adapter, plan.schedule(case.window_tokens))
        rollout = OurRollout(policy, random_ids(bench.shape.vocab, batch=case.batch, tokens=plan.prompt_tokens))
        with empty_kernel_cache():
            first = elapsed_seconds(bench.device, lambda: rollout.run(START_TOKENS, -1))
        later = bench.readings(lambda repeat: elapsed_seconds(bench.device, lambda: rollout.run(START_TOKENS, repeat)))
    return {
        "sequences": case.batch,
        "first_run_seconds": first,
        "later_run_seconds": reading(later),
        "path": rollout.path,
        "how": f"a rollout of {START_TOKENS} tokens, the first one of the process, no compiled kernel found, and later "
        f"ones",
    }


def full_steps(bench: Bench, arm: str, *, batch: int, position: int) -> Values:
    """Steps under a full cache at one position of the completion."""
    plan = bench.plan
    held = plan.prompt_tokens + position
    if arm == "generate":
        return generate_steps(bench, batch=batch, held_tokens=held)
    prompt = random_ids(bench.shape.vocab, batch=1, tokens=held)
    rollout = OurRollout(BoundedPolicy(bench.base, None, plan.schedule(None)), prompt * batch)
    short, long = 1 + plan.timed_steps, 1 + 2 * plan.timed_steps
    with peak_memory(bench.device) as peak:
        rollout.run(short, -1)
        seconds = bench.steps_by_difference(rollout.run, short=short, long=long)
    attended = held + attended_sum(plan.schedule(None), range(short - 1, long - 1)) / plan.timed_steps
    return {
        **bench.step_values(seconds, batch=batch, attended_tokens=attended),
        "path": rollout.path,
        "peak_bytes": peak.bytes,
        "cache_bytes": rollout.cache_bytes,
        "state_bytes": 0,
        "how": f"{held} tokens held from one random prompt that all share, {plan.timed_steps} steps timed",
    }


def full_completion(bench: Bench, arm: str, *, batch: int, tokens: int) -> Values:
    """A whole completion under a full cache, without its prefill.

    Raises:
        NotMeasured: The two readings contradict each other.
    """
    last = tokens - 2 * bench.plan.timed_steps
    late = full_steps(bench, arm, batch=batch, position=last)
    middle = full_steps(bench, arm, batch=batch, position=tokens // 2)
    (half, half_seconds), (end, end_seconds) = attended_and_seconds(middle), attended_and_seconds(late)
    prompt = bench.plan.prompt_tokens
    line = StepLine((half - prompt, end - prompt), (half_seconds, end_seconds))
    seconds = line.completion_seconds(tokens)
    if seconds <= 0:
        raise NotMeasured("steps at half of the length and at its end differ by more than a line can be drawn through")
    return {
        **late,
        "completion_seconds": seconds,
        "tokens_per_second": batch * tokens / seconds,
        "seconds_per_step_at_half": middle["seconds_per_step"],
        "how": f"{late['how']}; the same at half the length, steps between on a line",
    }


def attended_and_seconds(values: Values) -> tuple[float, float]:
    """Attended tokens of the steps that were timed, and the median of their seconds."""
    attended, seconds = number_in(values, "attended_tokens"), number_in(values, "seconds_per_step", "median")
    assert attended is not None and seconds is not None
    return attended, seconds
