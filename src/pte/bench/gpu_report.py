"""What `--preset gpu` prints: a table for each part, the figures, then one JSON object as the last line.

Decides: the layout, 120 columns at most. Does not know how anything was measured.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from pte.bench.figures import FIGURES, Figures
from pte.bench.rows import Part, Row, number_in
from pte.timing import SPANS

if TYPE_CHECKING:
    from pte.bench.rows import RowBook

GIB, MIB = 2**30, 2**20
COLUMNS_OF_TEXT = 118
Column = tuple[str, int, Callable[[Row], str]]


def shown(*names: str, scale: float = 1.0, digits: int = 2) -> Callable[[Row], str]:
    """Prints a reading of a row; a dash where there is none."""

    def text(row: Row) -> str:
        found = row.number(*names)
        return "-" if found is None else f"{found * scale:,.{digits}f}"

    return text


def batch_text(row: Row) -> str:
    """Sequences that ran, or that were asked for; "most" where that is as many as fit."""
    found = row.number("sequences")
    return f"{found:.0f}" if found is not None else str(row.case.batch or "most")


ARM: tuple[Column, ...] = (
    ("arm", -16, lambda row: row.case.arm),
    ("batch", 6, batch_text),
    ("window", 7, lambda row: "full" if row.case.window_tokens is None else str(row.case.window_tokens)),
)
TOKENS: Column = ("tokens", 7, lambda row: "any" if row.case.tokens is None else str(row.case.tokens))
SPREAD = "seconds_per_step"
STEPS: tuple[Column, ...] = (
    *ARM,
    TOKENS,
    ("ms/step", 9, shown(SPREAD, "median", scale=1e3)),
    ("min", 8, shown(SPREAD, "min", scale=1e3)),
    ("max", 8, shown(SPREAD, "max", scale=1e3)),
    ("tokens/s", 10, shown("tokens_per_second", digits=0)),
    ("roofline", 9, shown("roofline_fraction", digits=3)),
    ("peak GiB", 9, shown("peak_bytes", scale=1 / GIB)),
    ("cache GiB", 10, shown("cache_bytes", scale=1 / GIB)),
    ("state MiB", 10, shown("state_bytes", scale=1 / MIB, digits=1)),
)
SECONDS: tuple[Column, ...] = (
    ("s", 9, shown("seconds", "median", digits=3)),
    ("min", 9, shown("seconds", "min", digits=3)),
    ("max", 9, shown("seconds", "max", digits=3)),
)
COLUMNS: dict[Part, tuple[Column, ...]] = {
    "rollout": STEPS,
    "long": STEPS,
    "update": (
        *ARM,
        TOKENS,
        *SECONDS,
        ("tokens/s", 10, shown("tokens_per_second", digits=0)),
        ("MFU", 7, shown("model_flops_fraction", digits=3)),
        ("peak GiB", 9, shown("peak_bytes", scale=1 / GIB)),
        ("evicted GiB", 12, shown("evicted_bytes", scale=1 / GIB)),
    ),
    "step": (
        *ARM[:2],
        TOKENS,
        ("s", 7, shown("seconds", "median")),
        *((name, max(7, len(name) + 1), shown("spans", name)) for name in (*SPANS, "other")),
        ("peak GiB", 9, shown("peak_bytes", scale=1 / GIB)),
    ),
    "float8": (
        *ARM,
        STEPS[4],
        *STEPS[7:11],
        ("mean gap", 10, shown("gap", "mean", digits=5)),
        ("max gap", 9, shown("gap", "max", digits=3)),
    ),
    "kernels": (
        *ARM,
        ("ms", 9, shown("seconds", "median", scale=1e3, digits=3)),
        ("min", 9, shown("seconds", "min", scale=1e3, digits=3)),
        ("max", 9, shown("seconds", "max", scale=1e3, digits=3)),
        ("bound ms", 9, shown("bound_seconds", scale=1e3, digits=3)),
        ("of bound", 9, shown("bound_fraction", digits=3)),
        ("peak GiB", 9, shown("peak_bytes", scale=1 / GIB)),
    ),
}
TITLES: dict[Part, str] = {
    "rollout": "rollout: one decode step, steady state under a window; at half of `tokens` under a full cache",
    "long": "long: whole completions; bounded at one batch, full caches at their largest, without prefill",
    "update": "update: one optimizer step on given completions; peak with weights; evicted: in host memory (chain)",
    "step": "step: one whole GRPO step; seconds by span from a step that waits for the device at every span",
    "float8": "float8: PTE's decode step in float8 and in the model's dtype, and the gap of rollout and replay, nats",
    "kernels": "kernels: pieces of one decode step alone",
}


def print_gpu_report(book: RowBook, *, figures: Figures, suggestion: str | None) -> None:
    """Prints tables and figures, then the JSON line; the file gets the figures too.

    Args:
        book: All rows.
        figures: Made of them.
        suggestion: Where rows that no file keeps would belong.
    """
    book.header = {"figures": dict(figures), **{name: v for name, v in book.header.items() if name != "figures"}}
    book.save()
    for line in gpu_table(list(book.rows.values()), str(book.header["model"]), device=str(book.header["device"])):
        print(line)
    for line in rate_lines(book):
        print(line)
    for line in figure_lines(figures):
        print(line)
    if suggestion is not None:
        print(f"\nto keep this: --output {suggestion}")
    print(json.dumps(book.to_json()), flush=True)


def gpu_table(rows: Sequence[Row], model: str, *, device: str) -> Iterator[str]:
    """Every part that has rows."""
    yield f"{model} on {device}, random weights; median, least and largest of the readings"
    for part, columns in COLUMNS.items():
        some = [row for row in rows if row.case.part == part]
        if not some:
            continue
        yield ""
        yield TITLES[part]
        yield "  " + "".join(cell(name, width) for name, width, _ in columns)
        for row in some:
            if row.not_measured is None and row.case.arm != "start":
                yield "  " + "".join(cell(text(row), width) for _, width, text in columns)
        yield from (note for row in some for note in row_notes(row))


def row_notes(row: Row) -> Iterator[str]:
    """What a row says beside its numbers."""
    if row.not_measured is not None:
        text = f"not measured: {row.case.label}: {row.not_measured}"
        yield from textwrap.wrap(text, COLUMNS_OF_TEXT, initial_indent="  ", subsequent_indent="    ")
    elif row.case.arm == "start":
        first, later = row.number("first_run_seconds"), row.number("later_run_seconds", "median")
        yield f"  first rollout of 2 tokens: {first:.2f} s, later ones {later:.2f} s; path: {row.values['path']}"
    elif row.case.part == "step" and row.number("estimated_seconds") is not None:
        yield (
            f"  {row.case.arm}: rollout {row.number('rollout_seconds'):.2f} s, update "
            f"{row.number('update_seconds', 'median'):.2f} s"
        )


def cell(text: str, width: int) -> str:
    """A text in its column, to the right, or to the left where the width is negative."""
    return text.ljust(-width) if width < 0 else text.rjust(width)


def rate_lines(book: RowBook) -> Iterator[str]:
    """What the device was measured to do when each part ran, and how long that took."""
    yield ""
    for name, run in book.parts.items():
        rates = [number_in(run, "rates", rate) or 0.0 for rate in ("bytes_per_second", "flops_per_second")]
        yield (
            f"  {name:8} {rates[0] / 1e9:,.0f} GB/s, {rates[1] / 1e12:,.2f} TFLOP/s, "
            f"{number_in(run, 'seconds') or 0:.0f} s"
        )


def figure_lines(figures: Figures) -> Iterator[str]:
    """Every figure beside what it has to reach."""
    targets = {figure.name: figure.target for figure in FIGURES}
    yield ""
    for name, figure in figures.items():
        measured = "not measured" if figure is None else format(figure, ".3f")
        yield f"  {name:34} {measured:>14}  {targets.get(name, '')}".rstrip()
