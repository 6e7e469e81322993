"""KeyDiff: tokens leave whose keys point where most keys point; distinct keys stay.

Source: Park et al., "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in
Resource-Constrained Environments" (arXiv 2504.15364): the score of a token is minus the cosine similarity of its key to
the mean of all normalised keys in the cache.
Deviations: 1. one choice for all layers and heads, by the mean of their scores; 2. the prompt, which stays, is not in
the mean; 3. `recent_tokens` can protect the newest, none by default as in the paper.
Keys are compared as the cache holds them, after the rotary embedding. No attention is observed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from pte.method.eviction.policy import KeptTokens, Needs
from pte.method.eviction.scored import LowestScore, needed

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class DistinctKeys(LowestScore):
    """Evicts the tokens whose keys are most like the mean direction; the newest `recent_tokens` stay."""

    name = "keydiff"
    needs = Needs(keys=True)

    def scores(self, kept: KeptTokens) -> Float[Tensor, "batch window"]:
        """Minus the cosine similarity to the mean direction, a layer at a time."""
        assert kept.keys is not None
        scores = []
        for keys in kept.keys:
            units = functional.normalize(needed(keys), dim=-1)
            scores.append(-functional.cosine_similarity(units, units.mean(2, keepdim=True), dim=-1).mean(1))
        return torch.stack(scores).mean(0)
