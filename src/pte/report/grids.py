"""Figures of measurements that fill an area: matrices of two conditions, and stacked parts of the wall time.

Decides: how they are drawn, and in which order and colour the parts of a step come.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from pte.report import style
from pte.report.figures import interval_words, legend
from pte.report.measurements import Measurement, grouped, sort_key
from pte.report.statistics import Estimate, estimate

if TYPE_CHECKING:
    from matplotlib.artist import Artist

    from pte.report.style import DrawnFigure


def matrix_figure(
    groups: Mapping[str, Sequence[Measurement]], *, name: str, metric: str, keys: tuple[str, str], caption: str
) -> DrawnFigure:
    """A metric over two conditions, a matrix for each group, the numbers in the cells.

    Args:
        groups: Measurements of one metric, by title.
        name: Of the figure.
        metric: Its name.
        keys: Conditions down and across.
        caption: First sentences.
    """
    down, across = keys
    every = [one for group in groups.values() for one in group]
    rows, columns = (sorted({str(one.at(key)) for one in every}, key=sort_key) for key in keys)
    unit = style.unit_of(metric, max(abs(one.value) for one in every))
    top = 1.0 if style.is_percent(metric) else max(one.value for one in every)
    seen: list[Estimate] = []
    with style.look():
        figure, axes = style.panels(len(groups), height=1.0 + 0.42 * len(rows))
        for place, (title, group) in zip(axes, groups.items(), strict=True):
            place.set_title(title)
            cells = {
                key: estimate(found)
                for key, found in grouped(group, lambda o: (str(o.at(down)), str(o.at(across)))).items()
            }
            seen += cells.values()
            values = [
                [cells[row, column].mean if (row, column) in cells else float("nan") for column in columns]
                for row in rows
            ]
            place.imshow(values, cmap="Blues", vmin=0, vmax=top * 1.15 or 1, aspect="auto")
            for (row, column), one in cells.items():
                place.text(
                    columns.index(column),
                    rows.index(row),
                    f"{one.mean / unit.scale:.1f}" if unit.name == "%" else style.number(one.mean / unit.scale),
                    ha="center",
                    va="center",
                    color="#ffffff" if one.mean > 0.6 * top else "#1d2734",
                )
            place.grid(visible=False)
            place.set_xticks(range(len(columns)), [style.label(one) for one in columns], rotation=20)
            place.set_yticks(range(len(rows)), [style.label(one) for one in rows])
            place.set_xlabel(across.replace("_", " "))
            place.set_ylabel(down.replace("_", " "))
    percent = f", {unit.name}" if unit.name else ""
    return style.DrawnFigure(
        name, figure, f"{caption} Cells: {style.metric_label(metric)}{percent}. {interval_words(seen)}"
    )


BREAKDOWN = (
    "prefill_seconds",
    "decode_seconds",
    "rollout_seconds",
    "fold_seconds",
    "read_seconds",
    "reward_seconds",
    "replay_seconds",
    "forward_seconds",
    "backward_seconds",
    "optimizer_seconds",
    "other_seconds",
)
"""Parts that exclude each other. Seconds of another name may be a total, such as `step_seconds`."""

PART_COLOURS = {
    "prefill_seconds": "#9fd0f0",
    "decode_seconds": "#56b4e9",
    "rollout_seconds": "#56b4e9",
    "fold_seconds": "#d55e00",
    "read_seconds": "#e69f00",
    "reward_seconds": "#aab3bd",
    "replay_seconds": "#00705a",
    "forward_seconds": "#009e73",
    "backward_seconds": "#00705a",
    "optimizer_seconds": "#7d8896",
    "other_seconds": "#d3d9df",
}


def breakdown_metrics(metrics: Iterable[str]) -> list[str]:
    """The parts of a step's wall time among metrics, in the order of a step; totals and unknown names are none."""
    found = set(metrics)
    return [metric for metric in BREAKDOWN if metric in found]


def stacked_figure(groups: Mapping[str, Sequence[Measurement]], *, name: str, caption: str) -> DrawnFigure:
    """Parts of the wall time as stacked bars, a bar for each arm, a panel for each group.

    Args:
        groups: Measurements of metrics of `BREAKDOWN`, by title.
        name: Of the figure.
        caption: First sentences.
    """
    parts = breakdown_metrics(one.metric for group in groups.values() for one in group)
    arms = {title: style.ordered(one.arm for one in group) for title, group in groups.items()}
    handles: dict[str, Artist] = {}
    with style.look():
        figure, axes = style.panels(len(groups), columns=2, height=0.6 + 0.32 * max(map(len, arms.values())))
        for place, (title, group) in zip(axes, groups.items(), strict=True):
            place.set_title(title)
            seconds = {
                key: estimate(one).mean for key, one in grouped(group, lambda one: (one.arm, one.metric)).items()
            }
            unit = style.unit_of("seconds", max(seconds.values()))
            for y, arm in enumerate(arms[title]):
                left = 0.0
                for part in parts:
                    if (arm, part) in seconds:
                        width = seconds[arm, part] / unit.scale
                        tint = PART_COLOURS[part]
                        handles[part] = place.barh(y, width, left=left, height=0.62, color=tint, edgecolor="none")[0]
                        left += width
            place.set_ylim(len(arms[title]) - 0.4, -0.6)
            place.set_yticks(range(len(arms[title])), [style.label(arm) for arm in arms[title]])
            place.set_xlabel(f"wall time, {unit.name}")
            place.grid(axis="y", visible=False)
        legend(figure, {style.metric_label(part): handles[part] for part in parts})
    return style.DrawnFigure(name, figure, caption)
