"""Scissorhands: tokens leave that most queries found unimportant; importance persists.

Source: Liu et al., "Scissorhands: Exploiting the Persistence of Importance Hypothesis for LLM KV Cache Compression at
Test Time" (arXiv 2305.17118): a counter for each token of the queries in a history window under which it received less
than 1/t of the attention; the highest counters leave at once, recent tokens stay.
Deviations: 1. one choice for all layers and heads, by the sum of their counters; 2. the history is all queries since
the last eviction (a block, the first time a window); 3. t is the number of tokens that a query attends to, the prompt
among them, which is protected and has no counter; 4. a token that entered later had fewer queries to be low under, so
age counts against a token, as it does in the paper; ten recent tokens are our default.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pte.method.eviction.policy import KeptTokens, Needs
from pte.method.eviction.scored import LowestScore, needed

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class PersistentImportance(LowestScore):
    """Evicts the tokens that most often received less than the average; the newest `recent_tokens` stay."""

    name = "scissorhands"
    needs = Needs(attention="since_eviction", below_average=True)

    def scores(self, kept: KeptTokens) -> Float[Tensor, "batch window"]:
        """Minus the times that a token received less than the average."""
        return -needed(kept.attention_received)
