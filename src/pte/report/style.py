"""One look: what arms and metrics are called, in which order and colour they come, how numbers and figures look.

Decides: labels, order, colours (after Okabe and Ito, told apart by colour-blind readers, and by marker besides), units,
and how a figure becomes an SVG that follows the page's theme, or a PNG. Unknown names get a label and a colour too.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pte.report.measurements import sort_key

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pte.report.statistics import Estimate

INK, MUTED, LINE = "#1d2733", "#66727f", "#d9dfe5"
LABELS = {
    "base_full": "base, full cache",
    "base_window": "base, window",
    "lora_full": "LoRA, full cache",
    "lora_window": "LoRA, window (LoRA_c)",
    "lora_window_larger": "LoRA, window + state's bytes",
    "lora_random": "LoRA, random, + state's bytes",
    "lora_h2o": "LoRA, H2O, + state's bytes",
    "lora_rkv": "LoRA, R-KV, + state's bytes",
    "global_only": "global tokens only",
    "pte": "PTE",
    "pte_paper": "PTE, rule paper",
    "pte_read": "PTE, rule read",
    "pte_delta": "PTE, rule delta",
    "pte_zeroed": "PTE, state zeroed",
    "pte_shuffled": "PTE, state shuffled",
    "every token kept": "every token kept (computed)",
}
# What an arm that is not known above is called, and the known arm that it comes after.
FAMILIES = {"base": ("base", "base_window"), "lora": ("LoRA", "lora_rkv"), "pte": ("PTE", "pte_delta")}
COLOURS = {
    "base_full": "#7d8896",
    "base_window": "#aab3bd",
    "lora_full": "#0072b2",
    "lora_window": "#e69f00",
    "lora_window_larger": "#b37400",
    "lora_random": "#cc79a7",
    "lora_h2o": "#8f5fa8",
    "lora_rkv": "#5b4b9a",
    "global_only": "#56b4e9",
    "pte": "#009e73",
    "pte_paper": "#d55e00",
    "pte_read": "#84b819",
    "pte_delta": "#c2185b",
    "pte_zeroed": "#8a9a5b",
    "pte_shuffled": "#b3b04a",
    "every token kept": "#7d8896",
}
MORE_COLOURS = ("#0072b2", "#c2185b", "#e69f00", "#8f5fa8", "#56b4e9", "#b37400", "#cc79a7", "#5b4b9a", "#6b8e23")
COLUMNS = 3
MARKERS = "osD^vPX<>p*h"
STAGES = {"none": "not trained", "warm_start": "warm start", "grpo": "GRPO alone", "both": "warm start + GRPO"}
METRICS = {
    "accuracy": "accuracy",
    "reward": "mean reward",
    "logprob_gap_max": "largest gap, rollout to replay",
    "cache_bytes": "cache",
    "peak_bytes": "peak memory",
    "peak_memory_bytes": "peak memory",
    "seconds": "wall time",
    "evaluation_seconds": "evaluation",
    "completion_tokens": "completion length",
    "state_norm": "|S|, Frobenius norm",
    "read_norm": "|S| as it is read, Frobenius norm",
    "state_fraction": "state's share of the step",
    "rollout_state_fraction": "state's share of the rollout",
    "update_state_fraction": "state's share of the update",
    "answered_fraction": "answered",
    "loss": "loss",
    "entropy": "entropy",
}
BYTES = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))
COUNTS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
UNABRIDGED = 1e4
RC: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.labelsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "svg.fonttype": "path",
    "savefig.facecolor": "white",
}


@dataclass(frozen=True)
class Unit:
    """How values of a metric are shown.

    Args:
        scale: A value is divided by it.
        name: Of the unit; empty without one.
    """

    scale: float
    name: str


@dataclass(frozen=True)
class DrawnFigure:
    """A figure with its words.

    Args:
        name: Of its file, without suffix.
        figure: Of matplotlib.
        caption: What was measured, how many, which interval.
    """

    name: str
    figure: Figure
    caption: str

    def svg(self) -> str:
        """For the page: no background, colours of the theme, ids of its own."""
        import matplotlib

        text = io.StringIO()
        with matplotlib.rc_context({**RC, "svg.hashsalt": self.name}):
            self.figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        svg = text.getvalue()
        svg = svg[svg.index("<svg") :]
        svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
        svg = re.sub(r'^<svg ([^>]*?) height="[^"]*"([^>]*?) width="[^"]*"|^<svg', r"<svg \1\2", svg)
        svg = svg.replace("<svg", '<svg style="stroke-linejoin: round; stroke-linecap: butt"', 1)
        svg = re.sub(r'\bid="([^"]+)"', rf'id="{self.name}-\1"', svg)
        svg = re.sub(r'(url\(#|href="#)([^)"]+)', rf"\1{self.name}-\2", svg)
        for colour, name in ((INK, "ink"), (MUTED, "muted"), (LINE, "line")):
            svg = svg.replace(colour, f"var(--{name})")
        return svg

    def png(self) -> bytes:
        """For documents: on white, 160 dots an inch."""
        import matplotlib

        content = io.BytesIO()
        with matplotlib.rc_context(RC):
            self.figure.savefig(content, format="png", dpi=160, metadata={"Software": None})
        return content.getvalue()


@contextmanager
def look() -> Iterator[None]:
    """Figures made inside look like all others."""
    import matplotlib

    with matplotlib.rc_context(RC):
        yield


def panels(count: int, *, columns: int = COLUMNS, height: float = 2.6, width: float = 9.6) -> tuple[Figure, list[Axes]]:
    """A figure with a grid of `count` panels, as wide as the page.

    Args:
        count: At least 1.
        columns: At most so many side by side.
        height: Of a panel, inches.
        width: Of the figure, inches.
    """
    from matplotlib.figure import Figure

    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(width, height * rows + 0.35), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


def label(name: str) -> str:
    """What a reader sees of an arm."""
    if name in LABELS:
        return LABELS[name]
    family, _, rest = name.partition("_")
    words = rest.replace("_", " ")
    return f"{FAMILIES[family][0]}, {words}" if family in FAMILIES and words else name.replace("_", " ")


def metric_label(metric: str) -> str:
    """What a reader sees of a metric."""
    for unit in ("_bytes", "_seconds"):
        if metric not in METRICS and metric.endswith(unit):
            return metric.removesuffix(unit).replace("_", " ")
    return METRICS.get(metric, metric.replace("_", " "))


def ordered(names: Iterable[str]) -> list[str]:
    """Known arms in their order, unknown ones behind the known of their family, then others, numbers by size."""
    known = list(LABELS)

    def place(name: str) -> float:
        if name in known:
            return known.index(name)
        family = name.partition("_")[0]
        return known.index(FAMILIES[family][1]) + 0.5 if family in FAMILIES else len(known)

    return sorted(set(names), key=lambda name: (place(name), sort_key(name)))


def colours(names: Iterable[str]) -> dict[str, str]:
    """A colour for each arm: its own where it has one, else one that no other arm of these has."""
    names = ordered(names)
    taken = {COLOURS[name] for name in names if name in COLOURS}
    free = [colour for colour in MORE_COLOURS if colour not in taken] or list(MORE_COLOURS)
    others = [name for name in names if name not in COLOURS]
    return {name: COLOURS.get(name) or free[others.index(name) % len(free)] for name in names}


def shades(count: int) -> list[str]:
    """Colours of an ordered quantity, light to dark, seen on white and on black."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colormaps["viridis"](0.85 - 0.6 * place / max(1, count - 1))) for place in range(count)]


def is_percent(metric: str) -> bool:
    """Whether a metric is shown in percent."""
    return metric == "accuracy" or metric.endswith(("_accuracy", "_fraction", "_share"))


AMOUNTS = ("seconds", "bytes", "tokens", "steps", "evictions", "parameters", "norm", "entropy")


def is_amount(metric: str) -> bool:
    """Whether a metric cannot be below 0 by what it is: a time, a size, a count, or a rate of one by another."""
    return metric.endswith(AMOUNTS) or "_per_" in metric or metric.startswith("logprob_gap")


def unit_of(metric: str, largest: float) -> Unit:
    """The unit in which values of a metric up to `largest` are read best."""
    if is_percent(metric):
        return Unit(0.01, "%")
    if metric.endswith("bytes"):
        return next((Unit(size, name) for size, name in BYTES if abs(largest) >= size), Unit(1, "B"))
    if metric == "seconds" or metric.endswith("_seconds"):
        if largest >= 600:
            return Unit(60, "min")
        return Unit(1, "s") if largest >= 1 else Unit(1e-3, "ms")
    if abs(largest) < UNABRIDGED:
        return Unit(1, "")
    return next(Unit(size, name) for size, name in COUNTS if abs(largest) >= size)


def number(value: float) -> str:
    """Three digits that count, no exponent where it can be avoided."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) >= 0.01:
        return f"{value:.3g}"
    return f"{value:.1e}"


def shown(metric: str, value: float) -> str:
    """A value with its unit."""
    unit = unit_of(metric, value)
    if unit.name == "%":
        return f"{value / unit.scale:.1f} %"
    return f"{digits(metric, value / unit.scale)} {unit.name}".rstrip()


def digits(metric: str, value: float) -> str:
    """A value in its unit; rewards with three decimals, as they stand beside each other."""
    return f"{value:.3f}" if metric == "reward" else number(value)


def shown_estimate(metric: str, one: Estimate) -> str:
    """A mean with its interval, such as `92.0 % [89.3, 94.0]`."""
    text = shown(metric, one.mean)
    if one.low is None or one.high is None:
        return text
    unit = unit_of(metric, one.mean)
    if unit.name == "%":
        return f"{text} [{one.low / unit.scale:.1f}, {one.high / unit.scale:.1f}]"
    return f"{text} [{digits(metric, one.low / unit.scale)}, {digits(metric, one.high / unit.scale)}]"


def file_name(text: str) -> str:
    """A text as part of a file's name and of an anchor."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "figure"
