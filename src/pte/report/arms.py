"""The figure that ends a comparison: accuracy of every arm with its interval, and the reward of the GRPO stage.

Decides: how scores that are already summed up (an accuracy and its interval, no seeds) are drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pte.report import style
from pte.report.curves import draw_noisy, limit, points_of
from pte.report.figures import draw_dot
from pte.report.statistics import Estimate

if TYPE_CHECKING:
    from pte.report.runs import Row


class ArmResult(Protocol):
    """What the figure shows of an arm."""

    @property
    def accuracy(self) -> float:
        """A fraction."""
        ...

    @property
    def ci95(self) -> tuple[float, float]:
        """Its 95 % interval."""
        ...

    @property
    def peak_cache_bytes(self) -> int:
        """Keys and values of all slots."""
        ...


def compare_figure(
    arms: Mapping[str, ArmResult], curves: Mapping[str, Sequence[Row]], output: str | Path, *, subtitle: str
) -> None:
    """Accuracy of every arm with its interval and cache bytes, and the reward of the GRPO stage, as PNG.

    Args:
        arms: By name.
        curves: Rows of metrics.jsonl of the trained arms, by name.
        output: PNG.
        subtitle: One line on the setting.
    """
    from matplotlib.figure import Figure

    tint = style.colours(arms)
    with style.look():
        figure = Figure(figsize=(11, 3.8), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=[1.5, 1])
        figure.suptitle(subtitle, fontsize=10)
        for place, (name, arm) in enumerate(arms.items()):
            one = Estimate(arm.accuracy, *arm.ci95, seeds=1, interval="Wilson")
            draw_dot(left, one, y=place, unit=style.Unit(0.01, "%"), colour=tint[name], marker="o")
            left.annotate(
                f"{100 * arm.accuracy:.1f}",
                (100 * arm.accuracy, place),
                xytext=(0, 7),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
        names = [
            f"{style.label(name)}, {style.shown('cache_bytes', arm.peak_cache_bytes)}" for name, arm in arms.items()
        ]
        left.set_yticks(range(len(arms)), names)
        left.set_ylim(len(arms) - 0.4, -0.7)
        left.set_xlim(-4, 104)
        left.set_xlabel("answers right on held-out problems, % (95 % intervals)")
        for name, rows in curves.items():
            points = points_of(rows, "grpo", "reward")
            if points:
                draw_noisy(right, points, colour=tint[name])
        limit(right, "reward", [value for rows in curves.values() for _, value in points_of(rows, "grpo", "reward")])
        right.set_xlabel("step")
        right.set_ylabel("mean reward of the rollouts (GRPO)")
    Path(output).write_bytes(style.DrawnFigure("arms", figure, subtitle).png())
