"""Curves of training: metrics over steps, reward over wall time and tokens.

Decides: which metrics of a run are drawn and how noisy lines are read (a running mean over a twentieth of the steps).
Draws from the rows of metrics.jsonl and from measurements of the question `rl`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pte.report import style
from pte.report.figures import legend
from pte.report.measurements import Measurement, grouped, of_metric, seeds_of
from pte.report.runs import Row, numbers
from pte.report.statistics import estimate, interpolated, running_mean

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

    from pte.report.style import DrawnFigure

PANELS = (
    ("distill", "loss", "warm start: loss", "nats a token"),
    ("grpo", "reward", "GRPO: mean reward", "reward"),
    ("grpo", "accuracy", "GRPO: accuracy of the rollouts", "right, %"),
    ("grpo", "logprob_gap_max", "largest gap, rollout to replay", "nats, log scale"),
    ("grpo", "entropy", "entropy of the policy", "nats a token"),
    ("grpo", "completion_tokens", "length of the completions", "tokens"),
)
SMOOTHED = 20
GRID = 80
RL_AXES = (("seconds", "wall time of GRPO, min", 60.0), ("tokens", "tokens sampled, thousands", 1e3))


def learning_figure(rows: Mapping[str, Sequence[Row]], *, name: str) -> DrawnFigure | None:
    """Loss, reward, accuracy, gap, entropy and length over steps, a line for each run; None without a row.

    Args:
        rows: Of metrics.jsonl, by name of the run or arm.
        name: Of the figure.
    """
    drawn = [panel for panel in PANELS if any(points_of(one, panel[0], panel[1]) for one in rows.values())]
    if not drawn:
        return None
    tint = style.colours(rows)
    handles: dict[str, Artist] = {}
    with style.look():
        figure, axes = style.panels(len(drawn), height=2.2)
        for place, (stage, metric, title, unit) in zip(axes, drawn, strict=True):
            place.set_title(title)
            place.set_xlabel("step")
            place.set_ylabel(unit)
            scale = 100.0 if style.is_percent(metric) else 1.0
            values: list[float] = []
            for run in style.ordered(rows):
                points = points_of(rows[run], stage, metric)
                if points:
                    handles[style.label(run)] = draw_noisy(place, [(x, scale * y) for x, y in points], colour=tint[run])
                    values += [scale * y for _, y in points]
            limit(place, metric, values)
        legend(figure, {key: handles[key] for key in map(style.label, style.ordered(rows)) if key in handles})
    steps = max(len(one) for one in rows.values())
    return style.DrawnFigure(
        name,
        figure,
        f"Metrics of every step (faint) and their running mean over a twentieth of the steps (bold); up to {steps} "
        f"steps, one seed a line, no interval. The gap is that between the log-probs recorded while sampling and "
        f"those that the update differentiates.",
    )


def points_of(rows: Sequence[Row], stage: str, metric: str) -> list[tuple[float, float]]:
    """(step, value) of a stage."""
    return [(x, y) for x, y in numbers([row for row in rows if row.get("stage") == stage], "step", metric)]


def draw_noisy(axes: Axes, points: Sequence[tuple[float, float]], *, colour: str) -> Artist:
    """Values, faint, under their running mean; returns what stands in the legend."""
    xs, ys = zip(*points, strict=True)
    axes.plot(xs, ys, color=colour, alpha=0.28, linewidth=0.9)
    (line,) = axes.plot(xs, running_mean(ys, len(ys) // SMOOTHED), color=colour, marker="o" if len(xs) == 1 else None)
    return line


def limit(axes: Axes, metric: str, values: Sequence[float]) -> None:
    """Limits that do not exaggerate: rates from 0, gaps on a logarithmic scale."""
    if metric == "logprob_gap_max" and values and min(values) > 0:
        axes.set_yscale("log")
    elif metric == "accuracy":
        axes.set_ylim(-4, 104)
    elif metric == "reward" and values and min(values) >= 0 and max(values) <= 1:
        axes.set_ylim(-0.04, 1.04)
    elif metric in ("entropy", "completion_tokens") and values:
        axes.set_ylim(0, 1.12 * max(values) or 1)


def rl_figure(measurements: Sequence[Measurement], *, name: str, caption: str) -> DrawnFigure | None:
    """Metrics of GRPO against wall time and against tokens: a row for each metric, a line for each arm.

    With several seeds the line is their mean at equal abscissae, as far as all seeds reach, and the band its 95 %
    interval; one seed shows its steps, faint, and their running mean.

    Args:
        measurements: Of one task, with `seconds` or `tokens` in their setting.
        name: Of the figure.
        caption: First sentences.
    """
    metrics = list(dict.fromkeys(one.metric for one in measurements))
    kinds = [kind for kind in RL_AXES if any(one.at(kind[0]) is not None for one in measurements)]
    if not kinds:
        return None
    arms = style.ordered(one.arm for one in measurements)
    tint = style.colours(arms)
    handles: dict[str, Artist] = {}
    with style.look():
        figure, axes = style.panels(len(metrics) * len(kinds), columns=len(kinds), height=2.3)
        for index, place in enumerate(axes):
            metric, (key, text, divisor) = metrics[index // len(kinds)], kinds[index % len(kinds)]
            scale = 100.0 if style.is_percent(metric) else 1.0
            place.set_title(style.metric_label(metric))
            place.set_ylabel(
                "%"
                if scale > 1
                else "nats"
                if metric.startswith("logprob_gap")
                else "reward"
                if metric == "reward"
                else ""
            )
            place.set_xlabel(text)
            values: list[float] = []
            for arm in arms:
                found = [one for one in of_metric(measurements, metric) if one.arm == arm and one.at(key) is not None]
                if found:
                    handles[style.label(arm)] = draw_arm(
                        place, found, key=key, divisor=divisor, scale=scale, colour=tint[arm]
                    )
                    values += [scale * one.value for one in found]
            limit(place, metric, values)
        legend(figure, handles)
    seeds = {len(seeds_of(group)) for group in grouped(measurements, lambda one: one.arm).values()}
    several = "the mean over seeds with its 95 % t interval" if max(seeds) > 1 else "one seed, no interval"
    words = f"{min(seeds)}" if min(seeds) == max(seeds) else f"{min(seeds)} to {max(seeds)}"
    return style.DrawnFigure(
        name,
        figure,
        f"{caption} n: {words} seed{'s' if max(seeds) > 1 else ''} an arm; lines: {several}; bold is a running mean "
        f"over a twentieth of the steps.",
    )


def draw_arm(
    axes: Axes, measurements: Sequence[Measurement], *, key: str, divisor: float, scale: float, colour: str
) -> Artist:
    """One arm's curve; returns what stands in the legend."""
    by_seed = {
        seed: sorted((one.number(key), one.value) for one in group)
        for seed, group in grouped(measurements, lambda one: one.seed).items()
    }
    if len(by_seed) == 1:
        (points,) = by_seed.values()
        return draw_noisy(axes, [(x / divisor, scale * y) for x, y in points], colour=colour)
    smooth = {
        seed: [
            (x, y)
            for (x, _), y in zip(points, running_mean([y for _, y in points], len(points) // SMOOTHED), strict=True)
        ]
        for seed, points in by_seed.items()
    }
    first, last = max(points[0][0] for points in smooth.values()), min(points[-1][0] for points in smooth.values())
    grid = [first + (last - first) * step / (GRID - 1) for step in range(GRID)] if last > first else [first]
    columns = {seed: interpolated(points, grid) for seed, points in smooth.items()}
    example = measurements[0]
    means = [
        estimate([seeded(example, seed, column[place]) for seed, column in columns.items()])
        for place in range(len(grid))
    ]
    xs = [x / divisor for x in grid]
    lows = [scale * (one.mean if one.low is None else one.low) for one in means]
    highs = [scale * (one.mean if one.high is None else one.high) for one in means]
    axes.fill_between(xs, lows, highs, color=colour, alpha=0.16, linewidth=0)
    (line,) = axes.plot(xs, [scale * one.mean for one in means], color=colour)
    return line


def seeded(example: Measurement, seed: int, value: float) -> Measurement:
    """A point of a seed's curve as a measurement."""
    return Measurement(example.question, example.task, example.arm, example.stage, seed, (), example.metric, value)


def learning_curve(metrics: str | Path, output: str | Path, *, name: str = "pte") -> None:
    """The learning curves of one run as PNG.

    Args:
        metrics: Its metrics.jsonl.
        output: PNG.
        name: Of the run.
    """
    drawn = learning_figure({name: read_metrics(metrics)}, name="curve")
    if drawn is not None:
        Path(output).write_bytes(drawn.png())


def read_metrics(path: str | Path) -> list[Row]:
    """The rows of a metrics.jsonl."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
