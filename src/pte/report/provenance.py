"""Where numbers come from: the facts at the top of a report, and the tables of runs and parts at its end.

Decides: what a run is said to have been made by. A part of an evidence run names its own machine and versions, as a run
may go on elsewhere; where it does not, those of the run's record stand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pte.report import style
from pte.report.derived import measurements_of
from pte.report.measurements import Measurement, seeds_of
from pte.report.tables import NOTHING, Table

if TYPE_CHECKING:
    from pte.report.runs import RecordedRun

COMMIT_LETTERS = 10


def facts(runs: Sequence[RecordedRun], measurements: Sequence[Measurement]) -> tuple[tuple[str, str], ...]:
    """What stands at the top."""
    found: list[tuple[str, str]] = []
    if measurements:
        seeds = seeds_of(measurements)
        found.append(("seeds", ", ".join(map(str, seeds)) if len(seeds) <= 6 else f"{len(seeds)} seeds"))
        found.append(("tasks", ", ".join(sorted({one.task for one in measurements}))))
        found.append(("arms and rules", str(len({one.arm for one in measurements}))))
        found.append(("measurements", f"{len(measurements):,}"))
    parts = [part for run in runs for part in run.parts]
    if parts:
        found.append(
            ("parts, time measured", f"{len(parts)}, {style.shown('seconds', sum(part.seconds for part in parts))}")
        )
    commits = sorted({short(commit) for run in runs for commit in commits_of(run)})
    if commits:
        found.append(("commit", ", ".join(commits)))
    machines = sorted({machine for run in runs for machine in machines_of(run)})
    if machines:
        found.append(("hardware", "; ".join(machines)))
    return tuple(found)


def commits_of(run: RecordedRun) -> list[str]:
    """Commits that a run and its parts were measured at."""
    named = [run.record.get("commit"), *(part.commit for part in run.parts)]
    return list(dict.fromkeys(str(commit) for commit in named if commit))


def machines_of(run: RecordedRun) -> list[str]:
    """Machines that a run's parts were measured on; where a part does not say, or there is none, that of the run."""
    recorded = run.record.get("hardware")
    named = [part.hardware or recorded for part in run.parts] or [recorded]
    return list(dict.fromkeys(words for one in named if (words := hardware_words(one))))


def versions_of(run: RecordedRun) -> list[str]:
    """Versions that a run's parts were measured with, likewise."""
    recorded = run.record.get("versions")
    named = [part.versions or recorded for part in run.parts] or [recorded]
    texts = (", ".join(f"{name} {one}" for name, one in each.items()) for each in named if isinstance(each, Mapping))
    return list(dict.fromkeys(filter(None, texts)))


def seeds_in(run: RecordedRun) -> list[int]:
    """Seeds of its arms, of an evidence run those that something was measured at."""
    return seeds_of(measurements_of([run])) or sorted({arm.seed for arm in run.arms})


def short(commit: str) -> str:
    """A commit as readers quote it; `-dirty` stays."""
    base, dash, rest = commit.partition("-")
    return base[:COMMIT_LETTERS] + dash + rest


def hardware_words(hardware: object) -> str:
    """A machine as text."""
    if not isinstance(hardware, Mapping):
        return str(hardware) if hardware else ""
    words = []
    if hardware.get("cpu"):
        cores = hardware.get("cores")
        words.append(f"{cores} cores of {hardware['cpu']}" if cores else str(hardware["cpu"]))
    memory = hardware.get("memory_bytes")
    if isinstance(memory, (int, float)):
        words.append(style.shown("bytes", memory))
    gpus = hardware.get("gpus")
    if isinstance(gpus, list) and gpus:
        words.append(", ".join(map(str, gpus)))
    elif isinstance(gpus, list):
        words.append("no GPU")
    return ", ".join(words)


def command_of(run: RecordedRun) -> str:
    """What made a run: as it is recorded, else as its kind says."""
    recorded = run.record.get("command")
    if recorded:
        return str(recorded)
    preset = run.record.get("preset")
    return f"pte {run.kind}" + (f" --preset {preset}" if preset else "")


def provenance(runs: Sequence[RecordedRun]) -> list[Table]:
    """Runs, and the parts of evidence runs."""
    rows = []
    for run in runs:
        rows.append(
            (
                run.path,
                command_of(run),
                ", ".join(map(short, commits_of(run))) or NOTHING,
                "; ".join(machines_of(run)) or NOTHING,
                ", ".join(map(str, seeds_in(run))) or NOTHING,
                "; ".join(versions_of(run)) or NOTHING,
            )
        )
    tables = [Table("Runs", ("run", "command", "commit", "hardware", "seeds", "versions"), tuple(rows), names=6)]
    parts = [
        (
            part.name,
            f"{len(part.measurements):,}",
            style.shown("seconds", part.seconds),
            short(part.commit or NOTHING),
        )
        for run in runs
        for part in run.parts
    ]
    if parts:
        tables.append(Table("Parts", ("part", "measurements", "wall time", "commit"), tuple(parts)))
    return tables
