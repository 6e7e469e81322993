"""What an evidence run writes down: what its numbers are about, and one JSON file per part.

A part's file appears when the part is done, whole or not at all. What a row holds: `pte.report.measurements`.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pte.checkpoint_files import installed_versions
from pte.report.measurements import Measurement
from pte.run_record import commit, hardware, replace_synced

if TYPE_CHECKING:
    from pte.checkpoint_files import Json

PARTS = "parts"
StageName = Literal["none", "warm_start", "grpo", "both"]


@dataclass(frozen=True)
class Label:
    """What a number is about.

    Args:
        question: Which question of the evidence it answers.
        task: Name of the task.
        arm: Which arm.
        stage: Which learning stages the arm went through.
        seed: Of the training.
        setting: What was varied, by name.
    """

    question: str
    task: str
    arm: str
    stage: StageName = "none"
    seed: int = 0
    setting: Mapping[str, float | str] = field(default_factory=dict)

    def measured(self, metric: str, value: float, *, right: int | None = None, total: int | None = None) -> Measurement:
        """A number about it.

        Args:
            metric: What was measured; units are in the name.
            value: The number.
            right: Right answers, where the number is a share of answers.
            total: Answers, likewise.
        """
        return Measurement(
            question=self.question,
            task=self.task,
            arm=self.arm,
            stage=self.stage,
            seed=self.seed,
            setting=tuple(self.setting.items()),
            metric=metric,
            value=value,
            right=right,
            total=total,
        )


@dataclass(frozen=True)
class Origin:
    """By which code and on which machine parts are measured; taken once, when the command starts."""

    commit: str | None = field(default_factory=commit)
    hardware: Mapping[str, Json] = field(default_factory=hardware)
    versions: Mapping[str, Json] = field(
        default_factory=lambda: {"python": platform.python_version(), **installed_versions()}
    )


def part_file(directory: Path, part: str) -> Path:
    """Where a part's measurements are written."""
    return directory / PARTS / f"{part}.json"


def write_part(
    directory: Path,
    part: str,
    measurements: Sequence[Measurement],
    *,
    seconds: float,
    origin: Origin,
    fingerprint: str,
) -> None:
    """Writes the measurements of a part that is done.

    Args:
        directory: Of the evidence run.
        part: Its name.
        measurements: In the order in which tables show them.
        seconds: Wall time of the part; of its last process alone where it was resumed.
        origin: Of the measurements.
        fingerprint: Of the part's settings.
    """
    path = part_file(directory, part)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"part": part, "seconds": round(seconds, 1), **asdict(origin), "fingerprint": fingerprint}
    rows = ",\n".join("  " + json.dumps(one.as_json()) for one in measurements)
    text = json.dumps(content, indent=1)[:-2] + f',\n "measurements": [\n{rows}\n ]\n}}\n'
    replace_synced(path, text.encode())
