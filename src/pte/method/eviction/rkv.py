"""R-KV: tokens leave that recent queries hardly look at, and whose keys others repeat.

Source: Cai et al., "R-KV: Redundancy-aware KV Cache Compression for Reasoning Models" (arXiv 2505.24133):
Z = lambda I - (1 - lambda) R with lambda = 0.1, I the attention of the newest queries, R a softmax over tokens of the
mean cosine similarity of a token's key to the others, where the newest token that is similar to a given one is not
called redundant because of it; the newest tokens, whose queries observe, stay.
Deviations: 1. one choice for all layers and heads, by the mean of their scores; 2. the observing queries are all since
the last eviction (a block, the first time a window) instead of the last 8; 3. I is a token's share of the attention to
kept reasoning tokens, so that it sums to 1 like R, without max-pooling over neighbours; the prompt, which stays, is in
neither; 4. where no token is similar, nothing is taken out of R.
The authors' code computes R for the first sequence of a batch alone; here every sequence has its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from pte.method.eviction.policy import KeptTokens, Needs
from pte.method.eviction.scored import LowestScore, needed

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

IMPORTANCE_WEIGHT = 0.1
SIMILAR_COSINE = 0.5
SIMILARITIES_PER_CHUNK = 2**24


class RedundantKeys(LowestScore):
    """Evicts by lambda x importance - (1 - lambda) x redundancy; the newest `recent_tokens` stay."""

    name = "rkv"
    needs = Needs(attention="since_eviction", keys=True)

    def scores(self, kept: KeptTokens) -> Float[Tensor, "batch window"]:
        """Z, the joint score."""
        received = needed(kept.attention_received)
        importance = received / received.sum(1, keepdim=True)
        redundancy = torch.zeros_like(importance)
        assert kept.keys is not None
        layers, batch, kv_heads, window, _ = kept.keys.shape
        by_age = kept.token_indices.argsort(dim=1)
        size = max(1, SIMILARITIES_PER_CHUNK // (kv_heads * window * window))
        for start in range(0, batch, size):
            rows = slice(start, start + size)
            for layer in range(layers):
                redundancy[rows] += key_redundancy(needed(kept.keys[layer, rows]), by_age[rows]).mean(1) / layers
        return IMPORTANCE_WEIGHT * importance - (1 - IMPORTANCE_WEIGHT) * redundancy


def key_redundancy(
    keys: Float[Tensor, "batch kv_heads window head_dim"], by_age: Int[Tensor, "batch window"]
) -> Float[Tensor, "batch kv_heads window"]:
    """R: softmax over a head's tokens of their keys' mean cosine similarity to the others'.

    Args:
        keys: Of the kept tokens.
        by_age: Slots of the tokens, oldest first.
    """
    _, kv_heads, window, head_dim = keys.shape
    order = by_age[:, None, :, None].expand(-1, kv_heads, -1, head_dim)
    units = functional.normalize(keys.gather(2, order), dim=-1)
    similarity = units @ units.transpose(2, 3)
    similarity.diagonal(dim1=2, dim2=3).zero_()
    similar = similarity > SIMILAR_COSINE
    age = torch.arange(window, device=keys.device)
    newest = torch.where(similar, age, -1).amax(-1, keepdim=True)
    similarity = similarity.masked_fill(age == newest, 0.0)
    redundancy = similarity.mean(2).softmax(-1)
    back = by_age.argsort(dim=1)[:, None].expand(-1, kv_heads, -1)
    return redundancy.gather(2, back)
