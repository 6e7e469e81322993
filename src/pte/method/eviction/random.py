"""Random eviction with the prompt protected: a strong baseline (arXiv 2609.03430).

Every choice is a hash of (stream seed, reasoning index, eviction number): no generator state, so that a batch
equals its singles and the replay keeps the very tokens that the rollout kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pte.method.eviction.policy import KeptTokens, Needs

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor


def mix64(x: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """Finaliser of splitmix64 on int64 with wrap-around: a bijection that spreads bits (Steele et al., 2014)."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


class UniformRandom:
    """Evicts tokens uniformly at random among all kept reasoning tokens."""

    name = "random"
    needs = Needs()

    def evicted_slots(self, kept: KeptTokens, *, evict_tokens: int) -> Int[Tensor, "batch evicted"]:
        """Slots of the evicted tokens, by ascending hash."""
        stream = mix64(mix64(kept.stream_seeds) + kept.eviction_index)
        scores = mix64(stream[:, None] + kept.token_indices)
        return scores.topk(evict_tokens, dim=1, largest=False, sorted=True).indices

    def segments_per_stretch(self, window_tokens: int, evict_tokens: int) -> int:
        """Any kept token may leave, the newest too."""
        return 1

    def check(self, window_tokens: int, evict_tokens: int) -> None:
        """Every budget works."""
