"""The host's account of the sequences that run, and what it reads back of them when it looks.

Decides: how tokens drawn since the last look, and whole rollouts, leave the device: one transfer for all rows; and that
a stop token is noticed here, where tokens are plain integers, and costs a step nothing. Does not know: when to look,
what anybody does with the tokens.

Paper: Section 3, rollouts from pi^D.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from pte.rollout.record import Rollout, RolloutRequest

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

    from pte.model.policy import BoundedPolicy
    from pte.rollout.buffers import DecodeBuffers


@dataclass
class RunningSequence:
    """Host-side account of the sequence in one row.

    Args:
        order: Of its request.
        request: What it completes.
        max_new_tokens: Completion tokens at most.
        temperature: Of its distribution.
        entering: Reasoning index of the token that enters next, if it still runs.
        evicted: Reasoning indices that left at each eviction, where they are recorded.
        looked_at_tokens: Completion tokens that the host has looked at, whether one of them ends the completion.
        reported_tokens: Completion tokens that have been handed on as they came.
    """

    order: int
    request: RolloutRequest
    max_new_tokens: int
    temperature: float
    entering: int = 0
    evicted: list[Tensor] = field(default_factory=list)
    looked_at_tokens: int = 0
    reported_tokens: int = 0


@dataclass(frozen=True)
class SeenRow:
    """What a look found in a row.

    Args:
        row: Where.
        sequence: Whose.
        drawn_tokens: Completion tokens so far, none behind a stop token.
        ended: Whether the completion is whole.
    """

    row: int
    sequence: RunningSequence
    drawn_tokens: int
    ended: bool


@dataclass(frozen=True)
class NewTokens:
    """Tokens of one sequence that the host has just seen.

    Args:
        order: Of its request.
        token_ids: In the order in which they were drawn.
        logprobs: Of each when it was drawn.
        top_ids: For each, the likeliest tokens in its place, the likeliest first; empty where they are not recorded.
        top_logprobs: Of these.
    """

    order: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    top_ids: tuple[tuple[int, ...], ...]
    top_logprobs: tuple[tuple[float, ...], ...]


def look(
    buffers: DecodeBuffers, running: Sequence[RunningSequence | None], *, stop_token_ids: Collection[int]
) -> list[SeenRow]:
    """How far every running sequence has come.

    Equals: the first stop token of each whole completion, looked for in all that was drawn since the last look.

    Args:
        buffers: What was drawn.
        running: The sequence in each row, or None.
        stop_token_ids: Tokens that end a completion; without any, nothing is copied from the device.
    """
    unseen = max((one.entering + 1 - one.looked_at_tokens for one in running if one is not None), default=0)
    newest = buffers.newest_tokens(unseen) if stop_token_ids and unseen else [[]] * len(running)
    seen = []
    for row, (sequence, tokens) in enumerate(zip(running, newest, strict=True)):
        if sequence is not None:
            sequence.looked_at_tokens = drawn = sequence.entering + 1
            # What is seen a second time stopped nothing the first time.
            places = enumerate(tokens, start=drawn - len(tokens))
            stop = next((place for place, token in places if token in stop_token_ids), None)
            ended = stop is not None or drawn == sequence.max_new_tokens
            seen.append(SeenRow(row, sequence, drawn if stop is None else stop + 1, ended))
    return seen


def new_tokens(buffers: DecodeBuffers, seen: Sequence[SeenRow]) -> list[NewTokens]:
    """The tokens of each row that have not been reported yet; they count as reported from now on."""
    fresh = [one for one in seen if one.drawn_tokens > one.sequence.reported_tokens]
    if not fresh:
        return []
    device = buffers.tokens.device
    starts = torch.tensor([one.sequence.reported_tokens for one in fresh], device=device)
    counts = [one.drawn_tokens - one.sequence.reported_tokens for one in fresh]
    columns = starts[:, None] + torch.arange(max(counts), device=device)
    # Rows with fewer tokens read on into their last column: nobody looks at it.
    places = (torch.tensor([one.row for one in fresh], device=device)[:, None], columns.clamp_(max=buffers.last_column))
    ids, logprobs = buffers.tokens[places].tolist(), buffers.logprobs[places].tolist()
    tops = None
    if buffers.top_ids is not None and buffers.top_logprobs is not None:
        tops = buffers.top_ids[places].tolist(), buffers.top_logprobs[places].tolist()
    reports = []
    for place, (one, count) in enumerate(zip(fresh, counts, strict=True)):
        one.sequence.reported_tokens = one.drawn_tokens
        reports.append(
            NewTokens(
                order=one.sequence.order,
                token_ids=tuple(ids[place][:count]),
                logprobs=tuple(logprobs[place][:count]),
                top_ids=() if tops is None else tuple(map(tuple, tops[0][place][:count])),
                top_logprobs=() if tops is None else tuple(map(tuple, tops[1][place][:count])),
            )
        )
    return reports


def whole_rollouts(
    policy: BoundedPolicy, buffers: DecodeBuffers, ended: Sequence[SeenRow], *, stop_token_ids: Collection[int]
) -> list[Rollout]:
    """The rollouts of rows that have ended."""
    rows = torch.tensor([one.row for one in ended], device=policy.device)
    longest = max(one.drawn_tokens for one in ended)
    tokens, logprobs = buffers.tokens[rows, :longest].tolist(), buffers.logprobs[rows, :longest].cpu()
    states = buffers.states
    norms = [0.0] * len(ended) if states is None else states[:, rows].float().norm(dim=(2, 3)).mean(0).tolist()
    rollouts = []
    for place, one in enumerate(ended):
        completion = tuple(tokens[place][: one.drawn_tokens])
        rollouts.append(
            Rollout(
                prompt_ids=one.sequence.request.prompt_ids,
                completion_ids=completion,
                rollout_logprobs=logprobs[place, : one.drawn_tokens].clone(),
                finish_reason="stop" if completion[-1] in stop_token_ids else "length",
                stream_seed=one.sequence.request.stream_seed,
                temperature=one.sequence.temperature,
                evictions=policy.schedule.num_evictions(one.drawn_tokens),
                state_norm=norms[place],
                evicted_tokens=recorded_evictions(policy, one.sequence),
            )
        )
    return rollouts


def recorded_evictions(policy: BoundedPolicy, sequence: RunningSequence) -> Int[Tensor, "evictions evicted"] | None:
    """What left a sequence at each of its evictions, where the replay cannot know it."""
    if not policy.records_evictions:
        return None
    if sequence.evicted:
        return torch.stack(sequence.evicted)
    return torch.zeros(0, policy.schedule.evict_tokens or 0, dtype=torch.int64)
