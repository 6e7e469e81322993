"""The main job: base, LoRA and PTE from one base, with equal steps and rollouts, in one table and one figure.

Decides: the arms, how they differ (kind of adapter, cache, control of the state) and nothing else, what the summary
holds. Each trained arm is an ordinary run in its own directory, so an interrupted comparison goes on where it was.

Arms, after the paper's tables: `base_full`, `base_window`; `lora_full`; `lora_window` (the paper's LoRA_c); `pte`;
controls of the trained PTE arm: `pte_zeroed` and `pte_shuffled` (every sequence reads another sequence's state).
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from pte.arms import arm_config
from pte.jobs import Job, run_jobs
from pte.report.arms import compare_figure
from pte.report.curves import read_metrics
from pte.report.runs import numbers
from pte.run_record import (
    RECORD_FILE,
    check_resumed_config,
    commit,
    hardware,
    open_run_directory,
    replace_synced,
    save_record,
)
from pte.session import Session, check_problems, open_session
from pte.tasks.rollouts_file import ROLLOUTS_FILE, write_rollouts

if TYPE_CHECKING:
    from pte.checkpoint_files import Json
    from pte.config import ExperimentConfig
    from pte.tasks.evaluate import EvaluatedCompletion

TRAINED = ("pte", "lora_window", "lora_full")
SCORED = ("base_full", "base_window", "lora_full", "lora_window", "pte", "pte_zeroed", "pte_shuffled")
RESULT_FILE = "result.json"
WARM_START_FILE = "warm_start.json"
REWARD_SAMPLES = 4


@dataclass(frozen=True)
class ArmScore:
    """What an arm reached.

    Args:
        accuracy: On held-out problems.
        ci95: Its 95 % interval.
        peak_cache_bytes: Keys and values of all slots of the evaluation.
        seconds: Wall time of training and scoring; of the last process alone where the arm was resumed.
    """

    accuracy: float
    ci95: tuple[float, float]
    peak_cache_bytes: int
    seconds: float


@dataclass(frozen=True)
class Summary:
    """summary.json.

    Args:
        commit: Of the checkout.
        hardware: Of the machine.
        seconds: Wall time of this call.
        window_tokens: Reasoning tokens kept.
        evict_tokens: Reasoning tokens evicted at once.
        trace_tokens: Length of a right trace; None where it varies.
        heldout_problems: Problems scored.
        distill_steps: Warm-start steps of every trained arm.
        grpo_steps: GRPO steps of every trained arm.
        max_logprob_gap: Largest gap between rollout and replay over all steps of all arms, nats.
        gap_closed: (pte - lora_window) / (lora_full - lora_window); None without a gap.
        warm_start_accuracy: PTE's accuracy after the warm start.
        warm_start_reward: PTE's mean reward after the warm start, sampled at the rollouts' temperature on the held-out
            problems.
        warm_start_reward_ci95: Its 95 % interval.
        final_reward: The same in the end.
        final_reward_ci95: Its 95 % interval.
        arms: By name.
    """

    commit: str | None
    hardware: dict[str, Json]
    seconds: float
    window_tokens: int
    evict_tokens: int
    trace_tokens: int | None
    heldout_problems: int
    distill_steps: int
    grpo_steps: int
    max_logprob_gap: float
    gap_closed: float | None
    warm_start_accuracy: float
    warm_start_reward: float
    warm_start_reward_ci95: tuple[float, float]
    final_reward: float
    final_reward_ci95: tuple[float, float]
    arms: dict[str, ArmScore]


def run_config(config: ExperimentConfig, arm: str) -> ExperimentConfig:
    """The experiment of one arm as a run of its own, inside the directory of the comparison."""
    directory = str(Path(config.run.output_dir) / config.run.name)
    return replace(arm_config(config, arm), run=replace(config.run, name=arm, output_dir=directory, resume=False))


def run_arm(config: ExperimentConfig, arm: str) -> None:
    """Trains and scores one arm in this process; writes result.json, and warm_start.json between the stages.

    Args:
        config: Of the whole comparison.
        arm: One that is trained, or a base arm, which is only scored.
    """
    from pte.learn.trainer import open_run, train

    started = time.perf_counter()
    own = run_config(config, arm)
    directory = Path(own.run.output_dir) / arm
    result: dict[str, Json] = {}
    if arm in TRAINED:
        own = replace(own, run=replace(own.run, resume=(directory / RECORD_FILE).is_file()))
        run = open_run(own)
        session = run.session

        def score_warm_start(steps: int) -> None:
            if steps == own.distill.steps:
                warm = {"accuracy": score(own, session), "reward": score(sampled(own), session)}
                replace_synced(directory / WARM_START_FILE, json.dumps(warm, indent=2).encode())

        # A run that was killed after the checkpoint between the stages, while it was being scored, is scored here.
        score_warm_start(run.done_steps)
        train(run, on_step=lambda _, step, __: score_warm_start(step))
    else:
        directory.mkdir(parents=True, exist_ok=True)
        session = open_session(own)
    result[arm], completions = scored_completions(own, session)
    if own.eval.state_control == "own":
        write_rollouts(directory / ROLLOUTS_FILE, session.policy, session.task, completions)
    if arm == "pte":
        result["reward"] = score(sampled(own), session)
        for control in ("pte_zeroed", "pte_shuffled"):
            result[control] = score(run_config(config, control), session)
    result["seconds"] = time.perf_counter() - started
    replace_synced(directory / RESULT_FILE, json.dumps(result, indent=2).encode())


def sampled(config: ExperimentConfig) -> ExperimentConfig:
    """The same, scored on samples at the rollouts' temperature: the expected reward, which is what GRPO raises."""
    scores = replace(
        config.eval, temperature=config.rollout.temperature, samples_per_problem=REWARD_SAMPLES, pass_at=(1,)
    )
    return replace(config, eval=scores)


def score(config: ExperimentConfig, session: Session) -> dict[str, Json]:
    """Accuracy of a session's policy on the first evaluation set of its task."""
    return scored_completions(config, session)[0]


def scored_completions(config: ExperimentConfig, session: Session) -> tuple[dict[str, Json], list[EvaluatedCompletion]]:
    """The same with the completions."""
    from pte.tasks.evaluate import evaluate_session

    evaluation, completions = evaluate_session(session, config, name=next(iter(session.task.evaluation)))
    return evaluation.as_json(), completions


def compare(config: ExperimentConfig, *, workers: int | None, console: Console, progress: Progress) -> None:
    """Runs all arms and writes summary.json, arms.png and a table.

    Args:
        config: Of the PTE arm; the others follow from it.
        workers: Processes at once, one CPU thread each; None for one per core, on a GPU one.
        console: For the table.
        progress: For the bars.

    Raises:
        FileExistsError, FileNotFoundError: The run directory is taken, or there is no comparison to resume.
        ValueError: The configuration cannot be compared, or is another one than that of the comparison resumed.
    """
    if config.adapter.kind not in ("thought", "global_only") or config.cache.policy == "none":
        raise ValueError(
            f"pte compare needs the PTE arm's experiment, adapter.kind 'thought' under a bounded cache, got "
            f"{config.adapter.kind!r} with cache.policy {config.cache.policy!r}; the other arms follow from it"
        )
    if not (config.distill.steps and config.train.steps):
        raise ValueError("pte compare needs distill.steps and train.steps of at least 1; set both")
    if config.adapter.checkpoint is not None:
        raise ValueError(
            f"pte compare trains every arm from the base, got adapter.checkpoint {config.adapter.checkpoint!r}; "
            f"leave it out"
        )
    check_problems(open_session(config), config)
    directory = open_run_directory(Path(config.run.output_dir) / config.run.name, resume=config.run.resume)
    if config.run.resume:
        check_same_comparison(directory, config)
    else:
        save_record(directory, config)
    started = time.perf_counter()
    count = workers or (1 if config.model.device.startswith("cuda") else os.cpu_count() or 1)
    steps = config.distill.steps + config.train.steps
    jobs = [
        Job(
            name=arm,
            work=run_arm,
            arguments=(config, arm),
            steps=steps if arm in TRAINED else 1,
            metrics=directory / arm / "metrics.jsonl" if arm in TRAINED else None,
        )
        for arm in (*TRAINED, "base_full", "base_window")
        if not (directory / arm / RESULT_FILE).is_file()
    ]
    run_jobs(jobs, workers=count, console=console, progress=progress)
    seconds = time.perf_counter() - started
    summary = summarise(config, directory, seconds=seconds)
    replace_synced(directory / "summary.json", json.dumps(asdict(summary), indent=2).encode())
    compare_figure(
        summary.arms,
        {arm: read_metrics(directory / arm / "metrics.jsonl") for arm in reversed(TRAINED)},
        directory / "arms.png",
        subtitle=f"window {summary.window_tokens} tokens, traces {summary.trace_tokens} tokens, "
        f"{summary.heldout_problems} held-out problems, greedy, 95 % intervals",
    )
    console.print(arms_table(summary))
    console.print(f"summary.json and arms.png in [bold]{directory}[/]")


def check_same_comparison(directory: Path, config: ExperimentConfig) -> None:
    """Refuses to go on under another configuration: arms that are done would not be like the others.

    Raises:
        ValueError: A field differs that changes what an arm is or how it is scored.
    """
    check_resumed_config(directory, config)
    before = json.loads((directory / RECORD_FILE).read_text(encoding="utf-8"))["config"]
    for section, now in (("train", config.train), ("eval", config.eval)):
        for key, value in json.loads(json.dumps(asdict(now))).items():
            if before[section][key] != value:
                raise ValueError(
                    f"{section}.{key} must be that of the comparison that is resumed ({before[section][key]!r}), got "
                    f"{value!r}; set it back or start a new one under another run.name"
                )


def summarise(config: ExperimentConfig, directory: Path, *, seconds: float) -> Summary:
    """The summary of all arms, from their files alone."""
    results = {
        arm: json.loads((directory / arm / RESULT_FILE).read_text()) for arm in (*TRAINED, "base_full", "base_window")
    }
    scores = {arm: results[arm if arm in results else "pte"][arm] for arm in SCORED}
    reward = results["pte"]["reward"]
    arms = {
        arm: ArmScore(
            accuracy=one["accuracy"],
            ci95=(one["ci95"][0], one["ci95"][1]),
            peak_cache_bytes=one["peak_cache_bytes"],
            seconds=results[arm]["seconds"] if arm in results else one["seconds"],
        )
        for arm, one in scores.items()
    }
    low, high = arms["lora_window"].accuracy, arms["lora_full"].accuracy
    rows = [row for arm in TRAINED for row in read_metrics(directory / arm / "metrics.jsonl")]
    warm = json.loads((directory / "pte" / WARM_START_FILE).read_text())
    return Summary(
        commit=commit(),
        hardware=hardware(),
        seconds=seconds,
        window_tokens=config.cache.window_tokens,
        evict_tokens=config.cache.evict_tokens,
        trace_tokens=10 * config.task.num_statements + 4 if config.task.kind == "chained" else None,
        heldout_problems=scores["pte"]["problems"],
        distill_steps=config.distill.steps,
        grpo_steps=config.train.steps,
        max_logprob_gap=max(gap for (gap,) in numbers(rows, "logprob_gap_max")),
        gap_closed=(arms["pte"].accuracy - low) / (high - low) if high > low else None,
        warm_start_accuracy=warm["accuracy"]["accuracy"],
        warm_start_reward=warm["reward"]["accuracy"],
        warm_start_reward_ci95=(warm["reward"]["ci95"][0], warm["reward"]["ci95"][1]),
        final_reward=reward["accuracy"],
        final_reward_ci95=(reward["ci95"][0], reward["ci95"][1]),
        arms=arms,
    )


def arms_table(summary: Summary) -> Table:
    """The table that ends the main job."""
    table = Table(
        title=f"window {summary.window_tokens} tokens, traces {summary.trace_tokens} tokens, "
        f"{summary.heldout_problems} held-out problems"
    )
    for header in ("arm", "accuracy", "95 % interval", "cache", "wall time"):
        table.add_column(header, justify="left" if header == "arm" else "right")
    for name, arm in summary.arms.items():
        low, high = arm.ci95
        table.add_row(
            name,
            f"{100 * arm.accuracy:.1f} %",
            f"{100 * low:.1f} to {100 * high:.1f}",
            f"{arm.peak_cache_bytes / 2**20:.2f} MiB",
            f"{arm.seconds:.0f} s",
        )
    closed = "no gap" if summary.gap_closed is None else f"{100 * summary.gap_closed:.0f} %"
    table.caption = (
        f"gap from LoRA_c to full-cache LoRA closed by PTE: {closed}; GRPO moved PTE's sampled reward from "
        f"{summary.warm_start_reward:.3f} to {summary.final_reward:.3f}; largest gap between rollout and replay "
        f"{summary.max_logprob_gap:.1e} nats; {summary.seconds:.0f} s"
    )
    return table
