"""Rows of measurements and the file that keeps them: what was measured is on disk before the next row begins.

Decides: what makes two rows the same measurement (part, arm, batch, window, tokens), that a row measured by this
commit is not measured again, and that a row without a measurement says why. One file holds one model on one device;
parts run one by one into the same file add up. Does not know what is measured.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

Json = str | int | float | bool | None | Mapping[str, "Json"] | list["Json"]
Part = Literal["rollout", "long", "update", "step", "kernels", "float8"]
Values = dict[str, Json]


class NotMeasured(Exception):
    """Why a row has no measurement: something is not installed, does not fit, or took the time of others."""


@dataclass(frozen=True)
class Case:
    """One measurement.

    Args:
        part: Of the benchmark.
        arm: What is measured.
        batch: Sequences; for arms that take as many as fit, 0.
        window_tokens: Reasoning tokens kept; None for the full cache.
        tokens: Completion tokens; None where the row holds for every length.
    """

    part: Part
    arm: str
    batch: int
    window_tokens: int | None = None
    tokens: int | None = None

    @property
    def work(self) -> int:
        """What the time of measuring grows with: tokens, and for bounded rollouts the window, which is filled first."""
        if self.part in ("rollout", "long", "kernels", "float8") and self.window_tokens is not None:
            return self.window_tokens
        return self.tokens or 1

    @property
    def label(self) -> str:
        """The case in words."""
        words = [self.arm, f"batch {self.batch}" if self.batch else "largest batch"]
        words += [] if self.window_tokens is None else [f"window {self.window_tokens}"]
        words += [] if self.tokens is None else [f"{self.tokens} tokens"]
        return f"{self.part}: {', '.join(words)}"


def number_in(values: Json, *names: str) -> float | None:
    """A number by its path of names; None where there is none."""
    for name in names:
        values = values.get(name) if isinstance(values, Mapping) else None
    return float(values) if isinstance(values, int | float) else None


def first_line(error: BaseException) -> str:
    """An error in one line: its kind, and the first line of its text."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


@dataclass(frozen=True)
class Row:
    """What became of a case.

    Args:
        case: The measurement.
        commit: Of the code that measured; None where it is not known.
        values: Readings by name, empty without a measurement.
        not_measured: Why there is none.
        failed: The reason is an error that nobody expected.
    """

    case: Case
    commit: str | None
    values: Values
    not_measured: str | None = None
    failed: bool = False

    def number(self, *names: str) -> float | None:
        """A reading, by its path of names; None where there is none."""
        return number_in(self.values, *names)

    def to_json(self) -> Values:
        """The row as one flat object."""
        reason: Values = {} if self.not_measured is None else {"not_measured": self.not_measured, "failed": self.failed}
        return {**asdict(self.case), "commit": self.commit, **reason, **self.values}

    @classmethod
    def from_json(cls, fields: Mapping[str, Json]) -> Row:
        """The row that `to_json` wrote."""
        values = dict(fields)
        case = Case(**{name: values.pop(name) for name in Case.__dataclass_fields__})  # type: ignore[arg-type]
        commit, reason, failed = (values.pop(name, None) for name in ("commit", "not_measured", "failed"))
        return cls(case, commit, values, reason, bool(failed))  # type: ignore[arg-type]


class RowBook:
    """All rows of one model on one device, in the order in which they were first measured.

    Args:
        path: Of the file; None keeps the rows in memory alone.
        header: What the file says beside its rows.
        identity: Names in the header that a file must share with this run to be added to.

    Raises:
        ValueError: The file is of something else.
    """

    def __init__(self, path: Path | None, *, header: Values, identity: tuple[str, ...]) -> None:
        self.path = path
        self.header = header
        self.rows: dict[Case, Row] = {}
        self.parts: dict[str, Json] = {}
        if path is not None and path.exists():
            self.read(path, identity)

    def read(self, path: Path, identity: tuple[str, ...]) -> None:
        """Takes over the rows of an earlier run."""
        remedy = "use another file, or delete this one"
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"output must hold one JSON object, {str(path)!r} does not ({error}); {remedy}") from None
        for name in identity:
            found = kept.get(name) if isinstance(kept, dict) else None
            if found != self.header[name]:
                raise ValueError(
                    f"output must hold rows of {name} {self.header[name]!r}, {str(path)!r} is of {found!r}; {remedy}"
                )
        self.rows = {row.case: row for row in map(Row.from_json, kept["rows"])}
        self.parts = dict(kept["parts"])

    @property
    def commit(self) -> str | None:
        """Of the code that measures."""
        commit = self.header["commit"]
        return commit if isinstance(commit, str) else None

    def has(self, case: Case) -> bool:
        """True when this commit has measured the case already."""
        row = self.rows.get(case)
        return row is not None and row.not_measured is None and row.commit == self.commit

    def add(self, row: Row) -> None:
        """Keeps a row, in place of an earlier one of the same case."""
        self.rows[row.case] = row
        self.save()

    def save(self) -> None:
        """Writes the file, whole or not at all."""
        if self.path is None:
            return
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(self.to_json(), indent=2) + "\n", encoding="utf-8")
        temporary.replace(self.path)

    def to_json(self) -> Values:
        """Header, parts and rows."""
        return {**self.header, "parts": self.parts, "rows": [row.to_json() for row in self.rows.values()]}
