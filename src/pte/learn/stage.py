"""What the two stages of a run share: a step that returns metrics, and replays in micro-batches.

Decides: the interface between a stage and the loop that logs and checkpoints it, and how sequences are grouped for
the replay (by length, so that short ones do not wait for long ones).
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch

from pte.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from pte.checkpoint_files import Json, StateTree

Item = TypeVar("Item")

# Metrics that depend on the machine's mood; all others are equal, bit for bit, when a run is repeated on CPU.
TIMING_METRICS = ("seconds", "rollout_seconds", "replay_seconds", "tokens_per_second", "peak_memory_bytes")


@dataclass(frozen=True)
class StepResult:
    """What a step leaves behind.

    Args:
        metrics: Plain numbers by name.
        completions: Rows for completions.jsonl.
        warnings: Sentences for the user.
    """

    metrics: Mapping[str, float]
    completions: Sequence[Mapping[str, Json]] = ()
    warnings: Sequence[str] = field(default_factory=tuple)


class Stage(Protocol):
    """One stage of a run."""

    name: str
    steps: int
    micro_batch_size: int

    def step(self, index: int) -> StepResult:
        """Does step `index`, from 0."""
        ...

    def state(self) -> dict[str, StateTree]:
        """What a checkpoint keeps beside the adapter."""
        ...

    def load_state(self, state: Mapping[str, StateTree]) -> None:
        """Puts back what `state` returned."""
        ...


def by_length(
    items: Sequence[Item], lengths: Sequence[int], *, size: int, ranks: Ranks = ALONE
) -> Iterator[list[Item]]:
    """Micro-batches of `size` items, longest first, so that each holds sequences of like length.

    Several ranks take turns along the order, so that each has its share of the long ones.
    """
    order = ranks.share(sorted(range(len(items)), key=lambda index: -lengths[index]))
    for start in range(0, len(order), size):
        yield [items[index] for index in order[start : start + size]]


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held so far: on a GPU by tensors, on the CPU by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
