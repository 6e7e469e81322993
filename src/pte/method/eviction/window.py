"""The paper's policy: the oldest reasoning tokens leave first.

Paper: Section 3, the sliding window with the prompt protected.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pte.method.eviction.policy import KeptTokens, Needs

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor


class OldestFirst:
    """Evicts the tokens with the smallest reasoning index; the slots form a ring of blocks."""

    name = "window"
    needs = Needs()

    def evicted_slots(self, kept: KeptTokens, *, evict_tokens: int) -> Int[Tensor, "batch evicted"]:
        """Slots of the oldest tokens, oldest first."""
        return kept.token_indices.topk(evict_tokens, dim=1, largest=False, sorted=True).indices

    def segments_per_stretch(self, window_tokens: int, evict_tokens: int) -> int:
        """The W tokens kept now are the next W tokens to leave."""
        return window_tokens // evict_tokens

    def check(self, window_tokens: int, evict_tokens: int) -> None:
        """Every budget works."""
