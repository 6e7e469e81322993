"""Where evicted keys and values wait until a backward walk folds them again: host memory.

Decides: how they get there and back. Does not know what they are for.

Paper: none; gradient mode `chain`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pte.method.cache import EvictedTokens

if TYPE_CHECKING:
    from torch import Tensor


class WaitingBlocks:
    """Evicted tokens of several stretches in host memory, in one piece: many small ones would leave holes around them.

    From a GPU they are copied into pinned memory while it goes on computing, and back in the stream's order.

    Args:
        evicted: Of each stretch.
    """

    def __init__(self, evicted: list[EvictedTokens]) -> None:
        self.shapes = [one.keys.shape for one in evicted]
        self.numbers = joined([x for one in evicted for x in (one.keys, one.values)])
        # Positions are below 2**31.
        self.positions = joined([one.positions.int() for one in evicted])

    def on_device(self, device: torch.device) -> list[EvictedTokens]:
        """The tokens of each stretch where they are folded."""
        numbers = self.numbers.to(device, non_blocking=True).split([n.numel() for n in self.shapes for _ in range(2)])
        positions = self.positions.to(device, non_blocking=True).split([n[1] * n[2] for n in self.shapes])
        return [
            EvictedTokens(keys.view(shape), values.view(shape), places.view(shape[1:3]))
            for keys, values, places, shape in zip(numbers[::2], numbers[1::2], positions, self.shapes, strict=True)
        ]


def joined(parts: list[Tensor]) -> Tensor:
    """All numbers of some tensors one behind the other, in host memory, pinned where they come from a GPU."""
    sizes = [part.numel() for part in parts]
    buffer = torch.empty(sum(sizes), dtype=parts[0].dtype, pin_memory=parts[0].is_cuda)
    for place, part in zip(buffer.split(sizes), parts, strict=True):
        place.view(part.shape).copy_(part, non_blocking=True)
    return buffer
