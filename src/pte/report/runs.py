"""Runs as the report sees them: what their files hold, and a sentence for whatever is missing.

Decides: what kind of run a directory is, which files are read, and that a half or a broken run is shown as far as it
goes. Reads JSON alone; does not know figures.

Kinds: `train` (metrics.jsonl), `compare` (arms in directories of their own), `evidence` (parts/*.json).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pte.report.completions import read_rollouts
from pte.report.measurements import Measurement, parse_measurement

if TYPE_CHECKING:
    from pte.checkpoint_files import Json

RunKind = Literal["train", "compare", "evidence"]
Row = Mapping[str, "Json"]


@dataclass(frozen=True)
class Arm:
    """One policy that was trained or scored: a train run, or an arm of a comparison.

    Args:
        name: Of the arm, or of the run.
        task: Kind of its task.
        seed: Of the run.
        metrics: Rows of metrics.jsonl.
        evaluations: Scores by arm (a control of the state is an arm of its own) or by set.
        warm_start: Scores between the stages; empty where they were not taken.
        rollouts: Objects of rollouts.json.
    """

    name: str
    task: str
    seed: int
    metrics: tuple[Row, ...] = ()
    evaluations: Mapping[str, Row] = field(default_factory=dict)
    warm_start: Row = field(default_factory=dict)
    rollouts: tuple[Row, ...] = ()


@dataclass(frozen=True)
class Part:
    """A part of an evidence run.

    Args:
        name: Of the part.
        seconds: Wall time.
        commit: Of the checkout that measured it.
        measurements: What was found.
        hardware: Of the machine that measured it; None where the part does not say.
        versions: Of what measured it, likewise.
    """

    name: str
    seconds: float
    commit: str | None
    measurements: tuple[Measurement, ...]
    hardware: Json = None
    versions: Json = None


@dataclass(frozen=True)
class RecordedRun:
    """A run directory.

    Args:
        path: As the user wrote it.
        kind: Of the run.
        record: record.json; empty where it is missing.
        arms: Of a train run one, of an evidence run none.
        parts: Of an evidence run.
        summary: summary.json; empty where it is missing.
        rollouts: Of an evidence run, by name of the file.
        notes: Sentences on what is missing or broken.
        told_apart: A name, where the report has another comparison of another configuration; else empty.
    """

    path: str
    kind: RunKind
    record: Row
    arms: tuple[Arm, ...] = ()
    parts: tuple[Part, ...] = ()
    summary: Row = field(default_factory=dict)
    rollouts: Mapping[str, tuple[Row, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    told_apart: str = ""

    @property
    def name(self) -> str:
        """Of the directory."""
        return Path(self.path).resolve().name

    def option(self, section: str, key: str) -> Json:
        """A field of the recorded configuration; None where there is none."""
        config = self.record.get("config")
        values = config.get(section) if isinstance(config, Mapping) else None
        return values.get(key) if isinstance(values, Mapping) else None


def read_run(path: str) -> RecordedRun:
    """A run directory, as far as it goes.

    Raises:
        FileNotFoundError: There is no such directory.
        ValueError: Nothing in it was written by a run.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise FileNotFoundError(f"a run must be a directory that a command wrote, got {path!r}; check the path")
    notes: list[str] = []
    record = read_object(directory / "record.json", notes)
    if (directory / "parts").is_dir() or "preset" in record:
        return read_evidence(path, record, notes)
    if (directory / "metrics.jsonl").is_file() or (record and not any(arm_directories(directory))):
        return read_train(path, record, notes)
    if any(arm_directories(directory)):
        return read_compare(path, record, notes)
    half = f" ({notes[0].removesuffix('.')})" if (directory / "record.json").is_file() and notes else ""
    raise ValueError(
        f"a run directory must hold record.json, metrics.jsonl, arms or parts, got {path!r} with none of them{half}; "
        f"name a directory that pte train, pte compare or pte evidence wrote"
    )


def arm_directories(directory: Path) -> Iterator[Path]:
    """Directories of a comparison's arms, by name."""
    for child in sorted(directory.iterdir()):
        if child.name.startswith(".") or not child.is_dir():
            continue
        if any((child / name).is_file() for name in ("record.json", "metrics.jsonl", "result.json")):
            yield child


def read_train(path: str, record: Row, notes: list[str]) -> RecordedRun:
    """One policy's run."""
    directory = Path(path)
    summary = read_object(directory / "summary.json", notes, otherwise="the run has not ended, or not yet")
    evaluations = objects_of(summary.get("evaluations"))
    run = RecordedRun(path, "train", record)
    arm = Arm(
        name=directory.resolve().name,
        task=str(run.option("task", "kind") or "unknown task"),
        seed=seed_of(run),
        metrics=read_lines(directory / "metrics.jsonl", notes),
        evaluations=evaluations,
        rollouts=read_rollouts(directory / "rollouts.json", notes),
    )
    return RecordedRun(path, "train", record, arms=(arm,), summary=summary, notes=tuple(notes))


def read_compare(path: str, record: Row, notes: list[str]) -> RecordedRun:
    """A comparison and its arms."""
    directory = Path(path)
    run = RecordedRun(path, "compare", record)
    summary = read_object(directory / "summary.json", notes, otherwise="the comparison has not ended")
    arms = []
    for child in arm_directories(directory):
        result = read_object(child / "result.json", notes, otherwise=f"arm {child.name} has not ended")
        trained = (child / "metrics.jsonl").is_file()
        arms.append(
            Arm(
                name=child.name,
                task=str(run.option("task", "kind") or "unknown task"),
                seed=seed_of(run),
                metrics=read_lines(child / "metrics.jsonl", notes) if trained else (),
                evaluations={key: value for key, value in objects_of(result).items() if key != "reward"},
                warm_start=read_object(child / "warm_start.json", []),
                rollouts=read_rollouts(child / "rollouts.json", notes),
            )
        )
    return RecordedRun(path, "compare", record, arms=tuple(arms), summary=summary, notes=tuple(notes))


def read_evidence(path: str, record: Row, notes: list[str]) -> RecordedRun:
    """An evidence run: those of its parts that are there."""
    directory = Path(path)
    parts = []
    for file in sorted(json_files(directory / "parts"), key=natural):
        content = read_object(file, notes)
        rows = content.get("measurements")
        if not isinstance(rows, list):
            if content:
                notes.append(f"{file}: it has no list of measurements; measure this part again.")
            continue
        question = str(content.get("question", file.stem))
        found = read_measurements(rows, question=question, where=str(file), notes=notes)
        seconds, commit = content.get("seconds"), content.get("commit")
        parts.append(
            Part(
                name=str(content.get("part", file.stem)),
                seconds=float(seconds) if isinstance(seconds, (int, float)) else 0.0,
                commit=None if commit is None else str(commit),
                measurements=found,
                hardware=content.get("hardware"),
                versions=content.get("versions"),
            )
        )
    if not parts:
        notes.append(f"{path}: no part of this evidence run has been measured yet.")
    rollouts = {file.stem: read_rollouts(file, notes) for file in sorted(json_files(directory / "rollouts"))}
    return RecordedRun(path, "evidence", record, parts=tuple(parts), rollouts=rollouts, notes=tuple(notes))


def read_measurements(
    rows: Sequence[object], *, question: str, where: str, notes: list[str]
) -> tuple[Measurement, ...]:
    """Those of a part that are whole; a note for the others."""
    found, without_value, broken = [], 0, []
    for number, row in enumerate(rows, start=1):
        try:
            one = parse_measurement(row, question=question, where=f"{where}, measurement {number}")
        except ValueError as error:
            broken.append(str(error))
            continue
        if one is None:
            without_value += 1
        else:
            found.append(one)
    if without_value:
        notes.append(f"{where}: {without_value} of {len(rows)} measurements have no value.")
    if broken:
        notes.append(f"{broken[0]} ({len(broken)} of {len(rows)} measurements left out).")
    return tuple(found)


def json_files(directory: Path) -> Iterator[Path]:
    """Its JSON files but for hidden ones, which are half written."""
    return (file for file in directory.glob("*.json") if not file.name.startswith("."))


def natural(file: Path) -> list[tuple[int, str]]:
    """Sorts names with numbers by the numbers: 4 before 16."""
    words = re.split(r"(\d+)", file.stem)
    return [(int(word), "") if word.isdigit() else (0, word) for word in words]


def read_object(path: Path, notes: list[str], *, otherwise: str = "what it would say is left out") -> Row:
    """The object of a JSON file; empty, with a note, where the file is missing or not whole."""
    if not path.is_file():
        notes.append(f"{path} is missing: {otherwise}.")
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        notes.append(f"{path} is not whole ({' '.join(str(error).split())}): {otherwise}.")
        return {}
    if not isinstance(content, dict):
        notes.append(f"{path} is no JSON object: {otherwise}.")
        return {}
    return content


def read_lines(path: Path, notes: list[str]) -> tuple[Row, ...]:
    """The rows of a JSONL file; a line that is not whole ends it, with a note."""
    if not path.is_file():
        notes.append(f"{path} is missing: there are no learning curves.")
        return ()
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("no JSON object")
        except ValueError:
            notes.append(f"{path}, line {number} is not whole: the curves end before it.")
            break
        rows.append(row)
    return tuple(rows)


def objects_of(value: object) -> dict[str, Row]:
    """The entries of an object that are objects with an accuracy."""
    if not isinstance(value, Mapping):
        return {}
    return {str(key): one for key, one in value.items() if isinstance(one, Mapping) and "accuracy" in one}


def seed_of(run: RecordedRun) -> int:
    """The seed of a run; 0, the default, where it is not recorded."""
    seed = run.option("run", "seed")
    return seed if isinstance(seed, int) else 0


def numbers(rows: Iterable[Row], *keys: str) -> Iterator[tuple[float, ...]]:
    """The given numbers of each row that has them all."""
    for row in rows:
        found = [row.get(key) for key in keys]
        if all(isinstance(one, (int, float)) for one in found):
            yield tuple(float(one) for one in found)  # type: ignore[arg-type]
