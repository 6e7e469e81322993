"""The README's table of speed and memory, made of the baseline files and of nothing else.

Decides: its lines (one for each topic of `figures.py` that a file has measured, one for all that none has), and where
it stands: between two markers. Does not know how anything was measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from pte.bench.figures import FIGURES, Figure

BEGIN = "<!-- bench: made by scripts/bench_table.py from benchmarks/baselines -->"
END = "<!-- end of bench -->"


def bench_table(baselines: Mapping[str, Mapping[str, object]]) -> list[str]:
    """The table's lines.

    Args:
        baselines: What each file holds, by its path as the README shall link to it.
    """
    topics: dict[str, list[Figure]] = {}
    for figure in FIGURES:
        if figure.topic:
            topics.setdefault(figure.topic, []).append(figure)
    lines = ["| `pte bench` | measured | to meet | from |", "|---|---|---|---|"]
    missing = []
    for topic, figures in topics.items():
        measured = [line for path, kept in baselines.items() if (line := topic_line(topic, figures, path, kept))]
        lines += measured
        if not measured:
            missing += [f"`{figure.name}`" for figure in figures]
    if missing:
        lines.append(f"| {', '.join(missing)} | not measured | [meaning and targets](benchmarks/README.md) | |")
    return lines


def topic_line(topic: str, figures: list[Figure], path: str, kept: Mapping[str, object]) -> str | None:
    """A topic by the figures of one file; None when the file has none of them."""
    values = kept["figures"]
    assert isinstance(values, Mapping)
    found = [values.get(figure.name) for figure in figures]
    if all(value is None for value in found):
        return None
    texts = [shown(figure, value) for figure, value in zip(figures, found, strict=True)]
    targets = [figure.target for figure in figures if figure.target]
    return f"| {topic} | {' / '.join(texts)} | {' / '.join(targets)} | [{Path(path).stem}]({path}) |"


def shown(figure: Figure, value: object) -> str:
    """A figure with its unit."""
    if not isinstance(value, int | float):
        return "not measured"
    return f"{value:.4g} {figure.unit}".strip()


def read_baselines(root: Path) -> dict[str, Mapping[str, object]]:
    """All baseline files of a checkout, by their path from its root."""
    paths = sorted((root / "benchmarks" / "baselines").glob("*.json"))
    return {path.relative_to(root).as_posix(): json.loads(path.read_text(encoding="utf-8")) for path in paths}


def with_table(page: str, table: list[str]) -> str:
    """A page with the table between its markers.

    Raises:
        ValueError: The page does not have each marker once, the first one first.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise ValueError(f"the page must hold {BEGIN!r} and then {END!r}, each once; put them where the table belongs")
    return "\n".join([before + begin, *table, end + after])
