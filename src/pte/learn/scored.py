"""Completions with what they earned: the record that a step of GRPO works on.

Decides: how completions are scored, and what completions.jsonl says of one. Does not know: policies, losses.

Paper: the reward r(y) of the cache-aware GRPO objective.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pte.learn.rewards import compute_rewards
from pte.rollout.record import Rollout
from pte.timing import timed

if TYPE_CHECKING:
    from pte.checkpoint_files import Json
    from pte.tasks.problems import Problem
    from pte.tasks.task import Task


@dataclass(frozen=True)
class ScoredRollout:
    """A rollout with what it earned.

    Args:
        rollout: The completion.
        problem: What it answers.
        text: The completion as text.
        reward: What GRPO raises.
        accuracy: 1.0 where the answer is right.
        advantage: Reward relative to its group; 0 until it is known.
    """

    rollout: Rollout
    problem: Problem
    text: str
    reward: float
    accuracy: float
    advantage: float = 0.0


Group = list[ScoredRollout]


@timed("reward")
def score_rollouts(task: Task, rollouts: Sequence[Rollout], problems: Sequence[Problem]) -> list[ScoredRollout]:
    """Rollouts with rewards and accuracies.

    Args:
        task: Whose reward and accuracy count.
        rollouts: Completions.
        problems: The problem of each completion.

    Raises:
        RuntimeError, TypeError, ValueError: The reward function failed (`compute_rewards`).
    """
    texts = [task.text(rollout.completion_ids) for rollout in rollouts]
    arguments = {
        "prompts": [problem.problem for problem in problems],
        "completions": texts,
        "completion_ids": [list(rollout.completion_ids) for rollout in rollouts],
        "columns": task.columns(problems),
    }
    rewards = compute_rewards(task.reward, **arguments)  # type: ignore[arg-type]
    same = task.accuracy is task.reward
    accuracies = rewards if same else compute_rewards(task.accuracy, **arguments)  # type: ignore[arg-type]
    return [
        ScoredRollout(rollout, problem, text, reward, accuracy)
        for rollout, problem, text, reward, accuracy in zip(rollouts, problems, texts, rewards, accuracies, strict=True)
    ]


def completion_row(one: ScoredRollout) -> dict[str, Json]:
    """A line of completions.jsonl."""
    return {
        "problem_id": one.problem.id,
        "completion": one.text,
        "answer": one.problem.answer,
        "reward": one.reward,
        "accuracy": one.accuracy,
        "advantage": one.advantage,
        "tokens": len(one.rollout.completion_ids),
        "evictions": one.rollout.evictions,
        "finish_reason": one.rollout.finish_reason,
        "mean_logprob": one.rollout.rollout_logprobs.mean().item(),
    }
