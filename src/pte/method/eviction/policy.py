"""The one extension point: which kept reasoning tokens leave at an eviction.

Decides: what a policy sees (the reasoning index of every kept token, the stream seed of every sequence, the
number of the eviction) and returns (slots). A policy never sees the prompt, which is never evicted, nor padding.
Rollout and replay call the same object with the same arguments, so a policy must be a pure function of them.

Paper: Section 3, "oldest 25 %"; the ablation over eviction policies.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor


class EvictionPolicy(Protocol):
    """Chooses the evicted slots of a saturated window, for every sequence of a batch by itself."""

    name: str

    def evicted_slots(
        self,
        token_indices: Int[Tensor, "batch window"],
        *,
        evict_tokens: int,
        eviction_index: Int[Tensor, " batch"],
        stream_seeds: Int[Tensor, " batch"],
    ) -> Int[Tensor, "batch evicted"]:
        """Slots whose tokens leave, in the order in which new tokens take them.

        Args:
            token_indices: Reasoning index of the token in each window slot; the window is saturated.
            evict_tokens: Number of tokens that leave.
            eviction_index: How many evictions each sequence had before.
            stream_seeds: The seed of each sequence's own random stream.
        """
        ...

    def segments_per_stretch(self, window_tokens: int, evict_tokens: int) -> int:
        """How many consecutive evictions only touch tokens that were kept before the first of them (at least 1)."""
        ...

    def check(self, window_tokens: int, evict_tokens: int) -> None:
        """Raises ValueError when the policy cannot work with this budget."""
        ...
