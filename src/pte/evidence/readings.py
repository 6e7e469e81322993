"""How a policy of the evidence is scored: accuracy, recall by age of eviction, the size of its state.

Decides: what is measured of a trained policy on a task that may be another than the one it was trained on, under a
cache that may be another. Does not know how it was trained.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from pte.arms import arm_config
from pte.model.segment import fold
from pte.open_policy import eviction_policy
from pte.rollout.record import collate
from pte.rollout.stretch import run_stretch
from pte.rollout.walk import Walk, expanded_first_state
from pte.session import Session, open_task
from pte.tasks.evaluate import evaluate_session
from pte.tasks.recall import read_completion
from pte.tasks.rollouts_file import ROLLOUTS, write_rollouts

if TYPE_CHECKING:
    from pte.config import ExperimentConfig
    from pte.evidence.measurements import Label
    from pte.method.cache import EvictedTokens
    from pte.method.schedule import EvictionSchedule
    from pte.report.measurements import Measurement
    from pte.tasks.evaluate import EvaluatedCompletion

ReadingKind = Literal["accuracy", "age", "state_size"]
STATE_EVICTIONS = 10_000
STATE_PROBLEMS = 8


@dataclass(frozen=True)
class Reading:
    """One scoring of a policy.

    Args:
        label: What the score is about.
        config: The PTE experiment, which the label's arm changes; its sections task, cache, eval and run say how the
            policy is scored.
        kind: `accuracy` of whole completions, on recall of each query; on recall, the same by `age` of eviction;
            `state_size` over 10,000 evictions.
    """

    label: Label
    config: ExperimentConfig
    kind: ReadingKind = "accuracy"


def session_of(session: Session, config: ExperimentConfig) -> Session:
    """The same base and adapter under an experiment's task and cache."""
    task = open_task(config, session.task.tokenizer)
    task = replace(task, more_stop_token_ids=session.task.more_stop_token_ids)
    policy = session.policy.with_cache(config.cache.schedule, eviction_policy(config.cache))
    return replace(session, task=task, policy=policy)


def show(session: Session, reading: Reading, path: Path) -> None:
    """Writes some completions of a reading for the report's viewer."""
    config = arm_config(reading.config, reading.label.arm)
    config = replace(config, eval=replace(config.eval, problems=ROLLOUTS))
    session = session_of(session, config)
    _, completions = evaluate_session(session, config, name=next(iter(session.task.evaluation)))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_rollouts(path, session.policy, session.task, completions)


def read(session: Session, reading: Reading) -> list[Measurement]:
    """Scores a session's policy under a reading's task, cache and evaluation."""
    config = arm_config(reading.config, reading.label.arm)
    session = session_of(session, config)
    if reading.kind == "state_size":
        return state_sizes(session, reading.label)
    evaluation, completions = evaluate_session(session, config, name=next(iter(session.task.evaluation)))
    if reading.kind == "age":
        return accuracy_by_age(completions, reading.label, schedule=config.cache.schedule)
    if config.task.kind == "recall":
        counts = [first_time_queries(one) for one in completions]
    else:
        counts = [(int(one.right), 1) for one in completions]
    each = evaluation.samples_per_problem
    by_problem = [tuple(map(sum, zip(*counts[at : at + each], strict=True))) for at in range(0, len(counts), each)]
    return [
        share(reading.label, "accuracy", by_problem),
        reading.label.measured("cache_bytes", float(evaluation.peak_cache_bytes)),
        reading.label.measured("state_bytes", float(evaluation.peak_state_bytes)),
        reading.label.measured("evictions", evaluation.evictions),
        reading.label.measured("completion_tokens", evaluation.completion_tokens),
    ]


def share(label: Label, metric: str, counts: Sequence[Sequence[int]]) -> Measurement:
    """The share of right answers, with as many independent answers as are as uncertain as these.

    Answers to one problem are alike: 4 samples of each of 256 problems say less than 1024 problems would. The variance
    of the share over problems, v, says how much less: p (1 - p) / v independent answers, from the number of problems up
    to that of answers. Where all answers are alike there is no v, and each problem counts once.

    Args:
        label: What it is about.
        metric: Its name.
        counts: (right answers, answers) of each problem; those without answers count for nothing.
    """
    counts = [one for one in counts if one[1]]
    problems, total = len(counts), sum(answers for _, answers in counts)
    value = sum(right for right, _ in counts) / total
    squared = sum((right - value * answers) ** 2 for right, answers in counts)
    independent = problems
    if squared > 0 and problems > 1:
        variance = squared / total**2 * problems / (problems - 1)
        independent = min(total, max(problems, round(value * (1 - value) / variance)))
    return label.measured(metric, value, right=round(value * independent), total=independent)


def first_time_queries(completion: EvaluatedCompletion) -> tuple[int, int]:
    """Right answers and expected ones, but for queries whose fact an earlier answer had stated again.

    A query that was never answered is wrong; where values do not vary, all are.
    """
    found = read_completion(completion.text, completion.problem.answer)
    right = sum(query.right and not query.restated for query in found.queries) if found.values_vary else 0
    return right, found.expected_queries - sum(query.restated for query in found.queries)


def accuracy_by_age(
    completions: Sequence[EvaluatedCompletion], label: Label, *, schedule: EvictionSchedule
) -> list[Measurement]:
    """Share of right answers to queries by how many evictions ago the asked value left, in octaves; 0 is "still kept".

    Queries whose fact an earlier answer had stated again have no one age and are left out. Beside the shares stands
    how many of the expected queries were answered at all: a completion that goes astray answers no more.

    Args:
        completions: Of the recall task.
        label: What they are about.
        schedule: That they were sampled under, oldest first.
    """
    counts: dict[int, list[tuple[int, int]]] = {}
    for one in completions:
        right: Counter[int] = Counter()
        total: Counter[int] = Counter()
        for correct, age in scored_queries(one, schedule):
            octave = 0 if age <= 0 else 2 ** int(math.log2(age))
            right[octave] += correct
            total[octave] += 1
        for octave in total:
            counts.setdefault(octave, []).append((right[octave], total[octave]))
    found = [read_completion(one.text, one.problem.answer) for one in completions]
    answered = [(len(one.queries), one.expected_queries) for one in found]
    return [
        share(label, "answered_fraction", answered),
        *(
            share(replace(label, setting={**label.setting, "evictions_ago": age}), "accuracy", counts[age])
            for age in sorted(counts)
        ),
    ]


def scored_queries(completion: EvaluatedCompletion, schedule: EvictionSchedule) -> list[tuple[bool, int]]:
    """For every query of a fact not yet stated again, whether it is right and how many evictions ago its fact left.

    The fact with reasoning index f leaves at eviction f // E (from 0); the answer at index q is predicted as token
    q - 1 enters. Where values do not vary, every query is wrong, as in `fraction_right`.
    """
    found = read_completion(completion.text, completion.problem.answer)
    block = schedule.evict_tokens
    return [
        (
            found.values_vary and query.right,
            0 if block is None else schedule.evictions_before(query.query_token - 1) - query.fact_token // block,
        )
        for query in found.queries
        if not query.restated
    ]


@torch.no_grad()
def state_sizes(session: Session, label: Label) -> list[Measurement]:
    """Largest |S| over layers and sequences, before normalisation and as it is read, after 1, 2, 4 ... evictions.

    What leaves the cache along right traces is folded again and again, 10,000 times.
    """
    policy = session.policy
    adapter = policy.adapter
    assert adapter is not None and adapter.encoder is not None
    blocks = trace_blocks(session)
    state = expanded_first_state(policy, STATE_PROBLEMS)
    assert state is not None
    measurements = []
    for eviction in range(1, STATE_EVICTIONS + 1):
        state = fold(policy, state, blocks[(eviction - 1) % len(blocks)])
        if eviction & (eviction - 1) == 0 or eviction == STATE_EVICTIONS:
            here = replace(label, setting={**label.setting, "evictions": eviction})
            read_state = adapter.encoder.read(state)
            measurements += [
                here.measured("state_norm", state.norm(dim=(2, 3)).max().item()),
                here.measured("read_norm", read_state.norm(dim=(2, 3)).max().item()),
            ]
    return measurements


@torch.no_grad()
def trace_blocks(session: Session) -> list[EvictedTokens]:
    """Keys and values of each eviction, in order, as the policy goes through right traces of one length."""
    policy, task = session.policy, session.task
    prompts, traces = [], []
    for index in range(STATE_PROBLEMS):
        one = task.training(index)
        assert one.trace is not None
        prompts.append(task.prompt_ids(one.problem))
        traces.append(task.completion_ids(one.trace))
    length = min(map(len, traces))
    walk = Walk(
        policy,
        collate(
            prompts,
            [trace[:length] for trace in traces],
            stream_seeds=range(STATE_PROBLEMS),
            temperature=1.0,
            device=policy.device,
        ),
    )
    blocks: list[EvictedTokens] = []
    for stretch in walk.stretches:
        start = walk.enter(stretch)
        _, keys, values = run_stretch(
            policy,
            start.inputs,
            cache_keys=walk.cache.keys,
            cache_values=walk.cache.values,
            states=start.states,
        )
        walk.store(start, keys=keys, values=values)
        if start.evicted is not None:
            blocks += start.evicted.blocks(start.inputs.evicted_slots[0].shape[1])
    return blocks
