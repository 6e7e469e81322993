"""What a replay has to know of completions that TRL keeps as padded tensors.

Decides: what travels beside TRL's own tensors when it shuffles, splits and reuses a batch (the lengths, the seeds, the
record of what left), and how its left-padded prompts and right-padded completions become a `ReplayBatch`.
TRL's completion mask is no measure of a completion: it is empty where a truncated one is left out of the loss.
Does not know: trainers, models, losses.

Paper: Section 3, the replay follows C_t^D of the rollout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.utils.rnn import pad_sequence

from pte.rollout.record import ReplayBatch

if TYPE_CHECKING:
    from typing import Self

    from jaxtyping import Int
    from torch import Tensor

    from pte.rollout.record import Rollout

PREFIX = "pte_"
"""Of the names under which a record travels, apart from TRL's own."""


@dataclass(frozen=True)
class ReplayRecord:
    """What the replay of a batch needs besides its tokens, a row for each completion.

    Args:
        completion_lengths: Tokens of each completion, the stop token included.
        stream_seeds: For policies that evict at random.
        evicted_tokens: Reasoning indices that left at each eviction, padded with -1; None where the policy's choice is
            a function of index and seed alone.
    """

    completion_lengths: Int[Tensor, " batch"]
    stream_seeds: Int[Tensor, " batch"]
    evicted_tokens: Int[Tensor, "batch evictions evicted"] | None

    @classmethod
    def of_rollouts(cls, rollouts: Sequence[Rollout], *, device: torch.device) -> Self:
        """The record of rollouts of one policy, in their order."""
        evicted = [rollout.evicted_tokens for rollout in rollouts if rollout.evicted_tokens is not None]
        return cls(
            completion_lengths=torch.tensor([len(rollout.completion_ids) for rollout in rollouts], device=device),
            stream_seeds=torch.tensor([rollout.stream_seed for rollout in rollouts], device=device),
            evicted_tokens=pad_sequence(evicted, batch_first=True, padding_value=-1).to(device) if evicted else None,
        )

    @classmethod
    def of_columns(cls, batch: Mapping[str, Tensor]) -> Self:
        """The record that came along with a batch of TRL's."""
        return cls(
            completion_lengths=batch[PREFIX + "completion_lengths"],
            stream_seeds=batch[PREFIX + "stream_seeds"],
            evicted_tokens=batch.get(PREFIX + "evicted_tokens"),
        )

    def columns(self) -> dict[str, Tensor]:
        """The record as entries of TRL's batch, whose tensors are shuffled and split row by row."""
        named = {
            "completion_lengths": self.completion_lengths,
            "stream_seeds": self.stream_seeds,
            "evicted_tokens": self.evicted_tokens,
        }
        return {PREFIX + name: column for name, column in named.items() if column is not None}


def replay_batch(
    input_ids: Int[Tensor, "batch tokens"],
    prompt_mask: Int[Tensor, "batch prompt"],
    record: ReplayRecord,
    *,
    temperature: float,
) -> ReplayBatch:
    """Prompts and completions side by side in one row each, as the replay takes them.

    Args:
        input_ids: Padded prompts, behind them right-padded completions.
        prompt_mask: 1 on real tokens of the prompts, wherever the padding is.
        record: Of the same completions.
        temperature: Of the distribution that scores.
    """
    width = prompt_mask.shape[1]
    real = prompt_mask.bool()
    prompt_lengths = real.sum(1)
    # Real tokens first, in their order.
    moved = (~real).to(torch.int8).argsort(dim=1, stable=True)
    prompts = (input_ids[:, :width] * real).gather(1, moved)[:, : int(prompt_lengths.max())]
    lengths = record.completion_lengths
    completions = input_ids[:, width : width + int(lengths.max())]
    inside = torch.arange(completions.shape[1], device=lengths.device) < lengths[:, None]
    return ReplayBatch(
        prompt_ids=prompts,
        prompt_lengths=prompt_lengths,
        completion_ids=completions * inside,
        completion_lengths=lengths,
        stream_seeds=record.stream_seeds,
        temperature=temperature,
        evicted_tokens=record.evicted_tokens,
    )
