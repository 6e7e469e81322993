"""Train and compare runs in the terms of evidence: their scores, curves, costs and memory as measurements.

Decides: which numbers of a run answer which question, so that a user's own runs get the tables and figures of the
evidence. Does not know figures.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from pte.report.completions import listed
from pte.report.measurements import Measurement, Value, grouped
from pte.report.runs import Arm, RecordedRun, Row, numbers
from pte.report.style import label

COSTS = ("rollout_seconds", "replay_seconds", "tokens_per_second", "peak_memory_bytes", "cache_bytes")
CURVES = ("reward", "accuracy", "logprob_gap_max")
PLACES = ("step", "seconds", "tokens")
MEMORY_POINTS = 200
NAMED = 4


def measurements_of(runs: Sequence[RecordedRun]) -> list[Measurement]:
    """Every measurement of all runs, read or derived."""
    found: list[Measurement] = []
    for run in runs:
        for part in run.parts:
            found += part.measurements
        for arm in run.arms:
            found += [*scores(run, arm), *curves(run, arm), *costs(run, arm), *memory(run, arm)]
    return found


def unrepeated(runs: Sequence[RecordedRun]) -> tuple[list[Measurement], list[str]]:
    """The measurements of all runs, and a sentence for each run that repeats an earlier one, whose own are kept.

    Seeds are what an interval is over, so that a number which is there twice must not count twice.
    """
    found: list[Measurement] = []
    notes = []
    first: dict[Measurement, RecordedRun] = {}
    for run in runs:
        measured = measurements_of([run])
        mine = grouped(measured, what)
        repeated = {key: first[key] for key in mine if key in first}
        found += [one for one in measured if what(one) not in repeated]
        first |= {key: run for key in mine if key not in first}
        for before in dict.fromkeys(one.path for one in repeated.values()):
            keys = [key for key, one in repeated.items() if one.path == before]
            arms = list(dict.fromkeys(f"{label(key.arm)}, seed {key.seed}" for key in keys))
            named = "; ".join(arms[:NAMED]) + (f" and {len(arms) - NAMED} more" if len(arms) > NAMED else "")
            notes.append(
                f"{run.path} has {sum(len(mine[key]) for key in keys)} measurements that {before} has too ({named}); "
                f"they are left out: name one of the two runs, or give each a seed of its own."
            )
    return found, notes


def what(one: Measurement) -> Measurement:
    """Everything but the number; a curve is one thing, whatever steps it has."""
    setting = one.without(*PLACES) if one.at("step") is not None else one.setting
    return replace(one, setting=setting, value=0.0, right=None, total=None)


def setting_of(run: RecordedRun) -> tuple[tuple[str, Value], ...]:
    """Window and block of a run, as far as they are recorded, and its name where another comparison is shown too."""
    named = (("window_tokens", "window_tokens"), ("block_tokens", "evict_tokens"))
    values = [(name, run.option("cache", key)) for name, key in named]
    found = tuple((name, value) for name, value in values if isinstance(value, int))
    return (*found, *((("comparison", run.told_apart),) if run.told_apart else ()))


def stage_of(run: RecordedRun, arm: Arm) -> str:
    """How an arm had learned in the end."""
    if not arm.metrics:
        return "none"
    stages = {str(row.get("stage")) for row in arm.metrics}
    return {(True, True): "both", (True, False): "warm_start"}.get(("distill" in stages, "grpo" in stages), "grpo")


def scores(run: RecordedRun, arm: Arm) -> Iterator[Measurement]:
    """Accuracy, cache bytes and seconds of each evaluation; of the warm start where it was scored."""
    stage = stage_of(run, arm)
    for name, evaluation in arm.evaluations.items():
        compared = run.kind == "compare"
        yield from scores_of(
            evaluation,
            arm=name if compared else arm.name,
            task=arm.task if compared else name,
            stage=stage,
            seed=arm.seed,
            setting=setting_of(run),
        )
    warm = arm.warm_start.get("accuracy")
    if isinstance(warm, Mapping) and stage == "both":
        yield from scores_of(
            warm, arm=arm.name, task=arm.task, stage="warm_start", seed=arm.seed, setting=setting_of(run)
        )


def scores_of(
    evaluation: Row, *, arm: str, task: str, stage: str, seed: int, setting: tuple[tuple[str, Value], ...]
) -> Iterator[Measurement]:
    """The numbers of one evaluation."""
    problems, samples = evaluation.get("problems"), evaluation.get("samples_per_problem")
    for key, metric in (
        ("accuracy", "accuracy"),
        ("completion_tokens", "completion_tokens"),
        ("peak_cache_bytes", "cache_bytes"),
        ("seconds", "evaluation_seconds"),
    ):
        value = evaluation.get(key)
        if not isinstance(value, (int, float)):
            continue
        counted = key == "accuracy" and samples == 1 and isinstance(problems, int)
        yield Measurement(
            question="arms",
            task=task,
            arm=arm,
            stage=stage,
            seed=seed,
            setting=setting,
            metric=metric,
            value=float(value),
            right=round(value * problems) if counted and isinstance(problems, int) else None,
            total=problems if counted and isinstance(problems, int) else None,
        )


def curves(run: RecordedRun, arm: Arm) -> Iterator[Measurement]:
    """Reward, accuracy and gap of each GRPO step, with the seconds and tokens that it took to get there."""
    seconds = tokens = 0.0
    step = 0
    apart = (("comparison", run.told_apart),) if run.told_apart else ()
    for row in arm.metrics:
        if row.get("stage") != "grpo":
            continue
        step += 1
        for took, rate in numbers([row], "seconds", "tokens_per_second"):
            seconds += took
            tokens += took * rate
        for metric in CURVES:
            for (value,) in numbers([row], metric):
                yield Measurement(
                    question="rl",
                    task=arm.task,
                    arm=arm.name,
                    stage=stage_of(run, arm),
                    seed=arm.seed,
                    setting=(("step", step), ("seconds", seconds), ("tokens", tokens), *apart),
                    metric=metric,
                    value=value,
                )


def costs(run: RecordedRun, arm: Arm) -> Iterator[Measurement]:
    """Medians over the GRPO steps."""
    rows = [row for row in arm.metrics if row.get("stage") == "grpo"]
    for metric in COSTS:
        values = [value for (value,) in numbers(rows, metric)]
        if values:
            yield Measurement(
                question="cost",
                task=arm.task,
                arm=arm.name,
                stage=stage_of(run, arm),
                seed=arm.seed,
                setting=setting_of(run),
                metric=metric,
                value=statistics.median(values),
            )


def memory(run: RecordedRun, arm: Arm) -> Iterator[Measurement]:
    """Cache bytes of the longest recorded completion after each token, its state included.

    Beside a single policy stands what the same completion takes with the full cache: every token kept.
    """
    if not arm.rollouts:
        return
    rollout = max(arm.rollouts, key=lambda one: len(listed(one, "completion_tokens")))
    kept = kept_tokens(rollout)
    (token_bytes,) = next(numbers([rollout], "token_bytes"), (0.0,))
    (state_bytes,) = next(numbers([rollout], "state_bytes"), (0.0,))
    prompt = len(listed(rollout, "prompt_tokens"))
    lines = {arm.name: [(prompt + count) * token_bytes + state_bytes for count in kept]}
    if run.kind == "train" and rollout.get("window_tokens") is not None:
        lines["every token kept"] = [(prompt + count) * token_bytes for count in range(len(kept))]
    every = max(1, len(kept) // MEMORY_POINTS)
    for name, values in lines.items():
        for count, value in list(enumerate(values))[::every]:
            yield Measurement(
                question="memory",
                task=arm.task,
                arm=name,
                stage=stage_of(run, arm),
                seed=arm.seed,
                setting=(("tokens", count), *setting_of(run)),
                metric="cache_bytes",
                value=value,
            )


def kept_tokens(rollout: Row) -> list[int]:
    """Reasoning tokens in the cache after 0, 1, ... of them have entered; the last token of a completion never does."""
    length = len(listed(rollout, "completion_tokens"))
    left = {
        before: len(listed(one, "evicted_tokens"))
        for one in listed(rollout, "evictions")
        if isinstance(one, Mapping) and isinstance(before := one.get("before_token"), int)
    }
    kept = [0]
    for token in range(length - 1):
        kept.append(kept[-1] - left.get(token, 0) + 1)
    return kept
