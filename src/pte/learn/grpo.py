"""One GRPO step: rollouts of the bounded policy, rewards, advantages, replay, loss, update.

Decides: which prompts a step uses (with dynamic sampling: until enough groups have mixed accuracy), what is measured,
and that nothing is updated when rollout and replay disagree by more than the threshold (law 1).
It starts at the first problem of the task's endless order, whether or not a warm start has seen it.
Several ranks sample whole groups in turns and exchange their rollouts, so that every rank knows the whole batch and
decides as the others do; each replays a share of each mini-batch, and gradients add up in the optimizer's step.
Does not know: logging, checkpoints (`trainer`), how log-probs are made (`replay`).

Paper: the cache-aware GRPO objective, E_{y ~ pi^D}[r(y) - beta KL(pi^D || pi_ref)].
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch.nn.utils.rnn import pad_sequence

from pte.learn.advantages import group_advantages, mixed_accuracy_groups, tied_groups
from pte.learn.loss import BatchTotals, PolicyObjective, policy_loss
from pte.learn.optimizer import AdapterOptimizer, TrainingStopped, backpropagate, check_finite_loss
from pte.learn.scored import Group, ScoredRollout, completion_row, score_rollouts
from pte.learn.stage import StepResult, by_length, peak_memory_bytes
from pte.ranks import ALONE, Ranks
from pte.rollout.generate import RolloutEngine
from pte.rollout.record import RolloutRequest, collate_rollouts, logprob_gap
from pte.rollout.replay import Replay
from pte.rollout.sampling import stream_seed

if TYPE_CHECKING:
    from pte.checkpoint_files import StateTree
    from pte.tasks.task import Task

CUT_OFF_WARNING_FRACTION = 0.95


@dataclass(frozen=True)
class ReplayedShare:
    """What a rank's share of a mini-batch says of the whole; shares add up.

    Args:
        sums: Shares of means over the mini-batch, by metric.
        gap_max: Largest gap of a token between rollout and replay, nats; 0 for an empty share.
    """

    sums: dict[str, float]
    gap_max: float


class GrpoStage:
    """Reinforcement on the policy's own bounded rollouts.

    Args:
        task: Problems and rewards.
        engine: Rollouts of the policy that is trained.
        replay: Of the same policy, in the stage's gradient mode.
        reference: Replay of the frozen base for the KL term, or None with beta 0.
        optimizer: Of the policy's adapter.
        objective: Loss, clipping, beta.
        steps: Batches of rollouts.
        prompts_per_step: Groups in a batch.
        group_size: Completions of each prompt.
        minibatches_per_step: Optimizer steps on each batch.
        micro_batch_size: Completions per replay.
        dynamic_sampling: Replace groups without mixed accuracy.
        max_resample_rounds: Further rounds of rollouts at most.
        max_logprob_gap: Threshold in nats at which the run stops.
        seed: Of prompts and rollouts.
        log_completions: Return completions with each step.
        ranks: Processes that share each step.
    """

    name = "grpo"

    def __init__(
        self,
        task: Task,
        engine: RolloutEngine,
        *,
        replay: Replay,
        reference: Replay | None,
        optimizer: AdapterOptimizer,
        objective: PolicyObjective,
        steps: int,
        prompts_per_step: int,
        group_size: int,
        minibatches_per_step: int,
        micro_batch_size: int,
        dynamic_sampling: bool,
        max_resample_rounds: int,
        max_logprob_gap: float,
        seed: int,
        log_completions: bool,
        ranks: Ranks = ALONE,
    ) -> None:
        self.task = task
        self.engine = engine
        self.replay = replay
        self.reference = reference
        self.optimizer = optimizer
        self.objective = objective
        self.steps = steps
        self.prompts_per_step = prompts_per_step
        self.group_size = group_size
        self.minibatches_per_step = minibatches_per_step
        self.micro_batch_size = micro_batch_size
        self.dynamic_sampling = dynamic_sampling
        self.max_resample_rounds = max_resample_rounds
        self.max_logprob_gap = max_logprob_gap
        self.seed = seed
        self.log_completions = log_completions
        self.ranks = ranks
        self.position = 0

    def step(self, index: int) -> StepResult:
        """Rollouts, rewards, and `minibatches_per_step` optimizer steps on them."""
        started = time.perf_counter()
        groups, rounds = self.collect_groups(index)
        rollout_seconds = time.perf_counter() - started
        rewards = torch.tensor([[one.reward for one in group] for group in groups], dtype=torch.float64)
        advantages = group_advantages(rewards, scale="none" if self.objective.kind == "dr_grpo" else "std")
        scored = [
            replace(one, advantage=advantage)
            for group, row in zip(groups, advantages.tolist(), strict=True)
            for one, advantage in zip(group, row, strict=True)
        ]
        size = -(-len(scored) // self.minibatches_per_step)
        updates = [self.update(scored[start : start + size], first=start == 0) for start in range(0, len(scored), size)]
        peaks, cache_bytes = zip(
            *self.ranks.gather((peak_memory_bytes(self.engine.policy.device), self.engine.peak_cache_bytes)),
            strict=True,
        )
        seconds = time.perf_counter() - started
        tied = tied_groups(rewards).double().mean().item()
        metrics = {
            **{key: statistics.fmean(update[key] for update in updates) for key in updates[0]},
            # After the first update the policy has moved on: only the first shows the gap of law 1.
            **{key: value for key, value in updates[0].items() if key.startswith("logprob_gap")},
            **self.rollout_metrics(scored),
            "cache_bytes": float(max(cache_bytes)),
            "tied_groups_fraction": tied,
            "resample_rounds": float(rounds),
            "seconds": seconds,
            "rollout_seconds": rollout_seconds,
            "replay_seconds": seconds - rollout_seconds,
            "tokens_per_second": sum(len(one.rollout.completion_ids) for one in scored) / seconds,
            "peak_memory_bytes": float(max(peaks)),
        }
        warnings = []
        if metrics["cut_off_fraction"] >= CUT_OFF_WARNING_FRACTION:
            warnings.append(
                f"{metrics['cut_off_fraction']:.0%} of the completions were cut off at {self.engine.max_new_tokens} "
                f"tokens; raise rollout.max_new_tokens, or check that the policy ever writes its end token"
            )
        if tied == 1.0:
            warnings.append(
                f"all {len(groups)} groups tie (reward {metrics['reward']:.3g}): this step has no gradient; use easier "
                f"or harder problems, more completions per prompt, or a warm start"
            )
        rows = [completion_row(one) for one in scored] if self.log_completions else []
        return StepResult(metrics, rows, warnings)

    def collect_groups(self, index: int) -> tuple[list[Group], int]:
        """Groups of rollouts, and how many further rounds dynamic sampling took.

        Without dynamic sampling, the first groups. With it, groups of mixed accuracy first; where the rounds end
        before there are enough, tied ones fill the batch.
        """
        kept: list[Group] = []
        spare: list[Group] = []
        for round_index in range(self.max_resample_rounds + 1):
            groups = self.sample_groups(index, round_index, count=self.prompts_per_step - len(kept))
            if not self.dynamic_sampling:
                return groups, 0
            accuracies = torch.tensor([[one.accuracy for one in group] for group in groups], dtype=torch.float64)
            for group, mixed in zip(groups, mixed_accuracy_groups(accuracies).tolist(), strict=True):
                (kept if mixed else spare).append(group)
            if len(kept) == self.prompts_per_step:
                return kept, round_index
        return kept + spare[: self.prompts_per_step - len(kept)], self.max_resample_rounds

    def sample_groups(self, index: int, round_index: int, *, count: int) -> list[Group]:
        """Rollouts and rewards of the next `count` problems; each rank samples its share of the groups."""
        problems = [self.task.training(self.position + offset).problem for offset in range(count)]
        self.position += count
        requests = [
            [
                RolloutRequest(
                    self.task.prompt_ids(problem),
                    stream_seed(self.seed, "grpo", index, round_index, problem.id, offset, member),
                )
                for member in range(self.group_size)
            ]
            for offset, problem in enumerate(problems)
        ]

        def sample() -> list[Group]:
            own = [request for group in self.ranks.share(requests) for request in group]
            if not own:
                return []
            repeated = [problem for problem in self.ranks.share(problems) for _ in range(self.group_size)]
            scored = score_rollouts(self.task, self.engine.run(own), repeated)
            return [scored[start : start + self.group_size] for start in range(0, len(scored), self.group_size)]

        return self.ranks.whole(self.ranks.together(sample, stop=TrainingStopped))

    def update(self, scored: Sequence[ScoredRollout], *, first: bool) -> dict[str, float]:
        """One optimizer step on a mini-batch.

        Args:
            scored: Rollouts with advantages.
            first: The policy is still the one that sampled: its log-probs are those that were recorded, and the gap
                to those that the replay finds must be small.

        Raises:
            TrainingStopped: Gap, loss or gradient are beyond what a sound run shows; nothing was updated.
        """
        totals = BatchTotals(sequences=len(scored), tokens=sum(len(one.rollout.completion_ids) for one in scored))
        try:
            shares = self.ranks.together(
                lambda: self.replay_share(scored, totals=totals, first=first), stop=TrainingStopped
            )
        except TrainingStopped:
            self.optimizer.adamw.zero_grad()
            raise
        grad_norm, learning_rate = self.optimizer.step()
        return {
            **{key: sum(share.sums[key] for share in shares) for key in shares[0].sums},
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "logprob_gap_max": max(share.gap_max for share in shares),
        }

    def replay_share(self, scored: Sequence[ScoredRollout], *, totals: BatchTotals, first: bool) -> ReplayedShare:
        """This rank's part of a mini-batch, whose gradients are added to the parameters'.

        Args:
            scored: The whole mini-batch.
            totals: Its size.
            first: As in `update`.

        Raises:
            TrainingStopped: As in `update`.
        """
        names = ("loss", "entropy", "clip_fraction", "ratio", "kl", "logprob_gap_mean", "logprob_gap_kl")
        sums, gap_max = dict.fromkeys(names, 0.0), 0.0
        for batch, learns in self.micro_batches(scored):
            padded = collate_rollouts([one.rollout for one in batch], device=self.engine.policy.device)
            rollout_logprobs = pad_sequence([one.rollout.rollout_logprobs for one in batch], batch_first=True)
            rollout_logprobs = rollout_logprobs.to(padded.completion_ids.device)
            # The policy that sampled has the log-probs that it recorded: one walk, whose own are compared below.
            with torch.set_grad_enabled(learns):
                output = self.replay(padded, recorded=rollout_logprobs if first else None)
            reference = None
            if self.reference is not None:
                with torch.no_grad():
                    reference = self.reference(padded).policy_logprobs
            mask = padded.completion_mask
            loss = policy_loss(
                output.policy_logprobs,
                rollout_logprobs,
                advantages=torch.tensor(
                    [one.advantage for one in batch], dtype=output.policy_logprobs.dtype, device=mask.device
                ),
                completion_mask=mask,
                objective=self.objective,
                totals=totals,
                reference_logprobs=reference,
            )
            check_finite_loss(loss.loss)
            if learns:
                backpropagate(loss.loss)
            gap = logprob_gap(output.replayed_logprobs, rollout_logprobs, completion_mask=mask)
            if first and not gap.max <= self.max_logprob_gap:
                raise TrainingStopped(
                    f"rollout and replay must agree within max_logprob_gap ({self.max_logprob_gap:g} nats), got "
                    f"{gap.max:.3g} (mean {gap.mean:.3g}): they are not the same policy; raise train.max_logprob_gap "
                    f"only if the dtype explains it"
                )
            share = int(mask.sum()) / totals.tokens
            sums["loss"] += loss.loss.item()
            sums["entropy"] += output.entropies.sum().item() / totals.tokens
            sums["clip_fraction"] += loss.clip_fraction.item() * share
            sums["ratio"] += loss.ratio_mean.item() * share
            sums["kl"] += 0.0 if loss.kl_mean is None else loss.kl_mean.item() * share
            sums["logprob_gap_mean"] += gap.mean * share
            sums["logprob_gap_kl"] += gap.kl * share
            gap_max = max(gap_max, gap.max)
        return ReplayedShare(sums, gap_max)

    def micro_batches(self, scored: Sequence[ScoredRollout]) -> Iterator[tuple[list[ScoredRollout], bool]]:
        """This rank's micro-batches, each with whether it has a gradient: without a KL term tied groups have none.

        They are replayed all the same, without a graph, so that the gap is measured on every completion.
        """
        learning = [one for one in scored if one.advantage != 0 or self.reference is not None]
        tied = [one for one in scored if one.advantage == 0 and self.reference is None]
        for group, learns in ((learning, True), (tied, False)):
            lengths = [len(one.rollout.completion_ids) for one in group]
            for batch in by_length(group, lengths, size=self.micro_batch_size, ranks=self.ranks):
                yield batch, learns

    def rollout_metrics(self, scored: Sequence[ScoredRollout]) -> dict[str, float]:
        """Means over the rollouts of a step."""
        rollouts = [one.rollout for one in scored]
        rewards = [one.reward for one in scored]
        return {
            "reward": statistics.fmean(rewards),
            "reward_std": statistics.pstdev(rewards),
            "accuracy": statistics.fmean(one.accuracy for one in scored),
            "completion_tokens": statistics.fmean(len(rollout.completion_ids) for rollout in rollouts),
            "cut_off_fraction": statistics.fmean(rollout.finish_reason == "length" for rollout in rollouts),
            "evictions": statistics.fmean(rollout.evictions for rollout in rollouts),
            "state_norm": statistics.fmean(rollout.state_norm for rollout in rollouts),
        }

    def state(self) -> dict[str, StateTree]:
        """The optimizer's state and the position in the endless order of problems."""
        return {"optimizer": self.optimizer.state(), "position": self.position}

    def load_state(self, state: Mapping[str, StateTree]) -> None:
        """Puts back what `state` returned."""
        optimizer, position = state["optimizer"], state["position"]
        assert isinstance(optimizer, dict) and isinstance(position, int)
        self.optimizer.load_state(optimizer)  # type: ignore[arg-type]
        self.position = position
