"""What policies that keep the tokens of the highest score have in common.

Decides: that the newest tokens are protected, that the lowest scores leave, and that of equal scores the older token
leaves. A policy of this kind is a class with `name`, `needs` and `scores`. One choice holds for all layers and heads:
the cache has one slot table, where the papers keep a set of tokens for every head of every layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pte.method.eviction.policy import KeptTokens, Needs

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


class LowestScore:
    """Evicts the tokens with the lowest score among all but the newest.

    Args:
        recent_tokens: Newest reasoning tokens that do not leave, 0 or more.

    Raises:
        ValueError: `recent_tokens` is negative.
    """

    name: str
    needs: Needs

    def __init__(self, recent_tokens: int) -> None:
        if recent_tokens < 0:
            raise ValueError(f"recent_tokens must be at least 0, got {recent_tokens}; use for example half the window")
        self.recent_tokens = recent_tokens

    def scores(self, kept: KeptTokens) -> Float[Tensor, "batch window"]:
        """What each kept token is worth, for every sequence by itself."""
        raise NotImplementedError

    def evicted_slots(self, kept: KeptTokens, *, evict_tokens: int) -> Int[Tensor, "batch evicted"]:
        """Slots of the tokens with the lowest score, oldest first."""
        by_age = kept.token_indices.argsort(dim=1)
        candidates = by_age[:, : by_age.shape[1] - self.recent_tokens]
        scores = self.scores(kept).gather(1, candidates)
        lowest = scores.argsort(dim=1, stable=True)[:, :evict_tokens]
        return candidates.gather(1, lowest.sort(dim=1).values)

    def segments_per_stretch(self, window_tokens: int, evict_tokens: int) -> int:
        """The next choice needs the scores of the last segment."""
        return 1

    def check(self, window_tokens: int, evict_tokens: int) -> None:
        """Refuses a window that the protected tokens leave too small for one block.

        Raises:
            ValueError: recent_tokens + evict_tokens exceeds window_tokens.
        """
        if self.recent_tokens + evict_tokens > window_tokens:
            raise ValueError(
                f"recent_tokens + evict_tokens must not exceed window_tokens ({window_tokens}), got "
                f"{self.recent_tokens} + {evict_tokens}; use recent_tokens of at most {window_tokens - evict_tokens}"
            )


def needed(part: Tensor | None) -> Tensor:
    """A part of `KeptTokens` that the policy said it needs."""
    assert part is not None
    return part.to(torch.promote_types(part.dtype, torch.float32))
