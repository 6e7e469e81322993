"""Our side: the rollout of the bounded policy, and one whole training step.

Decides: the adapters that are measured (all seven maps, A not zero) and what a step holds: rollout, reward, replay with
its backward, loss, optimizer. Does not know the baseline, nor which sizes are measured.

Paper: Section 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch.nn.utils.rnn import pad_sequence

from pte.bench.workload import (
    fixed_advantages,
    grpo_loss,
    make_optimizer,
    optimizer_step,
    parity_rewards,
    randomize_ups,
)
from pte.learn.loss import BatchTotals
from pte.learn.optimizer import backpropagate
from pte.method.adapter import AdapterKind, LowRankPair, ThoughtAdapter
from pte.model.policy import attach_adapter, detach_adapter, layer_sizes
from pte.rollout.generate import RolloutEngine
from pte.rollout.record import Rollout, RolloutRequest, collate_rollouts
from pte.rollout.replay import GradientMode, Replay
from pte.rollout.sampling import stream_seed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pte.model.policy import BoundedPolicy


def attach_trained(base: PreTrainedModel, kind: AdapterKind, *, rank: int, global_tokens: int) -> ThoughtAdapter:
    """Puts an adapter that has been trained a little on a base."""
    adapter = ThoughtAdapter(layer_sizes(base), kind=kind, rank=rank, global_tokens=global_tokens)
    randomize_ups(pair.up for pair in adapter.modules() if isinstance(pair, LowRankPair))
    attach_adapter(base, adapter)
    return adapter


@contextmanager
def attached(
    base: PreTrainedModel, kind: AdapterKind | None, *, rank: int, global_tokens: int
) -> Iterator[ThoughtAdapter | None]:
    """The same for the duration of a block; None attaches nothing."""
    if kind is None:
        yield None
        return
    try:
        yield attach_trained(base, kind, rank=rank, global_tokens=global_tokens)
    finally:
        detach_adapter(base)


class OurRollout:
    """Completions of the bounded policy, with their log-probs.

    Args:
        policy: The policy.
        prompts: Of each completion.
    """

    def __init__(self, policy: BoundedPolicy, prompts: Sequence[tuple[int, ...]]) -> None:
        self.policy = policy
        self.prompts = prompts
        self.path = ""
        self.cache_bytes = 0
        self.state_bytes = 0

    def run(self, tokens: int, seed: int) -> None:
        """Completes every prompt with `tokens` tokens."""
        self.sample(tokens, seed)

    def sample(self, tokens: int, seed: int) -> list[Rollout]:
        """Rollouts of exactly `tokens` tokens at temperature 1."""
        # An end token that no draw can give: the host looks for stopped rows as it does in training.
        engine = RolloutEngine(
            self.policy,
            slots=len(self.prompts),
            max_new_tokens=tokens,
            temperature=1.0,
            stop_token_ids=(self.policy.vocab,),
        )
        rollouts = engine.run(
            [
                RolloutRequest(prompt_ids=prompt, stream_seed=stream_seed(seed, row))
                for row, prompt in enumerate(self.prompts)
            ]
        )
        assert all(len(rollout.completion_ids) == tokens for rollout in rollouts)
        self.path = engine.path
        self.cache_bytes, self.state_bytes = engine.peak_cache_bytes, engine.peak_state_bytes
        return rollouts


class OurStep(OurRollout):
    """Training steps of the bounded policy.

    Args:
        policy: The policy, with an adapter.
        prompts: Of each completion.
        mode: Gradient mode of the replay.
        horizon: Evictions that gradients go through in mode `horizon`; not read in the others.
        micro_batch: Completions that are replayed at once.
        gradient_checkpointing: The replay computes layers again.
    """

    def __init__(
        self,
        policy: BoundedPolicy,
        prompts: Sequence[tuple[int, ...]],
        *,
        mode: GradientMode,
        horizon: int,
        micro_batch: int,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__(policy, prompts)
        self.replay = Replay(
            policy,
            gradient_mode=mode,
            horizon=horizon if mode == "horizon" else None,
            gradient_checkpointing=gradient_checkpointing,
        )
        self.micro_batch = micro_batch
        assert policy.adapter is not None
        self.optimizer = make_optimizer(policy.adapter.parameters())

    def run(self, tokens: int, seed: int) -> None:
        """Samples, scores, replays, descends."""
        rollouts = self.sample(tokens, seed)
        parity_rewards([rollout.completion_ids for rollout in rollouts])
        self.update(rollouts)

    def update(self, rollouts: Sequence[Rollout]) -> None:
        """One optimizer step on a batch of rollouts, a micro-batch at a time."""
        totals = BatchTotals(len(rollouts), tokens=sum(len(rollout.completion_ids) for rollout in rollouts))
        advantages = fixed_advantages(len(rollouts))
        for start in range(0, len(rollouts), self.micro_batch):
            rows = slice(start, start + self.micro_batch)
            batch = collate_rollouts(rollouts[rows], device=self.policy.device)
            recorded = pad_sequence([rollout.rollout_logprobs for rollout in rollouts[rows]], batch_first=True)
            recorded = recorded.to(self.policy.device)
            logprobs = self.replay(batch, recorded=recorded).policy_logprobs
            loss = grpo_loss(
                logprobs,
                recorded,
                advantages=advantages[rows],
                completion_mask=batch.completion_mask,
                totals=totals,
            )
            backpropagate(loss)
        optimizer_step(self.optimizer)


def given_rollouts(
    prompts: Sequence[tuple[int, ...]], completions: Sequence[tuple[int, ...]], *, logprob: float
) -> list[Rollout]:
    """Completions as if they had been sampled, every token with the same log-prob: an update costs what it costs."""
    return [
        Rollout(
            prompt_ids=prompt,
            completion_ids=completion,
            rollout_logprobs=torch.full((len(completion),), logprob),
            finish_reason="length",
            stream_seed=row,
            temperature=1.0,
            evictions=0,
            state_norm=0.0,
        )
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
    ]
