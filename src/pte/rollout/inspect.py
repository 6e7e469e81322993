"""What happened inside a recorded rollout: whom each eviction took, and what it did to the state.

Decides: what is recorded of an eviction. The rollout is walked once more, as the replay walks it, without scores: the
evictions and states are those of the policy that sampled. Does not know problems, tokens as text, or files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pte.rollout.record import Rollout, collate_rollouts
from pte.rollout.stretch import run_stretch
from pte.rollout.walk import Walk

if TYPE_CHECKING:
    from torch import Tensor

    from pte.model.policy import BoundedPolicy


@dataclass(frozen=True)
class InspectedEviction:
    """One eviction of one sequence.

    Args:
        before_token: Index of the reasoning token that entered next.
        evicted_tokens: Indices of the reasoning tokens that left, ascending.
        state_norm: Per layer, |S|_F of the running state after it, as it is carried, before `read` normalises it;
            None without a state.
        state_change: Per layer, |S_new - S_old|_F; None without a state.
    """

    before_token: int
    evicted_tokens: tuple[int, ...]
    state_norm: tuple[float, ...] | None
    state_change: tuple[float, ...] | None


@dataclass(frozen=True)
class InspectedRollout:
    """The evictions of one sequence.

    Args:
        evictions: In order.
        first_state_norm: Per layer, |S|_F before any eviction; None without a state.
        state_bytes: Of the sequence's state over all layers; None without a state.
    """

    evictions: tuple[InspectedEviction, ...]
    first_state_norm: tuple[float, ...] | None
    state_bytes: int | None


@torch.no_grad()
def inspect_rollouts(policy: BoundedPolicy, rollouts: Sequence[Rollout]) -> list[InspectedRollout]:
    """Evictions and states of recorded rollouts, in their order; one more walk, no gradients.

    Equals: token by token, before reasoning token t enters, S' of the evicted keys and values folded into S.

    Args:
        policy: The one that made them, reading its own states.
        rollouts: Of one temperature; at least one.

    Raises:
        ValueError: There are none, or they were drawn at different temperatures.
    """
    if not rollouts:
        raise ValueError("inspect_rollouts needs at least 1 rollout, got none; run the engine first")
    order = sorted(range(len(rollouts)), key=lambda row: -len(rollouts[row].completion_ids))
    walk = Walk(policy, collate_rollouts([rollouts[row] for row in order], device=policy.device))
    first = None if walk.state is None else norms(walk.state)[0]
    state_bytes = None if walk.state is None else walk.state[:, 0].numel() * walk.state.dtype.itemsize
    evictions: list[list[InspectedEviction]] = [[] for _ in rollouts]
    for stretch in walk.stretches:
        start = walk.enter(stretch)
        slots, lengths = start.inputs.evicted_slots, walk.cache.prompt_lengths[:, None]
        blocks = [] if start.evicted is None else start.evicted.blocks(slots[0].shape[1])
        previous = start.before
        for number, block in enumerate(blocks):
            left = (block.positions - lengths).sort(dim=1).values.tolist()
            before_token = stretch.start + number * slots[0].shape[1]
            norm = change = None
            if start.states is not None and previous is not None:
                state = start.states[:, :, number]
                norm, change, previous = norms(state), norms(state - previous), state
            for row, tokens in enumerate(left):
                # A shorter sequence ends inside the stretch; its last token never enters.
                if before_token < walk.lengths[row] - 1:
                    evictions[row].append(
                        InspectedEviction(
                            before_token=before_token,
                            evicted_tokens=tuple(tokens),
                            state_norm=None if norm is None else norm[row],
                            state_change=None if change is None else change[row],
                        )
                    )
        _, keys, values = run_stretch(
            policy,
            start.inputs,
            cache_keys=walk.cache.keys,
            cache_values=walk.cache.values,
            states=start.states,
        )
        walk.store(start, keys=keys, values=values)
    inspected = {
        row: InspectedRollout(tuple(found), first, state_bytes) for row, found in zip(order, evictions, strict=True)
    }
    return [inspected[row] for row in range(len(rollouts))]


def norms(state: Tensor) -> list[tuple[float, ...]]:
    """Frobenius norm of each layer's state, a tuple for each sequence, from (layers, sequences, rank, rank)."""
    return [tuple(row) for row in state.square().sum((-2, -1)).sqrt().T.tolist()]
