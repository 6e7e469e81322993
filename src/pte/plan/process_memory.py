"""Resident memory of this process: what it holds, and by how much a piece of work raises it at its peak.

Decides: the method. The allocator's free pages are given back (`malloc_trim`); the kernel's high-water mark is reset
(5 written to /proc/self/clear_refs); the work; then growth = VmHWM after - VmRSS before. Linux with glibc only.
Resolution: the kernel counts pages in batches of some tens of pages a core, and the allocator rounds, so that readings
of equal work differ by about 1 MB.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path


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
