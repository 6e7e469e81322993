"""Accuracy of a policy on held-out problems, with what it cost.

Decides: avg@k with its 95 % interval, pass@k, and which costs stand beside them (tokens, evictions, cache bytes). The
same function scores every arm: full cache, window, adapters, and controls of the state. Several ranks complete and
score a share of the completions each, and all get all of them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch

from pte.learn.rewards import compute_rewards
from pte.ranks import ALONE, RankLost, Ranks
from pte.rollout.generate import RolloutEngine
from pte.rollout.record import Rollout, RolloutRequest
from pte.rollout.sampling import stream_seed
from pte.rollout.token_step import StateControl
from pte.tasks.scoring import avg_at_k, avg_at_k_interval, pass_at_k, wilson_interval

if TYPE_CHECKING:
    from pte.checkpoint_files import Json
    from pte.config import ExperimentConfig
    from pte.model.policy import BoundedPolicy
    from pte.session import Session
    from pte.tasks.problems import Problem
    from pte.tasks.task import Task


@dataclass(frozen=True)
class Evaluation:
    """Scores of a policy on one set.

    Args:
        name: Of the set.
        problems: How many.
        samples_per_problem: k of avg@k.
        accuracy: avg@k, a fraction.
        ci95: 95 % interval of the accuracy.
        pass_at: pass@k by k.
        completion_tokens: Mean length.
        cut_off_fraction: Completions that reached the longest length.
        evictions: Mean number per completion.
        peak_cache_bytes: Keys and values of all slots; of several ranks, the most that one has.
        peak_state_bytes: States of all slots, likewise; 0 without any.
        seconds: Wall time.
    """

    name: str
    problems: int
    samples_per_problem: int
    accuracy: float
    ci95: tuple[float, float]
    pass_at: dict[int, float]
    completion_tokens: float
    cut_off_fraction: float
    evictions: float
    peak_cache_bytes: int
    peak_state_bytes: int
    seconds: float

    def as_json(self) -> dict[str, Json]:
        """Plain values."""
        plain = asdict(self)
        return {**plain, "ci95": list(self.ci95), "pass_at": {str(k): value for k, value in self.pass_at.items()}}


@dataclass(frozen=True)
class EvaluatedCompletion:
    """One completion of an evaluation.

    Args:
        problem: What it answers.
        text: The completion.
        right: Whether the answer is right.
        rollout: Its tokens.
    """

    problem: Problem
    text: str
    right: bool
    rollout: Rollout


def evaluate(
    policy: BoundedPolicy,
    task: Task,
    *,
    name: str,
    samples_per_problem: int,
    temperature: float,
    max_new_tokens: int,
    slots: int,
    pass_at: Sequence[int],
    seed: int,
    state_control: StateControl = "own",
    allow_beyond_trained_positions: bool = False,
    on_finish: Callable[[Rollout], None] | None = None,
    ranks: Ranks = ALONE,
) -> tuple[Evaluation, list[EvaluatedCompletion]]:
    """Completes every problem of a set and scores the answers.

    Args:
        policy: Under its own budget.
        task: Problems, prompts, accuracy.
        name: Of the set in `task.evaluation`.
        samples_per_problem: Completions of each problem.
        temperature: 0 for greedy.
        max_new_tokens: Longest completion.
        slots: Sequences decoded at once.
        pass_at: Each k of pass@k.
        seed: Of the samples.
        state_control: The policy's own states, or a control.
        allow_beyond_trained_positions: Run past the base's trained positions.
        on_finish: Called with each rollout of this rank as it ends.
        ranks: Processes that share the completions.

    Raises:
        ValueError: States are to be shuffled over several ranks.
    """
    if state_control == "shuffled" and ranks.size > 1:
        raise ValueError(
            f"state_control 'shuffled' needs one process, whose sequences are neighbours, got {ranks.size} ranks; run "
            f"pte eval without a launcher"
        )
    problems = task.evaluation[name]
    engine = RolloutEngine(
        policy,
        slots=slots,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        stop_token_ids=task.stop_token_ids,
        state_control=state_control,
        allow_beyond_trained_positions=allow_beyond_trained_positions,
    )
    started = time.perf_counter()
    requests = [
        RolloutRequest(task.prompt_ids(problem), stream_seed(seed, "eval", problem.id, sample))
        for problem in problems
        for sample in range(samples_per_problem)
    ]
    repeated = [problem for problem in problems for _ in range(samples_per_problem)]

    def complete() -> tuple[list[Rollout], list[str], list[float], tuple[int, int]]:
        own, asked = ranks.share(requests), ranks.share(repeated)
        if state_control == "shuffled":
            # Neighbours exchange states: they must be of different problems.
            by_sample = [own[sample::samples_per_problem] for sample in range(samples_per_problem)]
            shuffled = engine.run([request for column in by_sample for request in column], on_finish=on_finish)
            columns = [shuffled[start : start + len(problems)] for start in range(0, len(shuffled), len(problems))]
            rollouts = [rollout for row in zip(*columns, strict=True) for rollout in row]
        else:
            rollouts = engine.run(own, on_finish=on_finish)
        texts = [task.text(rollout.completion_ids) for rollout in rollouts]
        right = (
            []
            if not own
            else compute_rewards(
                task.accuracy,
                prompts=[problem.problem for problem in asked],
                completions=texts,
                completion_ids=[list(rollout.completion_ids) for rollout in rollouts],
                columns=task.columns(asked),
            )
        )
        return rollouts, texts, right, (engine.peak_cache_bytes, engine.peak_state_bytes)

    shares = ranks.together(complete, stop=RankLost)
    rollouts = ranks.whole([share[0] for share in shares])
    texts = ranks.whole([share[1] for share in shares])
    right = ranks.whole([share[2] for share in shares])
    correct = torch.tensor(right, dtype=torch.float64).view(len(problems), samples_per_problem) == 1.0
    if samples_per_problem == 1:
        interval = wilson_interval(int(correct.sum()), len(problems))
    else:
        interval = avg_at_k_interval(correct)
    evaluation = Evaluation(
        name=name,
        problems=len(problems),
        samples_per_problem=samples_per_problem,
        accuracy=avg_at_k(correct),
        ci95=(interval.low, interval.high),
        pass_at={k: pass_at_k(correct, k) for k in pass_at},
        completion_tokens=statistics.fmean(len(rollout.completion_ids) for rollout in rollouts),
        cut_off_fraction=statistics.fmean(rollout.finish_reason == "length" for rollout in rollouts),
        evictions=statistics.fmean(rollout.evictions for rollout in rollouts),
        peak_cache_bytes=max(peaks[0] for *_, peaks in shares),
        peak_state_bytes=max(peaks[1] for *_, peaks in shares),
        seconds=time.perf_counter() - started,
    )
    completions = [
        EvaluatedCompletion(problem, text, bool(score == 1.0), rollout)
        for problem, text, score, rollout in zip(repeated, texts, right, rollouts, strict=True)
    ]
    return evaluation, completions


def evaluate_session(
    session: Session,
    config: ExperimentConfig,
    *,
    name: str,
    on_finish: Callable[[Rollout], None] | None = None,
) -> tuple[Evaluation, list[EvaluatedCompletion]]:
    """Scores a session's policy on one set, as its configuration says.

    Args:
        session: Policy and task.
        config: Its sections eval, rollout, run and model are read.
        name: Of the set.
        on_finish: Called with each rollout as it ends.
    """
    return evaluate(
        session.policy,
        session.task,
        name=name,
        samples_per_problem=config.eval.samples_per_problem,
        temperature=config.eval.temperature,
        max_new_tokens=config.eval.max_new_tokens,
        slots=config.rollout.slots,
        pass_at=config.eval.pass_at,
        seed=config.run.seed,
        state_control=config.eval.state_control,
        allow_beyond_trained_positions=config.model.allow_beyond_trained_positions,
        on_finish=on_finish,
        ranks=session.ranks,
    )
