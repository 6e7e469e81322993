"""A block leaves every row whose next token needs the room, and its keys and values enter the row's state.

Decides: how many rows one fold takes. Does not know: when the host looks, how tokens are computed.

Paper: S_e <- Normalize(S_e + S_e'), before K_e and V_e go. Deviation: an eviction happens before the token that needs
the room, which already reads the new state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from pte.method.eviction.policy import kept_tokens
from pte.model.segment import fold
from pte.timing import timed

if TYPE_CHECKING:
    from pte.model.policy import BoundedPolicy
    from pte.rollout.buffers import DecodeBuffers
    from pte.rollout.sequences import RunningSequence

EVICTED_NUMBERS = 2**26
"""Keys that one fold takes at most, over layers, rows and tokens: they and what is made of them need about 1 GB."""


@timed("decode")
def evict_where_due(policy: BoundedPolicy, buffers: DecodeBuffers, running: Sequence[RunningSequence | None]) -> None:
    """Folds and evicts a block in every sequence whose next token needs the room, some rows at a time.

    Args:
        policy: The bounded policy.
        buffers: Cache and states, written in place.
        running: The sequence in each row, or None.
    """
    schedule, shape = policy.schedule, policy.cache_shape
    due = [
        (row, sequence)
        for row, sequence in enumerate(running)
        if sequence is not None and schedule.evicts_at(sequence.entering)
    ]
    if due and schedule.evict_tokens is not None:
        size = max(1, EVICTED_NUMBERS // (shape.layers * schedule.evict_tokens * shape.kv_dim))
        for start in range(0, len(due), size):
            evict_rows(policy, buffers, due[start : start + size], evict_tokens=schedule.evict_tokens)


def evict_rows(
    policy: BoundedPolicy,
    buffers: DecodeBuffers,
    due: Sequence[tuple[int, RunningSequence]],
    *,
    evict_tokens: int,
) -> None:
    """Folds and evicts a block in each of the given rows."""
    schedule, eviction, device = policy.schedule, policy.eviction, policy.device
    rows = torch.tensor([row for row, _ in due], device=device)
    indices = [schedule.evictions_before(sequence.entering) - 1 for _, sequence in due]
    kept = kept_tokens(
        buffers.cache,
        eviction.needs,
        rows=rows,
        eviction_index=torch.tensor(indices, device=device),
        stream_seeds=buffers.stream_seeds[rows],
    )
    evicted = buffers.cache.evict(rows, eviction.evicted_slots(kept, evict_tokens=evict_tokens))
    if policy.records_evictions:
        left = (evicted.positions - buffers.cache.prompt_lengths[rows, None]).cpu()
        for (_, sequence), tokens in zip(due, left, strict=True):
            sequence.evicted.append(tokens)
    if buffers.states is not None and policy.adapter is not None and policy.adapter.folds:
        buffers.set_states(policy, rows, fold(policy, buffers.states[:, rows], evicted))
