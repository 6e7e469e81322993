"""What leaves on a replay's walk: asked of the policy, or read from the rollout's record.

Decides: who is asked. A policy that needs nothing but indices and seeds is asked as the rollout asked it. One that
needs attention, keys or values could answer otherwise when these are rounded otherwise: the record of the rollout is
followed. Where there is none (a warm start on traces) the walk observes and asks, and `followed` hands its answers to
the walks that repeat it. Does not know: models, gradients.

Paper: Section 3, C_t^D = CachePrune_D(p, y_<t).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from pte.method.eviction.policy import kept_tokens
from pte.method.observe import AttentionObserver

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from pte.method.cache import BoundedCache
    from pte.method.schedule import Stretch
    from pte.model.policy import BoundedPolicy
    from pte.rollout.record import ReplayBatch


class EvictionChoices:
    """Evictions of a batch on one walk.

    Args:
        policy: The bounded policy.
        batch: Sorted by completion length, longest first.
    """

    def __init__(self, policy: BoundedPolicy, batch: ReplayBatch) -> None:
        self.policy = policy
        self.batch = batch
        self.records = policy.records_evictions and batch.evicted_tokens is None
        self.observed_queries = policy.eviction.needs.attention if self.records else None
        self.chosen: list[Int[Tensor, "sequences evicted"]] = []

    def observer(self, queries: Int[Tensor, "sequences tokens"]) -> AttentionObserver | None:
        """What a stretch that leads to an eviction is watched by.

        Args:
            queries: Index of the stretch's reasoning tokens; a prompt's do not count.
        """
        if self.observed_queries is None:
            return None
        needs = self.policy.eviction.needs
        last = queries[:, -needs.last_queries :] if self.observed_queries == "last" else queries
        return AttentionObserver(queries=last, below_average=needs.below_average)

    def plan(
        self, cache: BoundedCache, stretch: Stretch
    ) -> tuple[list[Int[Tensor, "sequences evicted"]], Bool[Tensor, "sequences segments slots"]]:
        """Window slots of each eviction in a stretch, in order, and the slots that each segment still holds.

        Args:
            cache: At the start of the stretch, with the sequences that are still active.
            stretch: Not the first; one segment for a policy that needs more than indices and seeds.
        """
        if self.policy.records_evictions and self.batch.evicted_tokens is not None:
            return self.follow_record(cache, stretch)
        block, active = self.policy.schedule.evict_tokens, cache.batch
        assert block is not None
        filled = cache.positions >= 0
        device = filled.device
        seen = kept_tokens(
            cache,
            self.policy.eviction.needs,
            rows=slice(None),
            eviction_index=torch.full((active,), stretch.first_eviction, device=device),
            stream_seeds=self.batch.stream_seeds[:active],
        )
        evicted_slots, kept = [], []
        for index in range(stretch.num_evictions):
            slots = self.policy.eviction.evicted_slots(seen, evict_tokens=block)
            if self.records:
                self.chosen.append(seen.token_indices.gather(1, slots))
            entering = torch.arange(block, device=device) + stretch.start + index * block
            table = seen.token_indices.scatter(1, slots, entering.expand(active, -1))
            seen = replace(seen, token_indices=table, eviction_index=seen.eviction_index + 1)
            filled = filled.scatter(1, slots + cache.prompt_slots, False)
            evicted_slots.append(slots)
            kept.append(filled)
        return evicted_slots, torch.stack(kept, dim=1)

    def follow_record(
        self, cache: BoundedCache, stretch: Stretch
    ) -> tuple[list[Int[Tensor, "sequences evicted"]], Bool[Tensor, "sequences segments slots"]]:
        """The recorded eviction before a stretch of one segment.

        Raises:
            ValueError: The record names other tokens than a block of those that are kept.
        """
        recorded, block = self.batch.evicted_tokens, self.policy.schedule.evict_tokens
        assert recorded is not None and block is not None
        table, index = cache.token_indices(), stretch.first_eviction
        fits = recorded.shape[1] > index and recorded.shape[2] == block
        tokens = recorded[: cache.batch, index] if fits else table.new_full((cache.batch, block), -1)
        same = table[:, None, :] == tokens[:, :, None]
        if not bool((same.any(1).sum(1) == block).all()):
            raise ValueError(
                f"evicted_tokens must name {block} kept reasoning tokens at eviction {index} of every completion that "
                f"gets there, got another record; replay rollouts with the cache they were made with, or leave the "
                f"record out"
            )
        slots = same.int().argmax(2)
        filled = (cache.positions >= 0).scatter(1, slots + cache.prompt_slots, False)
        return [slots], filled[:, None]

    def followed(self) -> ReplayBatch:
        """The batch with the record of what was chosen on this walk, for the walks that repeat it."""
        if not self.records:
            return self.batch
        size = (len(self.batch.completion_lengths), len(self.chosen), self.policy.schedule.evict_tokens or 0)
        record = torch.full(size, -1, dtype=torch.int64, device=self.batch.prompt_ids.device)
        for index, tokens in enumerate(self.chosen):
            record[: len(tokens), index] = tokens
        return replace(self.batch, evicted_tokens=record)


def note_attention(
    cache: BoundedCache,
    received: Float[Tensor, "sequences keys"],
    *,
    slots: Int[Tensor, "sequences tokens"],
    columns: Int[Tensor, "sequences tokens"],
    first: bool,
) -> None:
    """Puts what a stretch's queries gave where the tokens lie.

    Args:
        cache: Holds the tokens of the stretch already.
        received: Sums over the queries, layers and heads: of [slots | tokens of the stretch], in the first stretch
            of its own tokens alone.
        slots: Of the stretch's reasoning tokens, counted over prompt and window; nothing else lies in them.
        columns: Where these tokens stand in `received`.
        first: The first stretch.
    """
    window = torch.zeros_like(cache.free_slots, dtype=received.dtype)
    if not first:
        window += received[:, cache.prompt_slots : cache.positions.shape[1]]
    cache.add_attention(window.scatter(1, slots - cache.prompt_slots, received.gather(1, columns)))
