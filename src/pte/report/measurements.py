"""The one unit of evidence: a number that was measured, with everything that says of what.

Decides: what a measurement is, how one is read from JSON, and how many of them are put into groups. Does not know which
questions, arms or metrics there are: any string is one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TypeVar

Value = float | int | str
CACHE_BYTES, STATE_BYTES = "cache_bytes", "state_bytes"
STOPPED = "stopped_at_step"
"""The metric of a training that ended early, as it was not sound."""
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Measurement:
    """One number.

    Args:
        question: What was asked, such as `arms` or `capacity`.
        task: On which problems.
        arm: Of which policy or rule.
        stage: How it had learned: `none`, `warm_start`, `grpo`, `both`.
        seed: Of the run.
        setting: Further conditions by name, in their order.
        metric: What the number means.
        value: The number.
        right: Right answers, where the value is a rate of answers.
        total: Answers; where several answer one problem, as many independent ones as are as uncertain.
    """

    question: str
    task: str
    arm: str
    stage: str
    seed: int
    setting: tuple[tuple[str, Value], ...]
    metric: str
    value: float
    right: int | None = None
    total: int | None = None

    def as_json(self) -> dict[str, object]:
        """A flat row, as `parse_measurement` reads it."""
        return {**asdict(self), "setting": dict(self.setting)}

    def at(self, key: str) -> Value | None:
        """A condition of the setting; None where it is not given."""
        return dict(self.setting).get(key)

    def number(self, key: str) -> float:
        """A condition that is a number.

        Raises:
            ValueError: It is missing or no number.
        """
        value = self.at(key)
        try:
            return float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"a measurement of {self.question!r} needs the number {key!r} in its setting, got "
                f"{dict(self.setting)!r}; write it when measuring"
            ) from error

    def without(self, *keys: str) -> tuple[tuple[str, Value], ...]:
        """The setting but for some conditions."""
        return tuple((key, value) for key, value in self.setting if key not in keys)


def parse_measurement(row: object, *, question: str, where: str) -> Measurement | None:
    """A measurement from its JSON object; None where its value is null or not finite (it could not be measured).

    Args:
        row: The object.
        question: Of the part that holds it, for rows that do not name one.
        where: File and place, for the error.

    Raises:
        ValueError: It is no such object.
    """
    try:
        if not isinstance(row, Mapping):
            raise TypeError("no JSON object")
        setting = row.get("setting") or {}
        value, right, total = row["value"], row.get("right"), row.get("total")
        if value is None or not math.isfinite(float(value)):
            return None
        return Measurement(
            question=str(row.get("question", question)),
            task=str(row["task"]),
            arm=str(row["arm"]),
            stage=str(row.get("stage", "none")),
            seed=int(row["seed"]),
            setting=tuple((str(key), plain_value(one)) for key, one in dict(setting).items()),
            metric=str(row["metric"]),
            value=float(value),
            right=None if right is None else int(right),
            total=None if total is None else int(total),
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"{where}: a measurement must have task, arm, seed, metric and a number as value, got {str(row)[:120]} "
            f"({type(error).__name__}: {error}); measure this part again"
        ) from error


def plain_value(value: object) -> Value:
    """A condition: a number as it is, anything else as text."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    return str(value)


def grouped(measurements: Iterable[Measurement], key: Callable[[Measurement], Key]) -> dict[Key, list[Measurement]]:
    """Measurements by a key, keys in the order in which they first come."""
    groups: dict[Key, list[Measurement]] = {}
    for one in measurements:
        groups.setdefault(key(one), []).append(one)
    return groups


def of_metric(measurements: Iterable[Measurement], metric: str) -> list[Measurement]:
    """Those of one metric."""
    return [one for one in measurements if one.metric == metric]


def sort_key(value: Value | None) -> tuple[int, str, float, str]:
    """Numbers, and texts that begin with one, by size; then words by letters, by a number at their end where equal."""
    text = str(value)
    beginning = re.match(r"[-+]?(\d+(\.\d*)?|\.\d+)(e[-+]?\d+)?(?![\w.])", text)
    if beginning:
        return (0, "", float(beginning.group()), text)
    ending = re.search(r"\d+$", text)
    return (1, text[: ending.start()], float(ending.group()), text) if ending else (1, text, -1.0, text)


def with_state_bytes(measurements: Sequence[Measurement]) -> list[Measurement]:
    """The same, with the bytes of the state in `cache_bytes` instead of beside them.

    A state's size depends on no seed: a seed without `state_bytes` gets those of another.
    """
    states = {about(one): one.value for one in measurements if one.metric == STATE_BYTES}
    return [
        replace(one, value=one.value + states.get(about(one), 0.0)) if one.metric == CACHE_BYTES else one
        for one in measurements
        if one.metric != STATE_BYTES
    ]


def state_bytes_note(measurements: Sequence[Measurement]) -> str:
    """A sentence on whether the cache of `with_state_bytes` holds the state; empty where no state was measured."""
    states = {about(one) for one in measurements if one.metric == STATE_BYTES}
    without = {about(one) for one in measurements if one.metric == CACHE_BYTES} - states
    if not states:
        return ""
    return "Cache: with the state's bytes" + (" where these were measured." if without else ".")


def about(one: Measurement) -> tuple[str, str, str, tuple[tuple[str, Value], ...]]:
    """What a measurement is of, but for its seed and metric."""
    return one.task, one.arm, one.stage, one.setting


def seeds_of(measurements: Iterable[Measurement]) -> list[int]:
    """The seeds, ascending."""
    return sorted({one.seed for one in measurements})


def words(setting: Sequence[tuple[str, Value]]) -> str:
    """A setting as text, such as `4 windows, rank 32` or `window of 16 tokens`."""
    parts = []
    for key, value in setting:
        name = key.replace("_", " ")
        shown = f"{value:g}" if isinstance(value, float) else str(value)
        numeric = isinstance(value, (int, float))
        if numeric and key.endswith("_tokens"):
            parts.append(f"{name.removesuffix(' tokens')} of {shown} tokens")
        elif numeric and key.endswith("s"):
            parts.append(f"{shown} {name[:-1] if value == 1 else name}")
        else:
            parts.append(f"{name} {shown}")
    return ", ".join(parts)
