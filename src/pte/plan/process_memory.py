"""Resident memory of this process: what it holds, and by how much a piece of work raises it at its peak.

Decides: the method. The allocator's free pages are given back (`malloc_trim`); the kernel's high-water mark is reset
(5 written to /proc/self/clear_refs); the work; then growth = VmHWM after - VmRSS before. Linux with glibc only.
Resolution: the kernel counts pages in batches of some tens of pages a core, and the allocator rounds, so that readings
of equal work differ by about 1 MB. By default glibc keeps freed blocks of up to 32 MB in its heap, and equal work reads
up to half higher: `device_growth_bytes` makes it give large blocks back for the time of the work.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_MMAP_THRESHOLD = 32 * 2**20
EXACT_BYTES = 65536


def probe_available() -> bool:
    """True where the high-water mark can be read and reset."""
    if sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"):
        return False
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return status_bytes("VmHWM") > 0


def status_bytes(field: str) -> int:
    """A field of /proc/self/status, bytes; 0 where there is none."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    return 0


def peak_growth_bytes(work: Callable[[], object]) -> int:
    """Growth of resident memory at the peak of `work`."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    work()
    return status_bytes("VmHWM") - before


@contextmanager
def large_blocks_go_back() -> Iterator[None]:
    """Blocks of 64 KiB or more get pages of their own, which go back when they are freed.

    Afterwards the thresholds are what glibc raises them to by itself in a process that frees large blocks.
    """
    mallopt = ctypes.CDLL(None).mallopt
    try:
        for parameter in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            mallopt(parameter, EXACT_BYTES)
        yield
    finally:
        mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
        mallopt(M_TRIM_THRESHOLD, 2 * LARGEST_MMAP_THRESHOLD)


def device_growth_bytes(device: torch.device, work: Callable[[], object]) -> int | None:
    """Bytes at the peak of some work beyond those before it: of tensors on a GPU, of the process on the CPU.

    Args:
        device: Where the work is done.
        work: Is done in any case.

    Returns:
        None where it cannot be read.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    if device.type == "cpu" and probe_available():
        with large_blocks_go_back():
            return peak_growth_bytes(work)
    work()
    return None
