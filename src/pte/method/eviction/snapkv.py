"""SnapKV: the newest queries vote on the older tokens, and a token's neighbours share its votes.

Source: Li et al., "SnapKV: LLM Knows What You are Looking for Before Generation" (arXiv 2404.14469): attention of an
observation window, the last tokens of a prompt, summed over its queries and pooled over neighbouring tokens; the tokens
with the most votes stay, and so does the observation window.
Deviations: 1. it compresses a prompt once, here the reasoning is compressed at every eviction, and the prompt stays;
2. one choice for all layers and heads, by the sum of their probabilities; 3. neighbours are neighbours among the kept
tokens, which they need not be in the text after the first eviction.
Pooling is by maximum over 7 tokens. Only the queries of the observation window are observed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn import functional

from pte.method.eviction.policy import KeptTokens, Needs
from pte.method.eviction.scored import LowestScore, needed

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

POOLED_TOKENS = 7


class ObservationWindow(LowestScore):
    """Evicts by the pooled votes of the newest `recent_tokens`, which observe and stay.

    Args:
        recent_tokens: Size of the observation window, from 1 to evict_tokens.

    Raises:
        ValueError: `recent_tokens` is below 1.
    """

    name = "snapkv"

    def __init__(self, recent_tokens: int) -> None:
        if recent_tokens < 1:
            raise ValueError(
                f"recent_tokens must be at least 1 (they observe), got {recent_tokens}; use for example 32"
            )
        super().__init__(recent_tokens)
        self.needs = Needs(attention="last", last_queries=recent_tokens)

    def scores(self, kept: KeptTokens) -> Float[Tensor, "batch window"]:
        """Votes; those of the tokens outside the observation window are pooled among them."""
        by_age = kept.token_indices.argsort(dim=1)
        votes = needed(kept.attention_received).gather(1, by_age)
        older = votes.shape[1] - self.recent_tokens
        votes[:, :older] = functional.max_pool1d(
            votes[:, None, :older], POOLED_TOKENS, stride=1, padding=POOLED_TOKENS // 2
        )[:, 0]
        return votes.gather(1, by_age.argsort(dim=1))

    def check(self, window_tokens: int, evict_tokens: int) -> None:
        """Refuses an observation window that is larger than a block, or leaves no room for one.

        Raises:
            ValueError: As the base class, or recent_tokens exceeds evict_tokens.
        """
        super().check(window_tokens, evict_tokens)
        if self.recent_tokens > evict_tokens:
            raise ValueError(
                f"recent_tokens must be at most evict_tokens ({evict_tokens}) with policy 'snapkv' (older queries are "
                f"not observed), got {self.recent_tokens}; use {evict_tokens} or less"
            )
