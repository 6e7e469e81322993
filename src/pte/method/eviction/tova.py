"""TOVA: the tokens that the last query looks at least leave, however new they are.

Source: Oren et al., "Transformers are Multi-State RNNs" (arXiv 2401.06104), Token Omission Via Attention: the state of
a layer drops the token with the lowest attention of the last query, averaged over heads; nothing else protects a token.
Deviations: 1. one choice for all layers, by the sum of their probabilities; 2. the prompt is protected; 3. a block
leaves at once, by the query of the token before the eviction, instead of a token at every step.
Only that one query is observed: one in `evict_tokens`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pte.method.eviction.policy import KeptTokens, Needs
from pte.method.eviction.scored import LowestScore, needed

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class LastQueryAttention(LowestScore):
    """Evicts the tokens that the last query attends to least; no token is protected."""

    name = "tova"
    needs = Needs(attention="last")

    def __init__(self) -> None:
        super().__init__(recent_tokens=0)

    def scores(self, kept: KeptTokens) -> Float[Tensor, "batch window"]:
        """Attention of the last query."""
        return needed(kept.attention_received)
