"""The device that measures: its rates, its clock, its memory.

Decides: how time and memory are read. On CUDA time lies between two events of the stream, and the peak is the
allocator's; on a CPU time is wall time, and memory is not read here (`memory.py` does, in processes of its own).
"""

from __future__ import annotations

import gc
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import TYPE_CHECKING

import torch

from pte.bench.machine import Facts, hardware
from pte.plan.roofline import DeviceRates

if TYPE_CHECKING:
    from pte.bench.gpu_plan import GpuPlan

RUNS_IN_ONE_READING = 8
KERNEL_CACHE = "TRITON_CACHE_DIR"


def bench_device(name: str, *, model: str) -> torch.device:
    """The device of that name, looked at before any work.

    Args:
        name: `cuda` or `cpu`.
        model: Shape that is to be measured.

    Raises:
        ValueError: Neither of both, no CUDA device, or a model on the CPU that is not tiny.
    """
    if name not in ("cuda", "cpu"):
        raise ValueError(f"device must be cuda or cpu, got {name!r}; use 'cuda'")
    if name == "cpu" and model != "tiny":
        raise ValueError(f"device cpu is for model tiny alone, got model {model!r}; add --model tiny, or use cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "device must be a CUDA device that torch sees, got none; run on a machine with an NVIDIA GPU and a CUDA "
            "build of torch, or try the code with --device cpu --model tiny"
        )
    return torch.device(name)


def device_facts(device: torch.device) -> Facts:
    """The machine, and its GPU where that is what measures."""
    if device.type == "cpu":
        return hardware()
    properties = torch.cuda.get_device_properties(device)
    return {**hardware(), "gpu": properties.name, "gpu_memory_bytes": properties.total_memory}


def elapsed_seconds(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds that the device takes for some work, its host's pauses included."""
    if device.type == "cpu":
        begin = perf_counter()
        work()
        return perf_counter() - begin
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    start.record()
    work()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1e3


def repeated_seconds(device: torch.device, work: Callable[[], object], *, repeats: int) -> list[float]:
    """Seconds of one call, several times; each reading spans some calls in a row, after one that is not read."""

    def several() -> None:
        for _ in range(RUNS_IN_ONE_READING):
            work()

    work()
    return [elapsed_seconds(device, several) / RUNS_IN_ONE_READING for _ in range(repeats)]


def measure_rates(device: torch.device, plan: GpuPlan) -> DeviceRates:
    """What the device does at its best, medians."""
    return DeviceRates(
        bytes_per_second=2 * plan.copy_bytes / statistics.median(copy_seconds(device, plan)),
        flops_per_second=2 * plan.square**3 / statistics.median(product_seconds(device, plan)),
    )


def copy_seconds(device: torch.device, plan: GpuPlan) -> list[float]:
    """Of a large copy; every byte is read once and written once."""
    source = torch.ones(plan.copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return repeated_seconds(device, lambda: target.copy_(source), repeats=plan.rate_repeats)


def product_seconds(device: torch.device, plan: GpuPlan) -> list[float]:
    """Of a large square product of random matrices: of zeros it would be faster."""
    size = (plan.square, plan.square)
    left, right = (torch.randn(size, dtype=plan.torch_dtype, device=device) for _ in range(2))
    product = torch.empty_like(left)
    return repeated_seconds(device, lambda: torch.mm(left, right, out=product), repeats=plan.rate_repeats)


def free_bytes(device: torch.device) -> int | None:
    """Bytes that could still be allocated; None where nobody counts them."""
    if device.type == "cpu":
        return None
    clear(device)
    return torch.cuda.mem_get_info(device)[0]


def clear(device: torch.device) -> None:
    """Gives device memory back that nothing holds any more."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


@contextmanager
def empty_kernel_cache() -> Iterator[None]:
    """Compiled kernels go to an empty folder within a block, so that none is found that an earlier process made."""
    before = os.environ.get(KERNEL_CACHE)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[KERNEL_CACHE] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ[KERNEL_CACHE]
            else:
                os.environ[KERNEL_CACHE] = before


class PeakMemory:
    """The most bytes that were allocated on the device within a block; None where nobody counts them."""

    def __init__(self) -> None:
        self.bytes: int | None = None


@contextmanager
def peak_memory(device: torch.device) -> Iterator[PeakMemory]:
    """Reads the peak of a block; weights that lie there before count."""
    clear(device)
    peak = PeakMemory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    yield peak
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        peak.bytes = torch.cuda.max_memory_allocated(device)
