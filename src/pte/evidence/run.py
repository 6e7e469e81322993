"""An evidence run from beginning to end: its directory, what is left to do, the jobs.

Decides: that a part whose file is there is done, that a run goes on where it was, also on another day and at another
commit (each part names its own). Does not know what is measured.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from pte.evidence.levels import BASES
from pte.evidence.measurements import Origin, part_file
from pte.evidence.parts import (
    RUNS,
    BasePart,
    Part,
    TrainedPart,
    base_metrics,
    fingerprint_of,
    run_part,
)
from pte.evidence.plan import PresetName, plan
from pte.jobs import Job, Outcome, run_jobs
from pte.run_record import replace_synced
from pte.tasks.base_training import is_complete
from pte.tasks.bases import RECIPES

RECORD_FILE = "record.json"
NAMED_PARTS = 3
"""Of many that are not as they should be."""


def run_evidence(
    preset: PresetName,
    directory: Path,
    *,
    only: tuple[str, ...],
    workers: int | None,
    minutes: float | None,
    console: Console,
    progress: Progress,
) -> Outcome:
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
        The parts that are left, and those that failed.

    Raises:
        ValueError: The directory belongs to another preset or is none, a part in it is damaged or of other settings,
            `only` names no part, `workers` is below 1 or `minutes` below 0.
    """
    directory = directory.resolve()
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
    origin = Origin()
    record_run(preset, directory, origin)
    named = [part for part in parts if not only or part.name.startswith(only)]
    wanted = {name for part in named for name in (part.name, part.after)}
    chosen = [part for part in parts if part.name in wanted]
    check_done(chosen, directory)
    jobs = [job_of(part, directory, origin) for part in parts_left(chosen, directory)]
    done = len(chosen) - len(jobs)
    console.print(f"evidence {preset} in [bold]{directory}[/]: {done} of {len(chosen)} parts done")
    return run_jobs(
        jobs,
        workers=workers or os.cpu_count() or 1,
        console=console,
        progress=progress,
        last_start=None if minutes is None else started + 60 * minutes,
        go_on=True,
    )


def check_done(chosen: Sequence[Part], directory: Path) -> None:
    """That the parts that are done are those of the plan.

    Raises:
        ValueError: A part's file is damaged, or of other settings.
    """
    other = []
    for part in chosen:
        path = part_file(directory, part.name)
        if not path.is_file():
            continue
        try:
            found = json.loads(path.read_text(encoding="utf-8"))["fingerprint"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"a part must be a JSON object with a fingerprint, got {path} ({type(error).__name__}: {error}); "
                f"delete it to measure the part again"
            ) from error
        if found != fingerprint_of(part, directory):
            other.append(part.name)
    if other:
        names = ", ".join(other[:NAMED_PARTS]) + (" ..." if len(other) > NAMED_PARTS else "")
        raise ValueError(
            f"parts must have been measured with the settings that they have now, got {len(other)} with others in "
            f"{directory} ({names}); delete their files in parts/ and runs/ to measure them again, or set another "
            f"--directory"
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


def job_of(part: Part, directory: Path, origin: Origin) -> Job:
    """A part as a job."""
    arguments = (part, directory, origin)
    if isinstance(part, TrainedPart):
        steps = part.config.distill.steps + part.config.train.steps
        metrics = directory / RUNS / part.name / "metrics.jsonl"
        return Job(part.name, run_part, arguments, steps=steps, metrics=metrics, after=part.after)
    if isinstance(part, BasePart):
        steps = RECIPES[part.base].settings.steps
        return Job(part.name, run_part, arguments, steps=steps, metrics=base_metrics(directory, part))
    return Job(part.name, run_part, arguments, after=part.after)


def record_run(preset: PresetName, directory: Path, origin: Origin) -> None:
    """Writes record.json: what runs, and where its latest command ran; each part has its own origin.

    Raises:
        ValueError: The directory belongs to another preset, or is none.
    """
    path = directory / RECORD_FILE
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"the directory must be one, got the file {str(directory)!r}; set another --directory")
    if path.is_file():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))["preset"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} must be a JSON object with a preset, got {type(error).__name__}: {error}; delete it, the "
                f"parts beside it stay"
            ) from error
        if before != preset:
            raise ValueError(
                f"the directory must be of preset {preset!r}, got {str(directory)!r} of {before!r}; "
                f"set another --directory"
            )
    directory.mkdir(parents=True, exist_ok=True)
    replace_synced(path, json.dumps({"preset": preset, **asdict(origin)}, indent=2).encode())
