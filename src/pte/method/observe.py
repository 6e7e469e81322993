"""Who is attended to how much: explicit softmax probabilities, for eviction policies that ask for them.

Decides: how probabilities are summed over queries, heads and layers, a bounded number of them at a time. The attention
output is made elsewhere (`attention.grouped_attention`) and does not change when somebody observes.
Does not know: caches, what the sums are for.

Paper: none; the attention scores of H2O, R-KV, TOVA and SnapKV, and the counters of Scissorhands.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

ObservedQueries = Literal["kept", "since_eviction", "last"]
PROBABILITIES_PER_CHUNK = 2**24


class AttentionObserver:
    """Sums the probabilities that each key receives in one forward, over its layers.

    Args:
        queries: Index of the queries of each sequence that count; None for all of them.
        below_average: Count low probabilities instead of summing all.

    `received` holds the sums, float32 or wider; None before the first layer.
    """

    def __init__(self, *, queries: Int[Tensor, "batch counted"] | None = None, below_average: bool = False) -> None:
        self.queries = queries
        self.below_average = below_average
        self.received: Float[Tensor, "batch keys"] | None = None
        self.closed = False

    def take(self) -> Float[Tensor, "batch keys"]:
        """The sums; what is observed later, when a backward pass computes the forward again, counts nothing."""
        assert self.received is not None
        self.closed = True
        return self.received

    @torch.no_grad()
    def observe(
        self,
        query: Float[Tensor, "batch heads tokens head_dim"],
        key: Float[Tensor, "batch kv_heads keys head_dim"],
        *,
        mask: Float[Tensor, "batch 1 tokens keys"] | None,
        scaling: float,
    ) -> None:
        """Adds one layer.

        Args:
            query: As `grouped_attention` gets it.
            key: Likewise.
            mask: Likewise; None where query i sees keys 0 .. i, as in `causal_attention`.
            scaling: Likewise.
        """
        if self.closed:
            return
        layer = received_attention(
            query, key, mask=mask, scaling=scaling, queries=self.queries, below_average=self.below_average
        )
        self.received = layer if self.received is None else self.received + layer


def received_attention(
    query: Float[Tensor, "batch heads tokens head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    *,
    mask: Float[Tensor, "batch 1 tokens keys"] | None,
    scaling: float,
    queries: Int[Tensor, "batch counted"] | None = None,
    below_average: bool = False,
) -> Float[Tensor, "batch keys"]:
    """Probability that each key receives, summed over heads and the queries that count; or how often it was low.

    Equals: softmax(scaling q k^T + mask) with keys repeated over the group, summed over heads and counted queries; with
    `below_average`, the number of these that are below 1 / (keys that the query attends to), among these keys.
    """
    batch, heads, tokens, head_dim = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    group = heads // kv_heads
    if queries is not None:
        index = queries[:, None, :, None]
        query = query.gather(2, index.expand(-1, heads, -1, head_dim))
        mask = None if mask is None else mask.gather(2, index.expand(-1, 1, -1, keys))
    dtype = torch.promote_types(query.dtype, torch.float32)
    received = torch.zeros(batch, keys, dtype=dtype, device=query.device)
    size = max(1, PROBABILITIES_PER_CHUNK // (batch * heads * keys))
    for start in range(0, query.shape[2], size):
        part = query[:, :, start : start + size]
        packed = part.reshape(batch, kv_heads, -1, head_dim)
        scores = (packed @ key.transpose(2, 3)).to(dtype).mul_(scaling).view(batch, kv_heads, group, -1, keys)
        if mask is not None:
            scores += mask[:, :, None, start : start + size]
        else:
            index = torch.arange(tokens, device=query.device).expand(batch, -1) if queries is None else queries
            later = torch.arange(keys, device=query.device) > index[:, start : start + size, None]
            scores.masked_fill_(later[:, None, None], float("-inf"))
        given = scores.softmax(-1)
        if below_average:
            attended = scores > float("-inf")
            given = ((given < 1 / attended.sum(-1, keepdim=True)) & attended).to(dtype)
        received += given.sum((1, 2, 3))
    return received
