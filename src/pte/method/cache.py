"""The bounded cache: fixed slots for keys, values and positions, one row per running sequence.

Decides: where a token's keys and values lie (a prompt region, then window slots), which slot the next reasoning
token takes (a free one first, then the slots of the last evicted block, in the policy's order: nothing is copied),
and what an eviction hands over. Positions are data stored beside the keys, -1 marks an empty slot; nothing is ever
derived from a length. Order does not matter to attention over rotated keys, so slots are never sorted. Keys and values
lie in the dtype that computes, or as float8 codes with a scale for each token and head; what is read is the former.
Does not know: models, states, when to evict (`schedule`), whom to evict (`eviction`).

Paper: Section 3, C_t^D = CachePrune_D(p, y_<t) with the prompt p never pruned.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from pte.method.float8 import FLOAT8, SCALE_BYTES, Float8Vectors, as_bytes, to_float8
from pte.method.token_slots import TokenSlots

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from pte.method.observe import ObservedQueries


@dataclass(frozen=True)
class CacheShape:
    """What one token costs.

    Args:
        layers: Decoder layers.
        kv_heads: Key and value heads per layer.
        head_dim: Numbers per head.
    """

    layers: int
    kv_heads: int
    head_dim: int

    @property
    def kv_dim(self) -> int:
        """Numbers of one token's keys in one layer, heads concatenated."""
        return self.kv_heads * self.head_dim

    def token_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of one token's keys and values over all layers, stored in a dtype, the scales of float8 included."""
        scale_bytes = self.kv_heads * SCALE_BYTES if dtype == FLOAT8 else 0
        return 2 * self.layers * (self.kv_dim * dtype.itemsize + scale_bytes)


@dataclass(frozen=True)
class EvictedTokens:
    """Keys and values that leave the cache, post-rotary as they were stored.

    Args:
        keys: Heads concatenated.
        values: Heads concatenated.
        positions: Absolute positions, to undo the rotary embedding.
    """

    keys: Float[Tensor, "layers batch evicted kv_dim"]
    values: Float[Tensor, "layers batch evicted kv_dim"]
    positions: Int[Tensor, "batch evicted"]

    def first(self, rows: int) -> EvictedTokens:
        """Those of the first sequences."""
        return EvictedTokens(self.keys[:, :rows], self.values[:, :rows], self.positions[:rows])

    def blocks(self, size: int) -> list[EvictedTokens]:
        """Those of each eviction, where they hold several of `size` tokens."""
        parts = (self.keys.split(size, dim=2), self.values.split(size, dim=2), self.positions.split(size, dim=1))
        return [EvictedTokens(*part) for part in zip(*parts, strict=True)]


@dataclass
class BoundedCache:
    """Keys, values and positions of a batch of sequences in fixed slots.

    Args:
        keys: Post-rotary keys, or their float8 codes; slots are prompt_slots prompt slots, then the window's.
        values: Values, or their codes, in the same slots.
        positions: Absolute position of the token in each slot, -1 where empty.
        prompt_lengths: Prompt tokens of each sequence; reasoning index = position - prompt length.
        free_slots: Window slots in the order in which new tokens take them.
        cursor: How many of `free_slots` are taken.
        prompt_slots: Size of the prompt region.
        dtype: In which keys and values are read and handed over.
        key_scales: Of float8 codes; None where keys and values lie in `dtype` itself.
        value_scales: Likewise.
        attention_received: Attention that the token in each window slot has received, 0 where empty; None unless
            `track_attention` was called.
        observed_queries: Whose attention that is.
    """

    keys: Float[Tensor, "layers batch kv_heads slots head_dim"]
    values: Float[Tensor, "layers batch kv_heads slots head_dim"]
    positions: Int[Tensor, "batch slots"]
    prompt_lengths: Int[Tensor, " batch"]
    free_slots: Int[Tensor, "batch window"]
    cursor: Int[Tensor, " batch"]
    prompt_slots: int
    dtype: torch.dtype
    key_scales: Float[Tensor, "layers batch kv_heads slots"] | None = None
    value_scales: Float[Tensor, "layers batch kv_heads slots"] | None = None
    attention_received: Float[Tensor, "batch window"] | None = None
    observed_queries: ObservedQueries = "kept"

    @classmethod
    def allocate(
        cls,
        shape: CacheShape,
        *,
        batch: int,
        prompt_slots: int,
        window_slots: int,
        dtype: torch.dtype,
        device: torch.device,
        float8: bool = False,
    ) -> BoundedCache:
        """An empty cache, stored in `dtype` or as float8; its bytes are `analytic_bytes` and never change."""
        size = (shape.layers, batch, shape.kv_heads, prompt_slots + window_slots, shape.head_dim)
        stored = FLOAT8 if float8 else dtype
        scales = [torch.ones(size[:-1], dtype=torch.bfloat16, device=device) if float8 else None for _ in range(2)]
        return cls(
            keys=torch.zeros(size, dtype=stored, device=device),
            values=torch.zeros(size, dtype=stored, device=device),
            positions=torch.full((batch, prompt_slots + window_slots), -1, dtype=torch.int64, device=device),
            prompt_lengths=torch.zeros(batch, dtype=torch.int64, device=device),
            free_slots=torch.arange(window_slots, device=device).repeat(batch, 1),
            cursor=torch.zeros(batch, dtype=torch.int64, device=device),
            prompt_slots=prompt_slots,
            dtype=dtype,
            key_scales=scales[0],
            value_scales=scales[1],
        )

    @property
    def kv_bytes(self) -> int:
        """Bytes that the keys and values take, their scales included."""
        return sum(stored.nbytes for both in self.stores() for stored in both if stored is not None)

    def stores(self) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
        """What holds the keys and what holds the values: numbers or codes, and the scales of codes."""
        return (self.keys, self.key_scales), (self.values, self.value_scales)

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return self.positions.shape[0]

    def track_attention(self, queries: ObservedQueries) -> None:
        """Starts to sum the attention that window tokens receive, float32 or wider, from the given queries."""
        dtype = torch.promote_types(self.dtype, torch.float32)
        self.attention_received = torch.zeros(self.free_slots.shape, dtype=dtype, device=self.keys.device)
        self.observed_queries = queries

    def add_attention(self, received: Float[Tensor, "batch window"]) -> None:
        """Notes what the window slots received from the newest queries, of those that are observed."""
        assert self.attention_received is not None
        self.attention_received += received

    def token_indices(self) -> Int[Tensor, "batch window"]:
        """Reasoning index of the token in each window slot; meaningless where the slot is empty."""
        return self.positions[:, self.prompt_slots :] - self.prompt_lengths[:, None]

    def place_prompt(
        self,
        rows: Int[Tensor, " rows"],
        keys: Float[Tensor, "layers rows kv_heads tokens head_dim"],
        values: Float[Tensor, "layers rows kv_heads tokens head_dim"],
        *,
        lengths: Int[Tensor, " rows"],
    ) -> None:
        """Makes `rows` hold right-padded prompts and an empty window, whatever they held before."""
        tokens = keys.shape[3]
        for (stored, scales), new in zip(self.stores(), (keys, values), strict=True):
            if scales is None:
                stored[:, rows, :, :tokens] = new
            else:
                rounded = to_float8(new)
                as_bytes(stored)[:, rows, :, :tokens] = as_bytes(rounded.codes)
                scales[:, rows, :, :tokens] = rounded.scales.to(scales.dtype)
        fresh = torch.full_like(self.positions[rows], -1)
        index = torch.arange(tokens, device=fresh.device)
        fresh[:, :tokens] = torch.where(index < lengths[:, None], index, -1)
        self.positions[rows] = fresh
        self.prompt_lengths[rows] = lengths
        window = self.free_slots.shape[1]
        self.free_slots[rows] = torch.arange(window, device=fresh.device)
        self.cursor[rows] = 0
        if self.attention_received is not None:
            self.attention_received[rows] = 0

    def take_slots(self, positions: Int[Tensor, "batch tokens"]) -> Int[Tensor, "batch tokens"]:
        """Gives the next tokens their slots and stores their positions.

        Args:
            positions: Absolute positions.

        Returns:
            Slot of each token, counted over prompt and window; in rows that take more than are free, the last one.
        """
        tokens, window = positions.shape[1], self.free_slots.shape[1]
        steps = torch.arange(tokens, device=positions.device)
        taken = (self.cursor[:, None] + steps).clamp_(max=window - 1)
        slots = self.prompt_slots + self.free_slots.gather(1, taken)
        self.positions.scatter_(1, slots, positions)
        self.cursor += tokens
        return slots

    def evict(self, rows: Int[Tensor, " rows"], slots: Int[Tensor, "rows evicted"]) -> EvictedTokens:
        """Empties window slots and hands over what they held; new tokens take them in the given order.

        Args:
            rows: Sequences that evict; none of their earlier slots is still free.
            slots: Window slots (0 is the first after the prompt region) of the evicted tokens, of one block or of
                several in a row.
        """
        absolute = slots + self.prompt_slots
        keys, values = (self.gather(store, rows, absolute) for store in self.stores())
        evicted = EvictedTokens(keys, values, self.positions[rows].gather(1, absolute))
        self.positions[rows[:, None], absolute] = -1
        self.free_slots[rows[:, None], torch.arange(slots.shape[1], device=slots.device)] = slots
        self.cursor[rows] = 0
        if self.attention_received is not None:
            self.attention_received[rows[:, None], slots] = 0
            if self.observed_queries != "kept":
                self.attention_received[rows] = 0
        return evicted

    def gather(
        self, store: tuple[Tensor, Tensor | None], rows: Int[Tensor, " rows"], slots: Int[Tensor, "rows evicted"]
    ) -> Float[Tensor, "layers rows evicted kv_dim"]:
        """Tokens in `slots` of `rows` of a store, heads concatenated."""
        stored, scales = store
        by_slot = stored.transpose(2, 3), None if scales is None else scales.transpose(2, 3)
        return self.wide(by_slot, (slice(None), rows[:, None], slots)).flatten(3)

    def wide(self, store: tuple[Tensor, Tensor | None], where: tuple[int | slice | Tensor, ...]) -> Tensor:
        """What a store of keys or values holds, in the dtype that computes; a view where nothing has to be made.

        Args:
            store: One of `stores()`.
            where: Layers, sequences, key heads and slots.
        """
        stored, scales = store
        if scales is None:
            return stored[where]
        return Float8Vectors(as_bytes(stored)[where].view(FLOAT8), scales[where]).wide(self.dtype)

    def token_slots(self, attended_slots: int) -> tuple[TokenSlots, TokenSlots]:
        """Where a step's keys and its values go, in every layer.

        Args:
            attended_slots: The first so many slots are handed back.
        """
        keys, values = (
            TokenSlots.of(*store, attended_slots=attended_slots, dtype=self.dtype) for store in self.stores()
        )
        return keys, values

    def compact(self, rows: Int[Tensor, " rows"]) -> BoundedCache:
        """The given sequences moved to the front, a layer at a time, so that no second cache ever exists.

        Args:
            rows: Ascending; what the others held is lost.
        """
        for stored in (one for both in self.stores() for one in both if one is not None):
            for layer in as_bytes(stored):
                layer[: len(rows)] = layer[rows]
        for stored in (self.positions, self.prompt_lengths, self.free_slots, self.cursor):
            stored[: len(rows)] = stored[rows]
        if self.attention_received is not None:
            self.attention_received[: len(rows)] = self.attention_received[rows]
        return self.first(len(rows))

    def first(self, count: int) -> BoundedCache:
        """The first `count` sequences; shares memory with this cache."""
        rows = slice(0, count)
        return replace(
            self,
            keys=self.keys[:, rows],
            values=self.values[:, rows],
            key_scales=None if self.key_scales is None else self.key_scales[:, rows],
            value_scales=None if self.value_scales is None else self.value_scales[:, rows],
            positions=self.positions[rows],
            prompt_lengths=self.prompt_lengths[rows],
            free_slots=self.free_slots[rows],
            cursor=self.cursor[rows],
            attention_received=None if self.attention_received is None else self.attention_received[rows],
        )


def analytic_bytes(shape: CacheShape, *, batch: int, prompt_slots: int, window_slots: int, dtype: torch.dtype) -> int:
    """Bytes of keys and values that `batch` sequences take: batch x (prompt + window) x bytes of a stored token."""
    return batch * (prompt_slots + window_slots) * shape.token_bytes(dtype)
