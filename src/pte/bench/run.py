"""Runs a benchmark: which preset, and for `cpu` which measurements, in which order, and what becomes a figure.

Decides: `run_bench`, the one entrance, and the values of the CPU's figures. A figure is None where it could not be
measured; why stands on stderr.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from pte.bench.cpu_arms import evicted_bytes, our_rollout, our_step, plain_generate, plain_step
from pte.bench.figures import Figures, cpu_figures, flat_figures
from pte.bench.gpu_run import progress, run_gpu
from pte.bench.memory import BYTES_PER_MB, MemoryArm, isolated_growth_bytes
from pte.bench.presets import CPU, Preset
from pte.bench.report import print_report
from pte.bench.timing import PairedSeconds, paired_seconds
from pte.plan.process_memory import probe_available

GrowthReader = Callable[[Preset, MemoryArm, int], int]


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
        """All figures by name, as `pte.bench.figures` defines them; those of a GPU are None."""
        preset = self.preset
        short, long = preset.figure_tokens, preset.long_tokens
        chain, chain_long = self.growth("chain", short), self.growth("chain", long)
        horizon, horizon_long = self.growth("horizon", short), self.growth("horizon", long)
        more_evicted = evicted_bytes(preset, long) - evicted_bytes(preset, short)
        ratio = excess = None
        if horizon is not None and horizon_long is not None:
            ratio = horizon_long / horizon
        if chain is not None and chain_long is not None:
            excess = (chain_long - chain) / more_evicted
        values = (
            1 / self.rollouts[short].ratio,
            None if chain is None else chain / BYTES_PER_MB,
            ratio,
            excess,
            self.steps[short].ratio,
        )
        names = (figure.name for figure in cpu_figures(preset))
        return flat_figures(dict(zip(names, values, strict=True)))


@dataclass(frozen=True)
class BenchRequest:
    """What a user asks for.

    Args:
        preset: `cpu`, the tiny configuration beside Transformers; or `gpu`, real shapes.
        parts: Of `gpu`; none for all.
        model: Shape that `gpu` measures; None for 7b.
        device: Where `gpu` measures; None for cuda.
        output: File that also gets the JSON. `gpu` adds to what the file holds already.

    Raises:
        ValueError: No such preset, an option that the preset does not have, or `output` in a directory that does not
            exist.
    """

    preset: str = "cpu"
    parts: tuple[str, ...] = ()
    model: str | None = None
    device: str | None = None
    output: Path | None = None

    def __post_init__(self) -> None:
        if self.preset not in ("cpu", "gpu"):
            raise ValueError(f"preset must be one of cpu, gpu, got {self.preset!r}; use for example 'cpu'")
        for name, value in (("part", self.parts), ("model", self.model), ("device", self.device)):
            if value and self.preset == "cpu":
                raise ValueError(f"{name} is an option of preset gpu, got {value!r} with cpu; add --preset gpu")
        if self.output is not None and not self.output.resolve().parent.is_dir():
            raise ValueError(
                f"output must lie in an existing directory, got {str(self.output)!r}; make the directory first"
            )


def run_bench(request: BenchRequest) -> Figures:
    """Measures, prints a table and, as the last line, one JSON object; progress goes to stderr.

    Args:
        request: What to measure, and where to keep it. The CPU's file is written at the end, the GPU's by rows.

    Returns:
        The figures.

    Raises:
        ValueError: An unknown model or part, a device that is not there, or a file of something else.
        RuntimeError: A row of the GPU failed; the others are kept.
    """
    if request.preset == "gpu":
        return run_gpu(request.model or "7b", request.device or "cuda", parts=request.parts, output=request.output)
    measured = measure(CPU)
    print_report(measured, output=request.output)
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
    ours, theirs = our_rollout(preset), plain_generate(preset)
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
    ours, theirs = our_step(preset, "chain"), plain_step(preset)
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


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Runs with `count` threads and restores what was set before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
