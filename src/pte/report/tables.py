"""Tables of text: what the page and the Markdown file show of measurements.

Decides: how measurements become rows and columns. Does not know HTML.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pte.report import style
from pte.report.measurements import grouped, sort_key
from pte.report.statistics import estimate

if TYPE_CHECKING:
    from pte.report.measurements import Measurement

NOTHING = "-"


@dataclass(frozen=True)
class Table:
    """Rows of text under a title.

    Args:
        title: What is compared.
        columns: Headers.
        rows: As many cells each.
        names: Leading columns that hold names, not numbers.
        note: A sentence below, or empty.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    names: int = 1
    note: str = ""

    def markdown(self) -> str:
        """A pipe table."""

        def line(cells: Sequence[str]) -> str:
            return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

        rules = ["---" if place < self.names else "---:" for place in range(len(self.columns))]
        lines = [f"**{self.title}**", "", line(self.columns), line(rules), *map(line, self.rows)]
        return "\n".join(lines + (["", self.note] if self.note else []))


def pivot(
    measurements: Sequence[Measurement],
    *,
    title: str,
    names: Sequence[tuple[str, Callable[[Measurement], str]]],
    column: Callable[[Measurement], object],
    column_label: Callable[[object], str],
    more: Sequence[tuple[str, Callable[[Sequence[Measurement]], str]]] = (),
    note: str = "",
) -> Table:
    """Estimates in a grid: a row for each combination of names, a column for each value of a condition.

    Args:
        measurements: Of one metric.
        title: Of the table.
        names: Headers of the leading columns, with what stands in them.
        column: Condition across.
        column_label: Header of its column.
        more: Headers of columns after the names, with what a whole row says there.
        note: Below the table.
    """
    across = sorted({column(one) for one in measurements}, key=lambda key: sort_key(str(key)))
    rows = []
    for key, group in grouped(measurements, lambda one: tuple(read(one) for _, read in names)).items():
        cells = grouped(group, column)
        shown = [
            style.shown_estimate(group[0].metric, estimate(cells[place])) if place in cells else NOTHING
            for place in across
        ]
        rows.append((*key, *(read(group) for _, read in more), *shown))
    columns = (*(header for header, _ in names), *(header for header, _ in more), *map(column_label, across))
    return Table(title, columns, tuple(rows), names=len(names), note=note)


def means_table(
    measurements: Sequence[Measurement],
    *,
    title: str,
    names: Sequence[tuple[str, Callable[[Measurement], str]]],
    metrics: Sequence[str],
    more: Sequence[tuple[str, Callable[[Sequence[Measurement]], str]]] = (),
    note: str = "",
) -> Table:
    """A row for each combination of names, a column for each metric.

    Args:
        measurements: Of several metrics.
        title: Of the table.
        names: Headers of the leading columns, with what stands in them.
        metrics: Across, in order.
        more: Headers of columns at the end, with what a whole row says there.
        note: Below the table.
    """
    rows = []
    for key, group in grouped(measurements, lambda one: tuple(read(one) for _, read in names)).items():
        cells = grouped(group, lambda one: one.metric)
        shown = [
            style.shown_estimate(metric, estimate(cells[metric])) if metric in cells else NOTHING for metric in metrics
        ]
        rows.append((*key, *shown, *(read(group) for _, read in more)))
    columns = (*(header for header, _ in names), *map(style.metric_label, metrics), *(header for header, _ in more))
    return Table(title, columns, tuple(rows), names=len(names), note=note)


def arm_name(one: Measurement) -> str:
    """The label of its arm."""
    return style.label(one.arm)


def stage_name(one: Measurement) -> str:
    """How it had learned."""
    return style.STAGES.get(one.stage, one.stage)
