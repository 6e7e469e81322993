"""The warm start: the bounded policy learns what the base does with its full cache.

Decides: whose completions are imitated (the task's right traces, or the base's own rollouts under the full cache) and
the loss, the mean negative log-prob of their tokens under the bounded policy, through the replay. On the teacher's
own rollouts its difference to the teacher's entropy is a Monte-Carlo estimate of KL(teacher || student).
Reinforcement alone does not invent a memory: a sparse reward with no warm start taught nothing in 500 steps.

Paper: none; ours, see docs/log.md.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch

from pte.learn.optimizer import AdapterOptimizer, TrainingStopped, backpropagate, check_finite_loss
from pte.learn.stage import StepResult, by_length, peak_memory_bytes
from pte.method.schedule import EvictionSchedule
from pte.ranks import ALONE, Ranks
from pte.rollout.generate import RolloutEngine
from pte.rollout.record import RolloutRequest, collate
from pte.rollout.replay import Replay
from pte.rollout.sampling import stream_seed

if TYPE_CHECKING:
    from pte.checkpoint_files import StateTree
    from pte.model.policy import BoundedPolicy
    from pte.tasks.task import Task

Source = Literal["traces", "teacher"]
Example = tuple[tuple[int, ...], tuple[int, ...]]


class DistillStage:
    """Imitation through the replay.

    Args:
        policy: The bounded policy that learns.
        task: Problems, and traces where they are imitated.
        replay: Of the same policy, in the stage's gradient mode.
        optimizer: Of the policy's adapter.
        steps: Optimizer steps.
        batch_size: Completions per step.
        micro_batch_size: Completions per replay.
        source: `traces` or `teacher`.
        temperature: Of the teacher's rollouts, and of the distribution that is scored.
        max_new_tokens: Of the teacher's rollouts.
        slots: Of the teacher's rollouts.
        seed: Of the teacher's rollouts.
        allow_beyond_trained_positions: Run past the base's trained positions.
        ranks: Processes that share each step.

    Raises:
        ValueError: `traces` where the task has none.
    """

    name = "distill"

    def __init__(
        self,
        policy: BoundedPolicy,
        task: Task,
        *,
        replay: Replay,
        optimizer: AdapterOptimizer,
        steps: int,
        batch_size: int,
        micro_batch_size: int,
        source: Source,
        temperature: float,
        max_new_tokens: int,
        slots: int,
        seed: int,
        allow_beyond_trained_positions: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        if source == "traces" and task.training(0).trace is None:
            raise ValueError(
                "distill.source 'traces' needs right traces, and this task has none; set distill.source to 'teacher', "
                "or task.traces_path to a file of traces"
            )
        self.policy = policy
        self.task = task
        self.replay = replay
        self.optimizer = optimizer
        self.steps = steps
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.source: Source = source
        self.temperature = temperature
        self.seed = seed
        self.ranks = ranks
        self.teacher = RolloutEngine(
            policy.without_adapter().with_cache(EvictionSchedule(None)),
            slots=slots,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            stop_token_ids=task.stop_token_ids,
            allow_beyond_trained_positions=allow_beyond_trained_positions,
        )

    def step(self, index: int) -> StepResult:
        """One optimizer step of imitation."""
        started = time.perf_counter()
        examples, teacher_nll = self.examples(index)
        lengths = [len(completion) for _, completion in examples]
        tokens = sum(lengths)
        try:
            shares = self.ranks.together(lambda: self.replay_share(index, examples), stop=TrainingStopped)
        except TrainingStopped:
            self.optimizer.adamw.zero_grad()
            raise
        total, entropy = (sum(part) for part in zip(*shares, strict=True))
        grad_norm, learning_rate = self.optimizer.step()
        peaks = self.ranks.gather(peak_memory_bytes(self.policy.device))
        seconds = time.perf_counter() - started
        metrics = {
            "loss": total,
            "entropy": entropy,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "completion_tokens": tokens / len(examples),
            "evictions": sum(map(self.policy.schedule.num_evictions, lengths)) / len(lengths),
            "tokens_per_second": tokens / seconds,
            "seconds": seconds,
            "peak_memory_bytes": float(max(peaks)),
        }
        if teacher_nll is not None:
            metrics["teacher_kl"] = total - teacher_nll
        return StepResult(metrics)

    def replay_share(self, index: int, examples: Sequence[Example]) -> tuple[float, float]:
        """This rank's part of the loss and of the mean entropy of a step; its gradients are added to the parameters'.

        Raises:
            TrainingStopped: The loss is not finite.
        """
        lengths = [len(completion) for _, completion in examples]
        tokens, total, entropy = sum(lengths), 0.0, 0.0
        order = [row for batch in by_length(range(len(examples)), lengths, size=len(examples)) for row in batch]
        # The seed of an example is that of its place in the micro-batch that it has where one process has them all.
        places = {row: place % self.micro_batch_size for place, row in enumerate(order)}
        for rows in by_length(range(len(examples)), lengths, size=self.micro_batch_size, ranks=self.ranks):
            padded = collate(
                [examples[row][0] for row in rows],
                [examples[row][1] for row in rows],
                stream_seeds=[stream_seed(self.seed, "distill", index, places[row]) for row in rows],
                temperature=self.temperature,
                device=self.policy.device,
            )
            # The loss is linear in the log-probs: its gradient is known before they are, and one walk finds both.
            unknown = torch.zeros(padded.completion_ids.shape, device=padded.completion_ids.device)
            output = self.replay(padded, recorded=unknown)
            backpropagate(-output.policy_logprobs.sum() / tokens)
            loss = -output.replayed_logprobs.sum() / tokens
            check_finite_loss(loss)
            total += loss.item()
            entropy += output.entropies.sum().item() / tokens
        return total, entropy

    def examples(self, index: int) -> tuple[list[Example], float | None]:
        """Prompts and completions to imitate, and the teacher's own mean negative log-prob of them."""
        problems = [self.task.training(index * self.batch_size + row) for row in range(self.batch_size)]
        prompts = [self.task.prompt_ids(one.problem) for one in problems]
        if self.source == "traces":
            traces = [self.task.completion_ids(one.trace) for one in problems if one.trace is not None]
            return list(zip(prompts, traces, strict=True)), None
        requests = [
            RolloutRequest(prompt, stream_seed(self.seed, "teacher", index, row)) for row, prompt in enumerate(prompts)
        ]
        rollouts = self.ranks.whole(
            self.ranks.together(lambda: self.teacher.run(self.ranks.share(requests)), stop=TrainingStopped)
        )
        tokens = sum(len(rollout.completion_ids) for rollout in rollouts)
        nll = -sum(rollout.rollout_logprobs.sum().item() for rollout in rollouts) / tokens
        return [(rollout.prompt_ids, rollout.completion_ids) for rollout in rollouts], nll

    def state(self) -> dict[str, StateTree]:
        """The optimizer's state; the order of problems follows from the step."""
        return {"optimizer": self.optimizer.state()}

    def load_state(self, state: Mapping[str, StateTree]) -> None:
        """Puts back what `state` returned."""
        optimizer = state["optimizer"]
        assert isinstance(optimizer, dict)
        self.optimizer.load_state(optimizer)  # type: ignore[arg-type]
