"""The parts of an evidence run, each a piece of work for one process that ends with one JSON file.

Decides: what a part does: make a base (`BasePart`), score a base (`ScoredPart`), train an arm and score it in several
ways (`TrainedPart`), measure what an arm costs (`CostPart`). A part that was interrupted goes on from the last
checkpoint of its run. What is trained and scored: `plan.py`; how a policy is scored: `readings.py`.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pte.arms import arm_config
from pte.evidence.cost import measure_cost, memory_over_tokens
from pte.evidence.levels import BASE_PREFIX, BASES
from pte.evidence.measurements import Label, Origin, write_part
from pte.evidence.readings import Reading, read, show
from pte.learn.optimizer import TrainingStopped
from pte.learn.trainer import open_run, train
from pte.run_record import RECORD_FILE, replace_synced
from pte.session import open_session
from pte.tasks.base_training import RECORD_FILE as BASE_RECORD_FILE
from pte.tasks.bases import RECIPES, make_base

if TYPE_CHECKING:
    from pte.config import ExperimentConfig
    from pte.report.measurements import Measurement
    from pte.tasks.base_training import BaseStep

RUNS = "runs"
ROLLOUTS = "rollouts"
BETWEEN_FILE = "between.json"
FINGERPRINT_LETTERS = 16
LATER_SETTINGS = {"gradient_checkpointing": False}
"""Settings that came after parts were published, with the value that says what was done before there was a choice.

Where they have it, nothing else is measured than then: they are left out of the fingerprint, which stays as it was.
"""
CURVE_METRICS = ("reward", "accuracy", "logprob_gap_max", "completion_tokens", "entropy")


@dataclass(frozen=True)
class BasePart:
    """A base that is made here.

    Args:
        name: Of the part.
        base: Its recipe.
        after: Always None.
    """

    name: str
    base: str
    after: None = None


@dataclass(frozen=True)
class ScoredPart:
    """A base without an adapter, scored.

    Args:
        name: Of the part.
        readings: All of the same base.
        after: Name of the part that makes the base, or None for a shipped one.
    """

    name: str
    readings: tuple[Reading, ...]
    after: str | None = None


@dataclass(frozen=True)
class TrainedPart:
    """An arm, trained and scored.

    Args:
        name: Of the part.
        config: The PTE experiment.
        arm: How it is changed.
        readings: Scores in the end.
        between: Scores after the warm start, before GRPO.
        curve: What the curve of the GRPO stage is about; None for no curve.
        cost: What the cost of a training step is about; None not to report it.
        shown: Whether some completions of the first reading are kept for the report's viewer.
        after: Name of the part that makes the base, or None for a shipped one.
    """

    name: str
    config: ExperimentConfig
    arm: str
    readings: tuple[Reading, ...]
    between: tuple[Reading, ...] = ()
    curve: Label | None = None
    cost: Label | None = None
    shown: bool = False
    after: str | None = None


@dataclass(frozen=True)
class CostPart:
    """What one arm costs: a GRPO step on completions of one length, and memory by length.

    Args:
        name: Of the part.
        label: What the cost is about.
        config: The PTE experiment, which the label's arm changes; completions have `rollout.max_new_tokens` tokens.
        lengths: Completion tokens at which memory is measured.
        metrics: Which costs are kept; empty for all.
    """

    name: str
    label: Label
    config: ExperimentConfig
    lengths: tuple[int, ...] = ()
    metrics: tuple[str, ...] = ()
    after: str | None = None


Part = BasePart | ScoredPart | TrainedPart | CostPart


def run_part(part: Part, directory: Path, origin: Origin) -> None:
    """Measures a part and writes its file.

    Args:
        part: Of any kind.
        directory: Of the evidence run.
        origin: Of the command.
    """
    started = time.perf_counter()
    if isinstance(part, BasePart):
        measurements = base_measurements(part, directory)
    elif isinstance(part, ScoredPart):
        measurements = scored_measurements(part)
    elif isinstance(part, TrainedPart):
        measurements = trained_measurements(part, directory)
    else:
        measurements = cost_measurements(part)
    seconds = time.perf_counter() - started
    fingerprint = fingerprint_of(part, directory)
    write_part(directory, part.name, measurements, seconds=seconds, origin=origin, fingerprint=fingerprint)


def fingerprint_of(part: Part, directory: Path) -> str:
    """What changes when anything that a part is measured with does: its settings, and those of its base.

    Args:
        part: Of any kind.
        directory: Of the evidence run, which may be moved.
    """
    base = part.base if isinstance(part, BasePart) else (part.after or "").removeprefix(BASE_PREFIX)
    settings = {
        "part": asdict(part, dict_factory=decided),
        "base": asdict(RECIPES[base].settings) if base else None,
    }
    text = json.dumps(settings, sort_keys=True).replace(str(directory.resolve()), "")
    return hashlib.sha256(text.encode()).hexdigest()[:FINGERPRINT_LETTERS]


def decided(fields: list[tuple[str, object]]) -> dict[str, object]:
    """The fields of a dataclass without `LATER_SETTINGS` that have their old value."""
    return {name: value for name, value in fields if name not in LATER_SETTINGS or value != LATER_SETTINGS[name]}


def base_measurements(part: BasePart, directory: Path) -> list[Measurement]:
    """Makes a base in the run's directory, unless it is there; how often it is right."""
    folder = directory / BASES / part.base
    metrics = base_metrics(directory, part)
    metrics.parent.mkdir(parents=True, exist_ok=True)
    with metrics.open("w", encoding="utf-8", buffering=1) as lines:

        def write_step(step: BaseStep) -> None:
            lines.write(json.dumps({"stage": "base", **asdict(step)}) + "\n")

        make_base(part.base, folder, on_step=write_step)
    record = json.loads((folder / BASE_RECORD_FILE).read_text(encoding="utf-8"))
    measurements = []
    for row in record["accuracy"]:
        label = Label("bases", row["family"], "base_full", setting=row["shape"])
        right = round(row["right_fraction"] * row["problems"])
        measurements.append(label.measured("accuracy", row["right_fraction"], right=right, total=row["problems"]))
    about = Label("bases", part.base, "base_full")
    measurements.append(about.measured("parameters", record["parameters"]))
    measurements.append(about.measured("training_seconds", record["training_seconds"]))
    return measurements


def base_metrics(directory: Path, part: BasePart) -> Path:
    """Where the steps of a base's training are written."""
    return directory / RUNS / part.name / "metrics.jsonl"


def cost_measurements(part: CostPart) -> list[Measurement]:
    """What an arm costs."""
    config = arm_config(part.config, part.label.arm)
    costs = measure_cost(config)
    measurements = [part.label.measured(name, costs[name]) for name in part.metrics or costs if name in costs]
    for row in memory_over_tokens(config, part.lengths):
        label = replace(part.label, question="memory", setting={"tokens": row["tokens"]})
        measurements += [label.measured(name, value) for name, value in row.items() if name != "tokens"]
    return measurements


def scored_measurements(part: ScoredPart) -> list[Measurement]:
    """Scores of a base."""
    session = open_session(arm_config(part.readings[0].config, part.readings[0].label.arm))
    return [one for reading in part.readings for one in read(session, reading)]


def trained_measurements(part: TrainedPart, directory: Path) -> list[Measurement]:
    """Trains an arm, from its last checkpoint if it was interrupted, and scores it.

    A run that stops because loss, gradient or gap are not sound is a result: it is written down with its step.

    Raises:
        ValueError: What was begun has other settings.
    """
    own = directory / RUNS / part.name
    resume = (own / RECORD_FILE).is_file()
    settings = replace(part.config.run, name=part.name, output_dir=str(directory / RUNS), resume=resume)
    config = arm_config(replace(part.config, run=settings), part.arm)
    try:
        run = open_run(config)
    except ValueError as error:
        if not resume:
            raise
        raise ValueError(
            f"a part that goes on must have the settings that it was begun with; {error}; or delete {own} to begin "
            f"again"
        ) from error

    def between_stages(steps: int) -> None:
        if part.between and steps == config.distill.steps:
            rows = [one for reading in part.between for one in read(run.session, reading)]
            plain = [[one.metric, one.value, one.right, one.total] for one in rows]
            replace_synced(own / BETWEEN_FILE, json.dumps(plain).encode())

    # A run that was interrupted after the checkpoint between the stages, while it was being scored, is scored here.
    between_stages(run.done_steps)
    stopped: list[Measurement] = []
    try:
        train(run, on_step=lambda _, step, __: between_stages(step))
    except TrainingStopped as stop:
        print(f"{part.name}: {stop}", flush=True)
        stopped = [part.readings[0].label.measured("stopped_at_step", float(1 + len(metrics_rows(own))))]
    measurements = stopped or [one for reading in part.readings for one in read(run.session, reading)]
    if part.shown:
        show(run.session, part.readings[0], directory / ROLLOUTS / f"{part.name}.json")
    return [*between_measurements(part, own), *measurements, *curve(part, own), *costs(part, own)]


def between_measurements(part: TrainedPart, own: Path) -> list[Measurement]:
    """What was scored after the warm start, perhaps by an earlier process; nothing where the run did not get there."""
    path = own / BETWEEN_FILE
    if not path.is_file():
        return []
    rows = json.loads(path.read_text(encoding="utf-8"))
    each = len(rows) // len(part.between)
    return [
        part.between[index // each].label.measured(metric, value, right=right, total=total)
        for index, (metric, value, right, total) in enumerate(rows)
    ]


def curve(part: TrainedPart, own: Path) -> list[Measurement]:
    """The GRPO stage step by step: metrics against steps, seconds and sampled tokens."""
    if part.curve is None:
        return []
    measurements = []
    seconds = tokens = 0.0
    completions = part.config.train.prompts_per_step * part.config.train.group_size
    for row in metrics_rows(own, stage="grpo"):
        seconds += row["seconds"]
        tokens += row["completion_tokens"] * completions
        setting = {"step": row["step"], "seconds": round(seconds, 2), "tokens": tokens}
        label = replace(part.curve, setting={**part.curve.setting, **setting})
        measurements += [label.measured(name, row[name]) for name in CURVE_METRICS if row.get(name) is not None]
    return measurements


def costs(part: TrainedPart, own: Path) -> list[Measurement]:
    """What a training step took, the first ones left out; nothing where no step was finished."""
    rows = metrics_rows(own, stage="grpo") or metrics_rows(own, stage="distill")
    if part.cost is None or not rows:
        return []
    settled = sorted(row["seconds"] for row in rows[len(rows) // 10 :])
    return [part.cost.measured("step_seconds", settled[len(settled) // 2])]


def metrics_rows(own: Path, *, stage: str | None = None) -> list[dict[str, float]]:
    """Rows of a run's metrics, of one stage or of both; none before the first step."""
    path = own / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [row for row in map(json.loads, lines) if stage in (None, row["stage"])]
