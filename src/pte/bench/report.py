"""What `--preset cpu` prints: a table for people, then one JSON object as the last line.

Decides: the layout of both. Does not know how anything was measured.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pte.bench.cpu_arms import evicted_bytes
from pte.bench.gpu_report import figure_lines
from pte.bench.machine import Facts, commit, hardware, versions
from pte.bench.memory import ALLOCATOR, BYTES_PER_MB
from pte.bench.timing import PairedSeconds, summary

if TYPE_CHECKING:
    from pte.bench.run import Measured

Row = dict[str, object]


def print_report(measured: Measured, *, output: Path | None) -> None:
    """Prints the table and the JSON line, and keeps the JSON when asked.

    Args:
        measured: What a run measured.
        output: File that gets the same JSON object, indented.
    """
    report = json_report(measured)
    for line in table_lines(measured, report["hardware"]):  # type: ignore[arg-type]
        print(line)
    if output is not None:
        output.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report), flush=True)


def json_report(measured: Measured) -> dict[str, object]:
    """Figures first, then everything that they come from."""
    preset = measured.preset
    return {
        "figures": measured.figures,
        "preset": asdict(preset),
        "commit": commit(),
        "hardware": hardware(),
        "versions": versions(),
        "allocator": ALLOCATOR,
        "wall_seconds": round(measured.seconds, 1),
        "rollout": [timing_row(tokens, pair, batch=preset.batch) for tokens, pair in measured.rollouts.items()],
        "step": [timing_row(tokens, pair, batch=preset.batch) for tokens, pair in measured.steps.items()],
        "memory": [
            {
                "arm": arm,
                "tokens": tokens,
                "growth_mb": scaled(readings),
                "readings": len(readings),
                "evicted_mb": evicted_bytes(preset, tokens) / BYTES_PER_MB,
            }
            for (arm, tokens), readings in measured.growths.items()
        ],
    }


def scaled(readings: list[int]) -> dict[str, float]:
    """Summary of readings in MB."""
    return summary([reading / BYTES_PER_MB for reading in readings])


def timing_row(tokens: int, pair: PairedSeconds, *, batch: int) -> Row:
    """Seconds, tokens per second and ratio at one length."""
    ours, theirs = summary(pair.ours), summary(pair.theirs)
    return {
        "tokens": tokens,
        "pairs": len(pair.ours),
        "ours_cpu_seconds": ours,
        "theirs_cpu_seconds": theirs,
        "ours_tokens_per_cpu_second": batch * tokens / ours["median"],
        "theirs_tokens_per_cpu_second": batch * tokens / theirs["median"],
        "seconds_ratio": summary(pair.ratios),
    }


def table_lines(measured: Measured, machine: Facts) -> Iterator[str]:
    """The table, line by line."""
    preset, shape = measured.preset, measured.preset.shape
    yield (
        f"{machine['cpu']}, {machine['cores']} cores, {preset.threads} thread, load {machine['load_average']}; "
        f"float32, random weights, Qwen2 architecture"
    )
    yield (
        f"hidden {shape.hidden_size}, MLP {shape.intermediate_size}, {shape.layers} layers, {shape.heads}/"
        f"{shape.kv_heads} heads, vocab {shape.vocab}, {'tied' if shape.tied else 'untied'} embeddings; batch "
        f"{preset.batch}, prompt {preset.prompt_tokens}, window {preset.window_tokens}, block "
        f"{preset.evict_tokens}, rank {preset.rank}"
    )
    yield ""
    yield "           rollout, tokens per CPU s       training step, CPU s             growth of memory in a step, MB"
    yield "  tokens   PTE  generate  PTE/theirs     PTE  LoRA+gen  PTE/theirs    chain  horizon   LoRA  evicted K/V"
    for tokens in (*preset.lengths, preset.long_tokens):
        cells = [f"{tokens:8}"]
        rollout, step = measured.rollouts.get(tokens), measured.steps.get(tokens)
        if rollout is None:
            cells.append(" " * 28)
        else:
            mine, other = (
                preset.batch * tokens / summary(seconds)["median"] for seconds in (rollout.ours, rollout.theirs)
            )
            cells.append(f"{mine:6.0f}{other:10.0f}{1 / rollout.ratio:12.2f}")
        if step is None:
            cells.append(" " * 30)
        else:
            mine, other = (summary(seconds)["median"] for seconds in (step.ours, step.theirs))
            cells.append(f"{mine:8.2f}{other:10.2f}{step.ratio:12.2f}")
        growths = (
            measured.growth("chain", tokens),
            measured.growth("horizon", tokens),
            measured.growth("lora", tokens),
        )
        for growth, width in zip(growths, (9, 9, 7), strict=True):
            cells.append(f"{'-' if growth is None else format(growth / BYTES_PER_MB, '.1f'):>{width}}")
        cells.append(f"{evicted_bytes(preset, tokens) / BYTES_PER_MB:13.1f}")
        yield "".join(cells)
    yield from figure_lines(measured.figures)
