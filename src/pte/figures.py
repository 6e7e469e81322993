"""Figures of a run, as PNG: learning curves, and the arms of the main job.

Decides: what is drawn. Everything comes from files of a run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {
    "base_full": "#9aa5b1",
    "base_window": "#cbd2d9",
    "lora_full": "#4c78a8",
    "lora_window": "#f58518",
    "pte": "#2a9d5c",
    "pte_zeroed": "#b7dfc6",
    "pte_shuffled": "#86c79f",
}
LABELS = {
    "base_full": "base\nfull cache",
    "base_window": "base\nwindow",
    "lora_full": "LoRA\nfull cache",
    "lora_window": "LoRA\nwindow",
    "pte": "PTE\nwindow",
    "pte_zeroed": "PTE\nstate zeroed",
    "pte_shuffled": "PTE\nstate shuffled",
}


def read_metrics(path: str | Path) -> list[dict[str, float | str | None]]:
    """The rows of a metrics.jsonl."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def learning_curve(metrics: str | Path, output: str | Path) -> None:
    """Loss of the warm start, reward of the GRPO stage, and the gap between rollout and replay.

    Args:
        metrics: A run's metrics.jsonl.
        output: PNG.
    """
    from matplotlib.figure import Figure

    rows = read_metrics(metrics)
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    loss, reward, gap = figure.subplots(1, 3)
    draw_series(loss, [row for row in rows if row["stage"] == "distill"], "loss", title="warm start: loss per token")
    grpo = [row for row in rows if row["stage"] == "grpo"]
    draw_series(reward, grpo, "reward", title="GRPO: mean reward of the rollouts")
    draw_series(gap, grpo, "logprob_gap_max", title="rollout to replay: largest gap, nats")
    if grpo:
        gap.set_yscale("log")
    figure.savefig(output, dpi=150)


def draw_series(axes: Axes, rows: Sequence[Mapping[str, float | str | None]], key: str, *, title: str) -> None:
    """A metric over steps, with its running mean."""
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("step")
    axes.spines[["top", "right"]].set_visible(False)
    points = [(float(row["step"] or 0), float(row[key] or 0)) for row in rows if row.get(key) is not None]
    if not points:
        axes.text(0.5, 0.5, "not run", ha="center", va="center", transform=axes.transAxes, color="#9aa5b1")
        return
    steps, values = zip(*points, strict=True)
    axes.plot(steps, values, color="#b7dfc6", linewidth=1)
    width = max(1, len(values) // 20)
    means = [sum(values[max(0, end - width) : end]) / min(width, end) for end in range(1, len(values) + 1)]
    axes.plot(steps, means, color="#2a9d5c", linewidth=1.8)


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
    arms: Mapping[str, ArmResult], curves: Mapping[str, str | Path], output: str | Path, *, subtitle: str
) -> None:
    """Accuracy of every arm with its interval, cache bytes below it, and the reward of the GRPO stage.

    Args:
        arms: By name.
        curves: metrics.jsonl of the trained arms, by name.
        output: PNG.
        subtitle: One line on the setting.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.5, 1])
    figure.suptitle(subtitle, fontsize=10)
    for place, (name, arm) in enumerate(arms.items()):
        low, high = arm.ci95
        left.bar(place, 100 * arm.accuracy, color=COLOURS[name], width=0.75)
        below, above = max(0.0, arm.accuracy - low), max(0.0, high - arm.accuracy)
        left.errorbar(place, 100 * arm.accuracy, yerr=[[100 * below], [100 * above]], color="#323f4b", capsize=3)
        left.text(place, 100 * high + 1.5, f"{100 * arm.accuracy:.1f}", ha="center", fontsize=9)
    names = [f"{LABELS[name]}\n{arm.peak_cache_bytes / 2**20:.1f} MiB" for name, arm in arms.items()]
    left.set_xticks(range(len(arms)), names, fontsize=8)
    left.set_ylim(0, 110)
    left.set_ylabel("answers right, % (held-out)")
    left.spines[["top", "right"]].set_visible(False)
    for name, path in curves.items():
        rows = [row for row in read_metrics(path) if row["stage"] == "grpo"]
        rewards = [float(row["reward"] or 0) for row in rows]
        width = max(1, len(rewards) // 12)
        means = [sum(rewards[max(0, end - width) : end]) / min(width, end) for end in range(1, len(rewards) + 1)]
        right.plot(range(1, len(rewards) + 1), rewards, color=COLOURS[name], alpha=0.25, linewidth=1)
        right.plot(range(1, len(means) + 1), means, color=COLOURS[name], label=LABELS[name].replace("\n", ", "))
    right.set_xlabel("GRPO step")
    right.set_ylabel("mean reward of the rollouts")
    right.set_ylim(-0.03, 1.05)
    right.spines[["top", "right"]].set_visible(False)
    right.legend(frameon=False, fontsize=8)
    figure.savefig(output, dpi=150)
