"""The bounded cache: fixed slots for keys, values and positions, one row per running sequence.

Decides: where a token's keys and values lie (a prompt region, then window slots), which slot the next reasoning
token takes (a free one first, then the slots of the last evicted block, in the policy's order: nothing is copied),
and what an eviction hands over. Positions are data stored beside the keys, -1 marks an empty slot; nothing is ever
derived from a length. Order does not matter to attention over rotated keys, so slots are never sorted.
Does not know: models, states, when to evict (`schedule`), whom to evict (`eviction`).

Paper: Section 3, C_t^D = CachePrune_D(p, y_<t) with the prompt p never pruned.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

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
        """Bytes of one token's keys and values over all layers."""
        return 2 * self.layers * self.kv_dim * dtype.itemsize


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
        keys: Post-rotary keys; slots are prompt_slots prompt slots, then the window's.
        values: Values in the same slots.
        positions: Absolute position of the token in each slot, -1 where empty.
        prompt_lengths: Prompt tokens of each sequence; reasoning index = position - prompt length.
        free_slots: Window slots in the order in which new tokens take them.
        cursor: How many of `free_slots` are taken.
        prompt_slots: Size of the prompt region.
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
    ) -> BoundedCache:
        """An empty cache; its bytes are `analytic_bytes` and never change."""
        size = (shape.layers, batch, shape.kv_heads, prompt_slots + window_slots, shape.head_dim)
        return cls(
            keys=torch.zeros(size, dtype=dtype, device=device),
            values=torch.zeros(size, dtype=dtype, device=device),
            positions=torch.full((batch, prompt_slots + window_slots), -1, dtype=torch.int64, device=device),
            prompt_lengths=torch.zeros(batch, dtype=torch.int64, device=device),
            free_slots=torch.arange(window_slots, device=device).repeat(batch, 1),
            cursor=torch.zeros(batch, dtype=torch.int64, device=device),
            prompt_slots=prompt_slots,
        )

    @property
    def kv_bytes(self) -> int:
        """Bytes that the keys and values take."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return self.positions.shape[0]

    def track_attention(self, queries: ObservedQueries) -> None:
        """Starts to sum the attention that window tokens receive, float32 or wider, from the given queries."""
        dtype = torch.promote_types(self.keys.dtype, torch.float32)
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
        self.keys[:, rows, :, :tokens] = keys
        self.values[:, rows, :, :tokens] = values
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
        evicted = EvictedTokens(
            keys=self.gather(self.keys, rows, absolute),
            values=self.gather(self.values, rows, absolute),
            positions=self.positions[rows].gather(1, absolute),
        )
        self.positions[rows[:, None], absolute] = -1
        self.free_slots[rows[:, None], torch.arange(slots.shape[1], device=slots.device)] = slots
        self.cursor[rows] = 0
        if self.attention_received is not None:
            self.attention_received[rows[:, None], slots] = 0
            if self.observed_queries != "kept":
                self.attention_received[rows] = 0
        return evicted

    @staticmethod
    def gather(
        stored: Float[Tensor, "layers batch kv_heads slots head_dim"],
        rows: Int[Tensor, " rows"],
        slots: Int[Tensor, "rows evicted"],
    ) -> Float[Tensor, "layers rows evicted kv_dim"]:
        """Tokens in `slots` of `rows`, heads concatenated."""
        return stored.transpose(2, 3)[:, rows[:, None], slots].flatten(3)

    def compact(self, rows: Int[Tensor, " rows"]) -> BoundedCache:
        """The given sequences moved to the front, a layer at a time, so that no second cache ever exists.

        Args:
            rows: Ascending; what the others held is lost.
        """
        for layer in range(self.keys.shape[0]):
            self.keys[layer, : len(rows)] = self.keys[layer, rows]
            self.values[layer, : len(rows)] = self.values[layer, rows]
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
            positions=self.positions[rows],
            prompt_lengths=self.prompt_lengths[rows],
            free_slots=self.free_slots[rows],
            cursor=self.cursor[rows],
            attention_received=None if self.attention_received is None else self.attention_received[rows],
        )


def analytic_bytes(shape: CacheShape, *, batch: int, prompt_slots: int, window_slots: int, dtype: torch.dtype) -> int:
    """Bytes of keys and values that `batch` sequences take: batch x (prompt + window) x bytes of a token."""
    return batch * (prompt_slots + window_slots) * shape.token_bytes(dtype)
