"""An evidence run from beginning to end: its directory, what is left to do, the jobs.

Decides: that a part whose file is there is done, that a run goes on where it was, also on another day and at another
commit (each part names its own). Does not know what is measured.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from pte.checkpoint_files import installed_versions
from pte.evidence.levels import BASES
from pte.evidence.measurements import part_file
from pte.evidence.parts import (
    RUNS,
    BasePart,
    CostPart,
    TrainedPart,
    base_metrics,
    run_base,
    run_cost,
    run_scored,
    run_trained,
)
from pte.evidence.plan import Part, PresetName, plan
from pte.jobs import Job, run_jobs
from pte.run_record import commit, hardware, replace_synced
from pte.tasks.base_training import is_complete
from pte.tasks.bases import RECIPES

RECORD_FILE = "record.json"


def run_evidence(
    preset: PresetName,
    directory: Path,
    *,
    only: tuple[str, ...],
    workers: int | None,
    minutes: float | None,
    console: Console,
    progress: Progress,
) -> list[str]:
    """Runs the parts of a preset that are not done yet.

    Args:
        preset: What is measured.
        directory: Of the run; made, or gone on with.
        only: Beginnings of part names; empty for all parts. Bases that these wait for are made as well.
        workers: Processes at once, one CPU thread each; None for one per core.
        minutes: After which no further part starts; None for no limit.
        console: For lines of progress.
        progress: For the bars.

    Returns:
        Names of the parts that are left.

    Raises:
        ValueError: The directory belongs to another preset, `only` names no part, `workers` is below 1 or `minutes`
            below 0.
    """
    started = time.perf_counter()
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}; leave it out for one per core")
    if minutes is not None and not minutes >= 0:
        raise ValueError(f"minutes must be 0 or above, got {minutes}; leave it out for no limit")
    parts = plan(preset, directory)
    unknown = [prefix for prefix in only if not any(part.name.startswith(prefix) for part in parts)]
    if unknown:
        raise ValueError(
            f"only must be the beginning of a part's name, got {unknown[0]!r}; use for example {parts[0].name!r}"
        )
    record_run(preset, directory)
    named = [part for part in parts if not only or part.name.startswith(only)]
    wanted = {name for part in named for name in (part.name, part.after)}
    chosen = [part for part in parts if part.name in wanted]
    left = parts_left(chosen, directory)
    jobs = [job_of(part, directory) for part in left]
    done = len(chosen) - len(jobs)
    console.print(f"evidence {preset} in [bold]{directory}[/]: {done} of {len(chosen)} parts done")
    return run_jobs(
        jobs,
        workers=workers or os.cpu_count() or 1,
        console=console,
        progress=progress,
        last_start=None if minutes is None else started + 60 * minutes,
    )


def parts_left(chosen: Sequence[Part], directory: Path) -> list[Part]:
    """Parts that are not done, and the bases that these wait for and that are not there.

    A base may have gone where its part's file is: weights stay on the machine that made them.

    Args:
        chosen: Parts, each after the base that it waits for.
        directory: Of the run.
    """
    undone = {part.name for part in chosen if not part_file(directory, part.name).is_file()}
    waited_for = {part.after for part in chosen if part.name in undone}

    def gone(part: Part) -> bool:
        return (
            isinstance(part, BasePart)
            and part.name in waited_for
            and not is_complete(directory / BASES / part.base, RECIPES[part.base].settings)
        )

    return [part for part in chosen if part.name in undone or gone(part)]


def job_of(part: Part, directory: Path) -> Job:
    """A part as a job."""
    if isinstance(part, TrainedPart):
        steps = part.config.distill.steps + part.config.train.steps
        metrics = directory / RUNS / part.name / "metrics.jsonl"
        return Job(part.name, run_trained, (part, directory), steps=steps, metrics=metrics, after=part.after)
    if isinstance(part, BasePart):
        steps = RECIPES[part.base].settings.steps
        return Job(part.name, run_base, (part, directory), steps=steps, metrics=base_metrics(directory, part))
    work: Callable[..., None] = run_cost if isinstance(part, CostPart) else run_scored
    return Job(part.name, work, (part, directory), after=part.after)


def record_run(preset: PresetName, directory: Path) -> None:
    """Writes record.json: what runs, where, with which versions.

    Raises:
        ValueError: The directory belongs to another preset.
    """
    path = directory / RECORD_FILE
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        if before.get("preset") != preset:
            raise ValueError(
                f"the directory must be of preset {preset!r}, got {str(directory)!r} of {before.get('preset')!r}; "
                f"set another --directory"
            )
    directory.mkdir(parents=True, exist_ok=True)
    record = {
        "preset": preset,
        "commit": commit(),
        "versions": {"python": platform.python_version(), **installed_versions()},
        "hardware": hardware(),
    }
    replace_synced(path, json.dumps(record, indent=2).encode())
