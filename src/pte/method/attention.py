"""Attention over prompt, kept window and the tokens themselves, for one token or for a stretch of many.

Decides: who attends to whom, given the positions in the cache. `DecodeAttention` writes each new token into its
slot and attends over the slots; `StretchAttention` computes many tokens at once over [slots | themselves, causal]
and collects their keys and values, leaving the cache alone. `grouped_attention` and, where nothing is cached and no
row has padding before its tokens, `causal_attention` are the two places where a kernel is chosen; the second needs no
mask, so that memory is linear in the tokens. An observer, where an eviction policy needs one, sees the same queries,
keys and mask.
Does not know: models, rotary embeddings (keys come rotated), states.

Paper: pi^D(y_t | C_t^D), the cache-constrained policy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from pte.method.float8 import rounded_to_float8

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from pte.method.cache import BoundedCache
    from pte.method.observe import AttentionObserver


MASK_ALIGNMENT = 16


def grouped_attention(
    query: Float[Tensor, "batch heads tokens head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys head_dim"],
    *,
    mask: Float[Tensor, "batch 1 packed keys"],
    scaling: float,
) -> Float[Tensor, "batch tokens heads head_dim"]:
    """softmax(scaling q k^T + mask) v, each key head shared by heads / kv_heads query heads and never repeated.

    Equals: repeat keys and values over the group, scores, softmax, weighted sum.

    Args:
        mask: `packed_mask` of what is added to the scores, 0 where True, -inf where not.
        scaling: Factor on the scores.
    """
    batch, heads, tokens, head_dim = query.shape
    kv_heads = key.shape[1]
    packed = query.reshape(batch, kv_heads, heads // kv_heads * tokens, head_dim)
    attended = functional.scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=scaling)
    if tokens == 1:
        # The heads in order are what turning the two axes would give.
        return attended.reshape(batch, 1, heads, head_dim)
    return attended.reshape(batch, heads, tokens, head_dim).transpose(1, 2)


def packed_mask(mask: Float[Tensor, "batch 1 tokens keys"], *, group: int) -> Float[Tensor, "batch 1 packed keys"]:
    """The mask of the queries of a group of heads behind each other, for every layer of a forward.

    Kernels keep their mask for the backward pass: made once, it lies in memory once, not once a layer. Its rows begin
    at multiples of `MASK_ALIGNMENT` numbers, as the CUDA kernel asks for, which would copy others in every layer.

    Args:
        mask: Of one head; that of a single token holds for all heads as it is.
        group: Query heads of a key head.
    """
    tokens, keys = mask.shape[2:]
    if tokens == 1 or (group == 1 and keys % MASK_ALIGNMENT == 0):
        return mask
    rows = functional.pad(mask, (0, -keys % MASK_ALIGNMENT))
    return rows.repeat(1, 1, group, 1)[..., :keys]


def causal_attention(
    query: Float[Tensor, "batch heads tokens head_dim"],
    key: Float[Tensor, "batch kv_heads tokens head_dim"],
    value: Float[Tensor, "batch kv_heads tokens head_dim"],
    *,
    scaling: float,
) -> Float[Tensor, "batch tokens heads head_dim"]:
    """softmax(scaling q k^T + causal mask) v, without a tensor of tokens x tokens numbers.

    Equals: `grouped_attention` under a mask that lets token i see tokens 0 .. i.

    Args:
        scaling: Factor on the scores.
    """
    group = query.shape[1] // key.shape[1]
    # Repeated, because a kernel without grouped heads would make all scores instead, and not say so.
    key, value = (x if group == 1 else x.repeat_interleave(group, dim=1) for x in (key, value))
    attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return attended.transpose(1, 2)


def additive(allowed: Bool[Tensor, "..."], dtype: torch.dtype) -> Float[Tensor, "..."]:
    """0 where allowed, -inf elsewhere."""
    zero = torch.zeros((), dtype=dtype, device=allowed.device)
    return torch.where(allowed, zero, float("-inf"))


class DecodeAttention:
    """One new token per sequence: its keys and values go into its slot, then it attends over all filled slots.

    Args:
        cache: Written in place.
        slots: Slot of each sequence's new token; its position is stored already.
        attended_slots: Slots looked at; every slot beyond is empty in every sequence.
        dtype: Of keys and values.
        observer: Sums what the slots receive, or None.
    """

    def __init__(
        self,
        cache: BoundedCache,
        slots: Int[Tensor, " batch"],
        *,
        attended_slots: int,
        dtype: torch.dtype,
        observer: AttentionObserver | None = None,
    ) -> None:
        kv_heads, slots_held, head_dim = cache.keys.shape[2:]
        self.slots = slots.view(-1, 1, 1, 1).expand(-1, kv_heads, 1, head_dim)
        self.observer = observer
        self.keys, self.values = cache.token_slots(attended_slots)
        positions = cache.positions if attended_slots == slots_held else cache.positions[:, :attended_slots]
        self.mask = additive(positions >= 0, dtype).view(-1, 1, 1, attended_slots)

    def attend(
        self,
        layer: int,
        query: Float[Tensor, "batch heads 1 head_dim"],
        *,
        key: Float[Tensor, "batch kv_heads 1 head_dim"],
        value: Float[Tensor, "batch kv_heads 1 head_dim"],
        scaling: float,
    ) -> Float[Tensor, "batch 1 heads head_dim"]:
        """Attention output of the new tokens in one layer."""
        keys = self.keys.put(layer, self.slots, key)
        values = self.values.put(layer, self.slots, value)
        if self.observer is not None:
            self.observer.observe(query, keys, mask=self.mask, scaling=scaling)
        return grouped_attention(query, keys, values, mask=self.mask, scaling=scaling)


class StretchAttention:
    """A stretch of tokens at once, given as (batch x segments) rows so that each row has one state.

    Args:
        keys: Post-rotary keys in the cache slots, or None when nothing is cached.
        values: Values in the same slots.
        mask: For every token of the stretch, over [slots | tokens of the stretch]: 0 or -inf; None for causal
            attention over the stretch alone, where nothing is cached.
        segments: Segments per sequence; row b * segments + s is segment s of sequence b.
        observer: Sums what slots and tokens receive, or None.
        float8: The cache stores float8, so that every token, the newest too, is attended to as float8 keeps it.

    Until `take` it collects what each layer adds and shows it to the observer. A layer that is computed again in a
    backward pass attends as it did, adds nothing, and is observed by nobody.
    """

    def __init__(
        self,
        keys: Float[Tensor, "layers batch kv_heads slots head_dim"] | None,
        values: Float[Tensor, "layers batch kv_heads slots head_dim"] | None,
        *,
        mask: Float[Tensor, "batch 1 tokens keys"] | None,
        segments: int,
        observer: AttentionObserver | None = None,
        float8: bool = False,
    ) -> None:
        assert keys is None or mask is not None, "cached slots need a mask"
        self.observer = observer
        self.keys = keys
        self.values = values
        self.mask = mask
        self.segments = segments
        self.float8 = float8
        self.packed: Tensor | None = None
        self.new_keys: dict[int, Tensor] = {}
        self.new_values: dict[int, Tensor] = {}
        self.taken = False

    def attend(
        self,
        layer: int,
        query: Float[Tensor, "rows heads segment_tokens head_dim"],
        *,
        key: Float[Tensor, "rows kv_heads segment_tokens head_dim"],
        value: Float[Tensor, "rows kv_heads segment_tokens head_dim"],
        scaling: float,
    ) -> Float[Tensor, "rows segment_tokens heads head_dim"]:
        """Attention output of the stretch's tokens in one layer."""
        rows, heads, segment_tokens, head_dim = query.shape
        query, key, value = (self.join_segments(x) for x in (query, key, value))
        if self.float8:
            key, value = rounded_to_float8(key), rounded_to_float8(value)
        if not self.taken:
            self.new_keys[layer], self.new_values[layer] = key, value
        if self.keys is not None and self.values is not None:
            key = torch.cat((self.keys[layer], key), dim=2)
            value = torch.cat((self.values[layer], value), dim=2)
        if self.observer is not None and not self.taken:
            self.observer.observe(query, key, mask=self.mask, scaling=scaling)
        if self.mask is None:
            attended = causal_attention(query, key, value, scaling=scaling)
        else:
            if self.packed is None:
                self.packed = packed_mask(self.mask, group=heads // key.shape[1])
            attended = grouped_attention(query, key, value, mask=self.packed, scaling=scaling)
        return attended.reshape(rows, segment_tokens, heads, head_dim)

    def take(
        self,
    ) -> tuple[
        Float[Tensor, "layers batch kv_heads tokens head_dim"], Float[Tensor, "layers batch kv_heads tokens head_dim"]
    ]:
        """Keys and values that the stretch adds, all layers; once, after the forward.

        They are let go here: a graph that computes its layers again holds this object, and they would hold the graph.
        """
        self.taken = True
        keys = torch.stack([self.new_keys.pop(layer) for layer in sorted(self.new_keys)])
        values = torch.stack([self.new_values.pop(layer) for layer in sorted(self.new_values)])
        return keys, values

    def join_segments(
        self, x: Float[Tensor, "rows heads segment_tokens head_dim"]
    ) -> Float[Tensor, "batch heads tokens head_dim"]:
        """Puts the segments of a sequence behind each other along the tokens."""
        if self.segments == 1:
            return x
        rows, heads, tokens, head_dim = x.shape
        split = x.reshape(rows // self.segments, self.segments, heads, tokens, head_dim)
        return split.transpose(1, 2).reshape(rows // self.segments, heads, self.segments * tokens, head_dim)


def stretch_mask(
    kept: Bool[Tensor, "batch segments slots"],
    real: Bool[Tensor, "batch tokens"],
    *,
    dtype: torch.dtype,
) -> Float[Tensor, "batch 1 tokens keys"]:
    """Who attends to whom in a stretch.

    Args:
        kept: Slots that each segment still holds.
        real: Tokens of the stretch that are not padding; padding is attended by itself alone, so that no row of
            scores is empty, and by nobody else.
        dtype: Of the scores.
    """
    batch, segments, _ = kept.shape
    tokens = real.shape[1]
    over_slots = kept.repeat_interleave(tokens // segments, dim=1)
    index = torch.arange(tokens, device=real.device)
    causal = (index[:, None] >= index) & real[:, None, :]
    over_tokens = causal | torch.eye(tokens, dtype=torch.bool, device=real.device)
    return additive(torch.cat((over_slots, over_tokens.expand(batch, -1, -1)), dim=2), dtype)[:, None]
