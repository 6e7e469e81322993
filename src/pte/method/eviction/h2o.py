"""H2O: heavy hitters stay, the tokens that were attended to least leave.

Source: Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models" (arXiv
2306.14048): the score of a token is its accumulated attention, the budget is shared between heavy hitters and the most
recent tokens ("equally" in its experiments).
Deviations: 1. one choice for all layers and heads, by the sum of their probabilities; 2. the prompt is protected and
has no score; 3. a block leaves at once instead of a token at every step; 4. what a token received while it was kept
counts, softmax over exactly the prompt, the kept tokens and the query's own, in rollouts and in replays alike.
As in the authors' code a token's own query counts among those that attend to it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pte.method.eviction.policy import KeptTokens, Needs
from pte.method.eviction.scored import LowestScore, needed

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class HeavyHitters(LowestScore):
    """Evicts the tokens that received the least attention since they entered; the newest `recent_tokens` stay."""

    name = "h2o"
    needs = Needs(attention="kept")

    def scores(self, kept: KeptTokens) -> Float[Tensor, "batch window"]:
        """Attention received so far."""
        return needed(kept.attention_received)
