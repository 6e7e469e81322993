"""What every section of the report is made of, and the form that several questions share: a metric over a condition.

Decides: the parts of a section, what is said of its intervals.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pte.report import style
from pte.report.figures import Scale, line_figure, panel_title
from pte.report.measurements import Measurement, grouped, of_metric
from pte.report.statistics import estimate
from pte.report.tables import NOTHING, Table, arm_name, pivot

if TYPE_CHECKING:
    from pte.report.style import DrawnFigure


@dataclass(frozen=True)
class Section:
    """A part of the report.

    Args:
        name: Of its anchor.
        title: Heading.
        question: What is asked, a sentence or two.
        findings: Sentences that follow from the numbers.
        figures: In order.
        tables: In order.
    """

    name: str
    title: str
    question: str
    findings: tuple[str, ...] = ()
    figures: tuple[DrawnFigure, ...] = ()
    tables: tuple[Table, ...] = ()


def by_arm(measurements: Sequence[Measurement]) -> list[Measurement]:
    """The same, arms in their order."""
    order = style.ordered(one.arm for one in measurements)
    return sorted(measurements, key=lambda one: order.index(one.arm))


def interval_note(measurements: Sequence[Measurement], key: Callable[[Measurement], Hashable]) -> str:
    """A sentence on what the brackets are."""
    estimates = [estimate(group) for group in grouped(measurements, key).values()]
    kinds = {one.interval for one in estimates} - {"none"}
    if not kinds:
        return ""
    totals = sorted({one.total for one in estimates if one.total})
    answers = (
        ""
        if not totals
        else f" of {totals[0]} answers"
        if len(totals) == 1
        else f" of {totals[0]} to {totals[-1]} answers"
    )
    names = {
        "t over seeds": "Student's t over the seeds",
        "Wilson": f"Wilson's{answers} (one seed, or seeds that agree)",
    }
    return f"Brackets: 95 % intervals, {'; '.join(names[kind] for kind in sorted(kinds))}."


def over_condition(
    measurements: Sequence[Measurement],
    *,
    name: str,
    scale: Scale,
    caption: str,
    column_label: str,
    beside: Sequence[Measurement] = (),
) -> tuple[tuple[DrawnFigure, ...], tuple[Table, ...]]:
    """A figure and a table for each metric over a condition of the setting, lines for arms, panels for the rest.

    Args:
        measurements: All with the condition in their setting.
        name: Of the figures.
        scale: The condition.
        caption: Of the figures, first sentences.
        column_label: What the columns of the tables are.
        beside: Measurements without the condition, which get a column for each metric.
    """
    figures, tables = [], []
    hidden = [scale.key, *([scale.mark] if scale.mark else [])]
    metrics = list(dict.fromkeys(one.metric for one in measurements))
    for metric in metrics:
        found = by_arm(of_metric(measurements, metric))
        several = f"-{metric}" if len(metrics) > 1 else ""
        figures.append(
            line_figure(
                found,
                name=style.file_name(f"{name}{several}"),
                metric=metric,
                scale=scale,
                panel=lambda one: panel_title(one, *hidden),
                line=lambda one: one.arm,
                caption=caption,
            )
        )
        for title, group in grouped(found, lambda one: panel_title(one, *hidden)).items():
            shown = spread({one.number(scale.key) for one in group})
            tables.append(
                pivot(
                    [one for one in group if one.number(scale.key) in shown],
                    title=f"{title}: {style.metric_label(metric)} by {column_label}",
                    names=[("arm", arm_name)],
                    column=lambda one: one.number(scale.key),
                    column_label=lambda value: scale.shown(float(str(value))),
                    more=whole_rows([one for one in beside if panel_title(one, *hidden) == title]),
                    note=interval_note(group, lambda one: (one.arm, one.setting)),
                )
            )
    return tuple(figures), tuple(tables)


def whole_rows(beside: Sequence[Measurement]) -> list[tuple[str, Callable[[Sequence[Measurement]], str]]]:
    """Columns of a table whose rows are arms: one for each metric that has no place in the other columns."""

    def column(metric: str) -> tuple[str, Callable[[Sequence[Measurement]], str]]:
        by_arm = grouped(of_metric(beside, metric), lambda one: one.arm)

        def read(row: Sequence[Measurement]) -> str:
            found = by_arm.get(row[0].arm)
            return NOTHING if found is None else style.shown_estimate(metric, estimate(found))

        return style.metric_label(metric), read

    return [column(metric) for metric in dict.fromkeys(one.metric for one in beside)]


def spread(values: Iterable[float], *, at_most: int = 9) -> list[float]:
    """All of a few values; of many, some that are spread over them, both ends among them."""
    values = sorted(values)
    if len(values) <= at_most:
        return values
    return [values[round(place * (len(values) - 1) / (at_most - 1))] for place in range(at_most)]
