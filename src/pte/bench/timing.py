"""CPU seconds of two pieces of work, measured in turns.

Decides: the order (ours, theirs, ours, theirs, ...), so that a machine that slows down slows both, and that a ratio is
the median over pairs. CPU seconds of the process, not wall time: other processes on the machine cost less that way.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PairedSeconds:
    """CPU seconds of each repeat, ours and theirs side by side."""

    ours: tuple[float, ...]
    theirs: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """Median over the pairs of ours / theirs."""
        return statistics.median(self.ratios)

    @property
    def ratios(self) -> tuple[float, ...]:
        """Ours / theirs of each pair."""
        return tuple(ours / theirs for ours, theirs in zip(self.ours, self.theirs, strict=True))


def paired_seconds(ours: Callable[[int], object], theirs: Callable[[int], object], *, repeats: int) -> PairedSeconds:
    """Runs both in turns, after the caller has warmed both up.

    Args:
        ours: Called with the number of the repeat, to be used as a seed.
        theirs: Likewise.
        repeats: Pairs.
    """
    gc.collect()
    # What lives already is left out of the collections between the runs: each would take most of a second.
    gc.freeze()
    try:
        pairs = [(cpu_seconds(ours, repeat), cpu_seconds(theirs, repeat)) for repeat in range(repeats)]
    finally:
        gc.unfreeze()
    return PairedSeconds(ours=tuple(mine for mine, _ in pairs), theirs=tuple(other for _, other in pairs))


def cpu_seconds(work: Callable[[int], object], repeat: int) -> float:
    """CPU seconds of one call, all threads of the process together."""
    gc.collect()
    start = time.process_time()
    work(repeat)
    return time.process_time() - start


def summary(values: Sequence[float]) -> dict[str, float]:
    """Least, median and largest of some readings."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}
