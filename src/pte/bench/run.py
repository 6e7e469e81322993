"""Runs a preset: which measurements, in which order, and what becomes a figure.

Decides: `run_preset`, and what `figures` means. A figure is None where it could not be measured; why stands on stderr.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from pte.bench.arms import OurRollout, OurStep, evicted_bytes
from pte.bench.memory import BYTES_PER_MB, MemoryArm, isolated_growth_bytes, probe_available
from pte.bench.plain import PlainGenerate, PlainLoraStep
from pte.bench.presets import FigureNames, Preset, preset_named
from pte.bench.report import print_report
from pte.bench.timing import PairedSeconds, paired_seconds

GrowthReader = Callable[[Preset, MemoryArm, int], int]
Figures = dict[str, float | None]


@dataclass
class Measured:
    """Everything that one run of a preset measured.

    Args:
        preset: What was measured.
        rollouts: Rollout against `generate`, by completion length.
        steps: Training step against `generate` and plain LoRA, by completion length.
        growths: Readings of memory growth, bytes, by arm and completion length.
        seconds: Wall time of the whole run.
    """

    preset: Preset
    rollouts: dict[int, PairedSeconds] = field(default_factory=dict)
    steps: dict[int, PairedSeconds] = field(default_factory=dict)
    growths: dict[tuple[MemoryArm, int], list[int]] = field(default_factory=dict)
    seconds: float = 0.0

    def growth(self, arm: MemoryArm, tokens: int) -> float | None:
        """Median growth, bytes; None when it was not measured."""
        readings = self.growths.get((arm, tokens))
        return statistics.median(readings) if readings else None

    @property
    def figures(self) -> Figures:
        """The figures by name, as defined in `FigureNames`."""
        preset, names = self.preset, FigureNames.of(self.preset)
        short, long = preset.figure_tokens, preset.long_tokens
        chain, chain_long = self.growth("chain", short), self.growth("chain", long)
        horizon, horizon_long = self.growth("horizon", short), self.growth("horizon", long)
        more_evicted = evicted_bytes(preset, long) - evicted_bytes(preset, short)
        ratio = excess = None
        if horizon is not None and horizon_long is not None:
            ratio = horizon_long / horizon
        if chain is not None and chain_long is not None:
            excess = (chain_long - chain) / more_evicted
        return {
            names.rollout: 1 / self.rollouts[short].ratio,
            names.growth: None if chain is None else chain / BYTES_PER_MB,
            names.horizon: ratio,
            names.chain: excess,
            names.step: self.steps[short].ratio,
        }


def run_preset(name: str, *, output: Path | None = None) -> Figures:
    """Measures a preset, prints a table and, as the last line, one JSON object; progress goes to stderr.

    Args:
        name: Of the preset.
        output: File that also gets the JSON; it is written at the end.

    Returns:
        The figures.

    Raises:
        ValueError: No such preset, or `output` lies in a directory that does not exist.
    """
    preset = preset_named(name)
    if output is not None and not output.resolve().parent.is_dir():
        raise ValueError(f"output must lie in an existing directory, got {str(output)!r}; make the directory first")
    measured = measure(preset)
    print_report(measured, output=output)
    return measured.figures


def measure(preset: Preset, *, read_growth: GrowthReader | None = None) -> Measured:
    """All measurements of a preset.

    Args:
        preset: What to measure.
        read_growth: How memory is read; by default in a process of its own, where the system allows it.
    """
    start = time.perf_counter()
    measured = Measured(preset)
    with torch_threads(preset.threads):
        measure_rollouts(measured)
        measure_steps(measured)
    if read_growth is None and probe_available():
        read_growth = read_isolated
    if read_growth is None:
        progress("memory: not measured, /proc/self/clear_refs and glibc are needed")
    else:
        measure_memory(measured, read_growth)
    measured.seconds = time.perf_counter() - start
    return measured


def measure_rollouts(measured: Measured) -> None:
    """Tokens per CPU second at every length."""
    preset = measured.preset
    ours, theirs = OurRollout(preset), PlainGenerate(preset)
    for arm in (ours, theirs):
        arm.run(min(preset.lengths), seed=-1)
    for tokens in preset.lengths:
        pair = paired_seconds(
            lambda seed, tokens=tokens: ours.run(tokens, seed),  # type: ignore[misc]
            lambda seed, tokens=tokens: theirs.run(tokens, seed),  # type: ignore[misc]
            repeats=preset.rollout_repeats,
        )
        measured.rollouts[tokens] = pair
        progress(f"rollout of {tokens} tokens: {1 / pair.ratio:.2f} x generate")


def measure_steps(measured: Measured) -> None:
    """CPU seconds of a training step at every length."""
    preset = measured.preset
    ours, theirs = OurStep(preset, mode="chain"), PlainLoraStep(preset)
    for arm in (ours, theirs):
        arm.run(min(preset.lengths), seed=-1)
    for tokens in preset.lengths:
        pair = paired_seconds(
            lambda seed, tokens=tokens: ours.run(tokens, seed),  # type: ignore[misc]
            lambda seed, tokens=tokens: theirs.run(tokens, seed),  # type: ignore[misc]
            repeats=preset.step_repeats,
        )
        measured.steps[tokens] = pair
        progress(f"training step of {tokens} tokens: {pair.ratio:.2f} x generate + plain LoRA")


def measure_memory(measured: Measured, read_growth: GrowthReader) -> None:
    """Growth in a training step, by arm and length; what enters a figure is read several times.

    Readings run side by side, one process a core (two at most): memory does not feel the neighbour, time would.
    """
    preset = measured.preset
    lengths = (*preset.lengths, preset.long_tokens)
    figured = (preset.figure_tokens, preset.long_tokens)
    wanted: list[tuple[MemoryArm, int]] = [("chain", tokens) for tokens in lengths]
    wanted += [("horizon", tokens) for tokens in figured]
    wanted += [("lora", tokens) for tokens in lengths]
    with ThreadPoolExecutor(max_workers=min(2, os.cpu_count() or 1)) as pool:
        pending = {}
        for arm, tokens in wanted:
            repeats = preset.memory_repeats if arm != "lora" and tokens in figured else 1
            pending[arm, tokens] = [pool.submit(read_growth, preset, arm, tokens) for _ in range(repeats)]
        for (arm, tokens), futures in pending.items():
            readings = [future.result() for future in futures]
            measured.growths[arm, tokens] = readings
            progress(f"memory growth, {arm}, {tokens} tokens: {statistics.median(readings) / BYTES_PER_MB:.1f} MB")


def read_isolated(preset: Preset, arm: MemoryArm, tokens: int) -> int:
    """A reading in a process of its own."""
    return isolated_growth_bytes(preset, arm, tokens=tokens)


def progress(line: str) -> None:
    """One line on stderr."""
    print(f"bench: {line}", file=sys.stderr, flush=True)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Runs with `count` threads and restores what was set before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
