"""The spine: what one sampled completion is, and how a batch of them is laid out for the replay.

Decides: the fields that make a completion's log-probs reproducible. Does not know models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch.nn.utils.rnn import pad_sequence

from pte.rollout.sampling import check_temperature

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class RolloutRequest:
    """A prompt to complete.

    Args:
        prompt_ids: Token ids, at least one.
        stream_seed: Seed of the sequence's own random stream.
        max_new_tokens: Completion tokens at most; None for as many as the engine has room for.
        temperature: At least 1e-4, or 0 for greedy decoding; None for the engine's.

    Raises:
        ValueError: The prompt is empty, max_new_tokens is below 1, or nothing can be drawn at the temperature.
    """

    prompt_ids: tuple[int, ...]
    stream_seed: int
    max_new_tokens: int | None = None
    temperature: float | None = None

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise ValueError("a prompt must have at least 1 token, got none; check the problem and its template")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}; use for example 64")
        if self.temperature is not None:
            check_temperature(self.temperature)


def check_fits(request: RolloutRequest, *, prompt_slots: int, max_new_tokens: int, own_temperatures: bool) -> None:
    """Refuses a request that an engine has no room for.

    Args:
        request: A prompt to complete.
        prompt_slots: Longest prompt of the engine.
        max_new_tokens: Longest completion of the engine.
        own_temperatures: Whether the engine takes requests with temperatures of their own.

    Raises:
        ValueError: Prompt or completion are too long, or the temperature is not the request's to choose.
    """
    if len(request.prompt_ids) > prompt_slots:
        raise ValueError(
            f"a prompt must have at most {prompt_slots} tokens, got {len(request.prompt_ids)}; shorten it or open the "
            f"engine with more prompt_slots"
        )
    if request.max_new_tokens is not None and request.max_new_tokens > max_new_tokens:
        raise ValueError(
            f"max_new_tokens must be at most the engine's ({max_new_tokens}), got {request.max_new_tokens}; lower it "
            f"or make an engine with more"
        )
    if request.temperature is not None and not own_temperatures:
        raise ValueError(
            f"temperature must be left to the engine, got {request.temperature}; open it with own_temperatures"
        )


@dataclass(frozen=True)
class Rollout:
    """One completion and the log-probs under which it was sampled.

    Args:
        prompt_ids: Token ids of the prompt, no padding.
        completion_ids: Token ids of the completion, the stop token included.
        rollout_logprobs: Log-prob of each completion token when it was drawn, on the CPU.
        finish_reason: `stop` after a stop token, `length` when cut off.
        stream_seed: Seed of the sequence's stream.
        temperature: Of the distribution that drew it.
        evictions: Evictions that happened.
        state_norm: Frobenius norm of the running state at the end, mean over layers; 0 without a state.
        evicted_tokens: Reasoning indices that left at each eviction, on the CPU; None for policies whose choice is a
            function of index and seed alone.
    """

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    rollout_logprobs: Float[Tensor, " completion"]
    finish_reason: FinishReason
    stream_seed: int
    temperature: float
    evictions: int
    state_norm: float
    evicted_tokens: Int[Tensor, "evictions evicted"] | None = None


@dataclass(frozen=True)
class ReplayBatch:
    """Completions side by side, right-padded.

    Args:
        prompt_ids: Padded with 0.
        prompt_lengths: Real tokens of each prompt.
        completion_ids: Padded with 0.
        completion_lengths: Real tokens of each completion.
        stream_seeds: For policies that evict at random.
        temperature: Of the distribution that scores.
        evicted_tokens: Reasoning indices that left at each eviction, padded with -1; None where the replay chooses.
    """

    prompt_ids: Int[Tensor, "batch prompt"]
    prompt_lengths: Int[Tensor, " batch"]
    completion_ids: Int[Tensor, "batch completion"]
    completion_lengths: Int[Tensor, " batch"]
    stream_seeds: Int[Tensor, " batch"]
    temperature: float
    evicted_tokens: Int[Tensor, "batch evictions evicted"] | None = None

    @property
    def completion_mask(self) -> Bool[Tensor, "batch completion"]:
        """True on real completion tokens."""
        index = torch.arange(self.completion_ids.shape[1], device=self.completion_ids.device)
        return index < self.completion_lengths[:, None]

    def take(self, rows: Int[Tensor, " rows"]) -> ReplayBatch:
        """The given sequences, in that order."""
        return ReplayBatch(
            prompt_ids=self.prompt_ids[rows],
            prompt_lengths=self.prompt_lengths[rows],
            completion_ids=self.completion_ids[rows],
            completion_lengths=self.completion_lengths[rows],
            stream_seeds=self.stream_seeds[rows],
            temperature=self.temperature,
            evicted_tokens=None if self.evicted_tokens is None else self.evicted_tokens[rows],
        )


def collate(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    stream_seeds: Sequence[int],
    temperature: float,
    device: torch.device | str = "cpu",
    evicted_tokens: Sequence[Int[Tensor, "_ evicted"]] | None = None,
) -> ReplayBatch:
    """Prompts and completions as one padded batch.

    Args:
        prompts: Token ids.
        completions: Token ids.
        stream_seeds: Of each sequence.
        temperature: Of the distribution that scores.
        device: Of the batch.
        evicted_tokens: What left at each eviction of each sequence; None where the replay chooses.

    Raises:
        ValueError: A prompt or a completion is empty, or the numbers of sequences differ.
    """
    if not len(prompts) == len(completions) == len(stream_seeds):
        raise ValueError(
            f"prompts, completions and stream_seeds must be as many, got {len(prompts)}, {len(completions)} and "
            f"{len(stream_seeds)}; give one of each per sequence"
        )
    for name, sequences in (("prompt", prompts), ("completion", completions)):
        for index, sequence in enumerate(sequences):
            if not sequence:
                raise ValueError(f"every {name} must have at least 1 token, {name} {index} has none; leave it out")

    def lengths(sequences: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor([len(sequence) for sequence in sequences], device=device)

    return ReplayBatch(
        prompt_ids=right_pad(prompts).to(device),
        prompt_lengths=lengths(prompts),
        completion_ids=right_pad(completions).to(device),
        completion_lengths=lengths(completions),
        stream_seeds=torch.tensor(stream_seeds, device=device),
        temperature=temperature,
        evicted_tokens=None
        if evicted_tokens is None
        else pad_sequence(list(evicted_tokens), batch_first=True, padding_value=-1).to(device),
    )


def collate_rollouts(rollouts: Sequence[Rollout], *, device: torch.device | str = "cpu") -> ReplayBatch:
    """Rollouts as one padded batch.

    Raises:
        ValueError: They were drawn at different temperatures, or some record what was evicted and others do not.
    """
    temperatures = {rollout.temperature for rollout in rollouts}
    if len(temperatures) != 1:
        raise ValueError(f"rollouts of one batch must share a temperature, got {sorted(temperatures)}; split the batch")
    records = [rollout.evicted_tokens for rollout in rollouts if rollout.evicted_tokens is not None]
    if len(records) not in (0, len(rollouts)):
        raise ValueError(
            f"rollouts of one batch must all record evicted_tokens or none, got {len(records)} of {len(rollouts)}; "
            f"split the batch by the policy that made them"
        )
    return collate(
        [rollout.prompt_ids for rollout in rollouts],
        [rollout.completion_ids for rollout in rollouts],
        stream_seeds=[rollout.stream_seed for rollout in rollouts],
        temperature=temperatures.pop(),
        device=device,
        evicted_tokens=records or None,
    )


def right_pad(sequences: Sequence[Sequence[int]]) -> Int[Tensor, "batch tokens"]:
    """Token ids padded with 0 to the longest."""
    padded = torch.zeros(len(sequences), max(map(len, sequences)), dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        padded[row, : len(sequence)] = torch.tensor(sequence)
    return padded


@dataclass(frozen=True)
class LogprobGap:
    """How far the replay is from the rollout (law 1).

    Args:
        max: Largest absolute difference of a token's log-probs, nats.
        mean: Mean absolute difference, nats.
        kl: Mean of exp(d) - d - 1 with d = policy - rollout, an estimate of KL(rollout || policy) per token, nats.
    """

    max: float
    mean: float
    kl: float


def logprob_gap(
    policy_logprobs: Float[Tensor, "batch completion"],
    rollout_logprobs: Float[Tensor, "batch completion"],
    *,
    completion_mask: Bool[Tensor, "batch completion"],
) -> LogprobGap:
    """Gap between replayed and recorded log-probs over the real tokens."""
    gap = (policy_logprobs.detach() - rollout_logprobs)[completion_mask].cpu().double()
    return LogprobGap(max=gap.abs().max().item(), mean=gap.abs().mean().item(), kl=(gap.exp() - gap - 1).mean().item())
