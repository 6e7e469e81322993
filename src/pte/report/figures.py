"""Figures of measurements: points with intervals, and lines over a condition.

Decides: how each kind of comparison is drawn. Which one answers which question is decided in `sections`. Axes carry
units, every line has a marker of its own, shades and whiskers are 95 % intervals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pte.report import style
from pte.report.measurements import Measurement, Value, grouped, sort_key, words
from pte.report.statistics import Estimate, estimate

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pte.report.style import DrawnFigure, Unit


WIDE = 50


@dataclass(frozen=True)
class Scale:
    """The horizontal axis of a line figure.

    Args:
        key: Condition of the setting.
        label: With its unit.
        base: Of a logarithmic axis; None for a linear one.
        reference: A horizontal line at this value, or None.
        mark: Condition of the setting at which a vertical line stands, or None.
        log_values: Draw values on a logarithmic axis where they span more than a factor of 50.
        zero: What 0 means on a logarithmic axis, where it stands apart from the line.
    """

    key: str
    label: str
    base: int | None = None
    reference: float | None = None
    mark: str | None = None
    log_values: bool = False
    zero: str = "0"

    def shown(self, value: float) -> str:
        """A value of the condition as text."""
        if value == 0 and self.base is not None:
            return self.zero
        return f"{value:,.0f}" if value.is_integer() else f"{value:g}"


def interval_words(estimates: Iterable[Estimate]) -> str:
    """A sentence on seeds and intervals, for captions."""
    estimates = list(estimates)
    seeds = sorted({one.seeds for one in estimates})
    count = f"{seeds[0]} seed{'s' if seeds[0] > 1 else ''}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]} seeds"
    totals = sorted({one.total for one in estimates if one.total})
    answers = ""
    if totals:
        answers = f", {totals[0]}" if len(totals) == 1 else f", {totals[0]} to {totals[-1]}"
        answers += " answers a point"
    kinds = {one.interval for one in estimates} - {"none"}
    if not kinds:
        why = "no interval from one seed" if seeds == [1] else "no interval: seeds agree, or there is one"
        return f"n: {count}{answers}; {why}."
    names = {"t over seeds": "Student's t over seeds", "Wilson": "Wilson's of the answers"}
    return f"n: {count}{answers}; 95 % intervals: {' or '.join(names[kind] for kind in sorted(kinds))}."


def finish_axis(axes: Axes, metric: str, unit: Unit, *, values: Sequence[float], vertical: bool = True) -> None:
    """Label and limits of the axis of values."""
    text = style.metric_label(metric) + (f", {unit.name}" if unit.name else "")
    (axes.set_ylabel if vertical else axes.set_xlabel)(text)
    limits = axes.set_ylim if vertical else axes.set_xlim
    if style.is_percent(metric) and all(0 <= value <= 1 for value in values):
        limits(-4, 104)
    elif values and min(values) >= 0 and max(values) < 30 * max(min(values), 1e-30):
        limits(0, 1.12 * max(values) / unit.scale or 1)


def legend(figure: Figure, handles: Mapping[str, Artist]) -> None:
    """One legend above all panels, in rows that fit."""
    if len(handles) > 1:
        columns = max(1, min(len(handles), 5, 130 // (max(map(len, handles)) + 6)))
        figure.legend(list(handles.values()), list(handles), loc="outside upper left", ncols=columns, columnspacing=1.4)


def line_figure(
    measurements: Sequence[Measurement],
    *,
    name: str,
    metric: str,
    scale: Scale,
    panel: Callable[[Measurement], str],
    line: Callable[[Measurement], Value],
    line_label: Callable[[Value], str] = lambda value: style.label(str(value)),
    caption: str,
) -> DrawnFigure:
    """A metric over a condition: a line for each arm (or each size), a panel for each rest of the setting.

    Args:
        measurements: Of one metric.
        name: Of the figure.
        metric: Its name.
        scale: Of the horizontal axis.
        panel: Title of the panel that a measurement is in.
        line: The line that it is on; numbers get ordered shades, names the colours of arms.
        line_label: Of a line.
        caption: First sentences; seeds and intervals are added.
    """
    by_panel = grouped(measurements, panel)
    lines = {line(one) for one in measurements}
    numeric = all(isinstance(one, (int, float)) for one in lines)
    order: list[Value] = sorted(lines, key=sort_key) if numeric else [*style.ordered(str(one) for one in lines)]
    with style.look():
        figure, axes = style.panels(len(by_panel))
        tints: dict[Value, str] = dict(zip(order, style.shades(len(order)), strict=True)) if numeric else {}
        tints = tints or {key: colour for key, colour in style.colours(str(one) for one in order).items()}
        unit = style.unit_of(metric, max((abs(one.value) for one in measurements), default=1))
        handles: dict[str, Artist] = {}
        seen: list[Estimate] = []
        for place, (title, group) in zip(axes, by_panel.items(), strict=True):
            place.set_title(title)
            curves = grouped(group, line)
            for key in order:
                found = next((curve for other, curve in curves.items() if str(other) == str(key)), None)
                if found is None:
                    continue
                points = curve_points(found, scale.key)
                seen += points.values()
                marker = style.MARKERS[order.index(key) % len(style.MARKERS)]
                apart = scale.base is not None and len(points) > 1
                zero = {x: one for x, one in points.items() if x == 0 and apart}
                if zero:
                    points = {x: one for x, one in points.items() if x != 0}
                    draw_alone(place, zero, unit=unit, colour=tints[key], marker=marker)
                handles[line_label(key)] = draw_curve(place, points, unit=unit, colour=tints[key], marker=marker)
            finish_line_panel(place, group, metric=metric, unit=unit, scale=scale)
        legend(figure, handles)
    return style.DrawnFigure(name, figure, f"{caption} {interval_words(seen)}")


def curve_points(measurements: Sequence[Measurement], key: str) -> dict[float, Estimate]:
    """The estimate at each value of a condition, ascending."""
    groups = grouped(measurements, lambda one: one.number(key))
    return {x: estimate(groups[x]) for x in sorted(groups)}


def draw_curve(axes: Axes, points: Mapping[float, Estimate], *, unit: Unit, colour: str, marker: str) -> Artist:
    """A line with its band; returns what stands in the legend."""
    xs = list(points)
    means = [one.mean / unit.scale for one in points.values()]
    lows = [(one.mean if one.low is None else one.low) / unit.scale for one in points.values()]
    highs = [(one.mean if one.high is None else one.high) / unit.scale for one in points.values()]
    every = max(1, len(xs) // 12)
    axes.fill_between(xs, lows, highs, color=colour, alpha=0.16, linewidth=0)
    (drawn,) = axes.plot(xs, means, color=colour, marker=marker, markevery=every, markeredgewidth=0)
    return drawn


def draw_alone(axes: Axes, points: Mapping[float, Estimate], *, unit: Unit, colour: str, marker: str) -> None:
    """Points with whiskers and no line."""
    for x, one in points.items():
        if one.low is not None and one.high is not None:
            axes.plot([x, x], [one.low / unit.scale, one.high / unit.scale], color=colour, linewidth=2.2, alpha=0.55)
        axes.plot([x], [one.mean / unit.scale], color=colour, marker=marker, linestyle="none", markeredgewidth=0)


def finish_line_panel(
    axes: Axes, measurements: Sequence[Measurement], *, metric: str, unit: Unit, scale: Scale
) -> None:
    """Axes and reference lines of a panel."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    xs = sorted({one.number(scale.key) for one in measurements})
    values = [one.value for one in measurements]
    finish_axis(axes, metric, unit, values=values)
    if scale.log_values and min(values) > 0 and max(values) > WIDE * min(values):
        axes.set_yscale("log")
    axes.set_xlabel(scale.label)
    if scale.base is not None and xs[0] >= 0 and xs[-1] > xs[0]:
        if xs[0] > 0:
            axes.set_xscale("log", base=scale.base)
        else:
            # Linear below the smallest value above 0, so that 0 has a place, for base 2 one step left of it.
            axes.set_xscale("symlog", base=scale.base, linthresh=xs[1], linscale=0.5)
            axes.set_xlim(-0.5 * xs[1], xs[-1] * 1.3)
        if len(xs) <= 9:
            axes.xaxis.set_major_locator(FixedLocator(xs))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: scale.zero if value == 0 else f"{value:g}"))
    if scale.reference is not None:
        axes.axhline(scale.reference / unit.scale, color=style.MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
    if scale.mark is not None:
        for mark in sorted({one.number(scale.mark) for one in measurements if one.at(scale.mark) is not None}):
            axes.axvline(mark, color=style.MUTED, linewidth=0.9, linestyle=(0, (1, 2)))


def dot_figure(
    groups: Mapping[str, Sequence[Measurement]],
    *,
    name: str,
    row: Callable[[Measurement], str],
    rows: Sequence[str],
    hue: Callable[[Measurement], str] | None = None,
    caption: str,
) -> DrawnFigure:
    """Points with intervals in the colour of their arm: a row for each arm or value, a panel for each group.

    Args:
        groups: Measurements of one metric each, by title of the panel.
        name: Of the figure.
        row: The row of a measurement.
        rows: From top to bottom.
        hue: What tells points of one row apart, by marker: stage or arm; None where nothing does.
        caption: First sentences.
    """
    hues = list(dict.fromkeys(hue(one) for group in groups.values() for one in group)) if hue is not None else [""]
    hues = [stage for stage in style.STAGES if stage in hues] or style.ordered(hues)
    tint = style.colours(one.arm for group in groups.values() for one in group)
    seen: list[Estimate] = []
    with style.look():
        figure, axes = style.panels(len(groups), height=0.5 + max(0.24, 0.17 * len(hues)) * len(rows))
        for index, (place, (title, group)) in enumerate(zip(axes, groups.items(), strict=True)):
            place.set_title(title)
            metric = group[0].metric
            unit = style.unit_of(metric, max(abs(one.value) for one in group))
            keys = grouped(group, lambda one: (row(one), "" if hue is None else hue(one), one.arm))
            reached = [one.value for one in group]
            for (at, told_by, arm), found in keys.items():
                beside = [one for one in hues if any(other[:2] == (at, one) for other in keys)]
                shift = (beside.index(told_by) - (len(beside) - 1) / 2) * 0.7 / max(2, len(hues))
                seen.append(one := estimate(found))
                reached += [] if one.high is None else [one.high]
                marker = style.MARKERS[hues.index(told_by) % len(style.MARKERS)]
                draw_dot(place, one, y=rows.index(at) + shift, unit=unit, colour=tint[arm], marker=marker)
            place.set_ylim(len(rows) - 0.4, -0.6)
            names = [style.label(one) for one in rows] if index % style.COLUMNS == 0 else [""] * len(rows)
            place.set_yticks(range(len(rows)), names)
            place.grid(axis="x", visible=False)
            finish_axis(place, metric, unit, values=reached, vertical=False)
        legend(figure, {style.STAGES.get(one, style.label(one)): hue_handle(one, hues, tint) for one in hues})
    return style.DrawnFigure(name, figure, f"{caption} {interval_words(seen)}")


def hue_handle(hue: str, hues: Sequence[str], tint: Mapping[str, str]) -> Artist:
    """What stands in the legend for a hue: its marker, in the colour of an arm or of no arm."""
    from matplotlib.lines import Line2D

    marker = style.MARKERS[hues.index(hue) % len(style.MARKERS)]
    return Line2D([], [], color=tint.get(hue, style.MUTED), marker=marker, markersize=5.5, linestyle="none")


def draw_dot(axes: Axes, one: Estimate, *, y: float, unit: Unit, colour: str, marker: str) -> Artist:
    """A mean and its interval in a row."""
    if one.low is not None and one.high is not None:
        axes.plot([one.low / unit.scale, one.high / unit.scale], [y, y], color=colour, linewidth=2.2, alpha=0.55)
    (drawn,) = axes.plot(
        [one.mean / unit.scale], [y], color=colour, marker=marker, markersize=5.5, linestyle="none", markeredgewidth=0
    )
    return drawn


def panel_title(one: Measurement, *without: str) -> str:
    """Task and what is left of the setting."""
    rest = words(one.without(*without))
    return f"{one.task}: {rest}" if rest else one.task
