"""Evaluation: the embedded reasoner with and without its cache, what it costs, and what it must not depend on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pte.config import ExperimentConfig
from pte.method.cache import analytic_bytes
from pte.method.schedule import EvictionSchedule
from pte.model.policy import BoundedPolicy
from pte.rollout.record import Rollout
from pte.session import Session, open_session
from pte.tasks.evaluate import Evaluation, evaluate
from pte.tasks.scoring import pass_at_k, wilson_interval
from short_runs import odd_ids, open_short

pytestmark = pytest.mark.system


def scored(session: Session, **changes: object) -> tuple[Evaluation, list[bool], list[str]]:
    settings = {
        "name": "chained",
        "samples_per_problem": 1,
        "temperature": 0.0,
        "max_new_tokens": 56,
        "slots": 16,
        "pass_at": (1,),
        "seed": 0,
        **changes,
    }
    evaluation, completions = evaluate(session.policy, session.task, **settings)
    return evaluation, [one.right for one in completions], [one.text for one in completions]


def base_session(**changes: object) -> Session:
    _, session = open_short(adapter__kind="none", double=False, **changes)
    return session


@pytest.fixture(scope="module")
def thirteen_statements() -> Session:
    config = ExperimentConfig()
    return open_session(
        replace(
            config,
            adapter=replace(config.adapter, kind="none"),
            cache=replace(config.cache, policy="none"),
            eval=replace(config.eval, problems=32),
        )
    )


def test_the_embedded_reasoner_is_right_with_its_full_cache(thirteen_statements: Session) -> None:
    evaluation, _, _ = scored(thirteen_statements, max_new_tokens=144, slots=32)
    assert evaluation.accuracy >= 0.98
    assert (evaluation.problems, evaluation.evictions, evaluation.cut_off_fraction) == (32, 0, 0)
    assert evaluation.completion_tokens == 134
    interval = wilson_interval(round(32 * evaluation.accuracy), 32)
    assert evaluation.ci95 == (interval.low, interval.high)


def test_the_embedded_reasoner_is_lost_under_a_window_of_a_quarter_of_its_traces(thirteen_statements: Session) -> None:
    windowed = replace(thirteen_statements, policy=thirteen_statements.policy.with_cache(EvictionSchedule(32, 8)))
    evaluation, _, _ = scored(windowed, max_new_tokens=144, slots=32)
    assert evaluation.accuracy <= 0.1
    # 144 tokens when cut off, of which 143 enter: evictions before tokens 32, 40, ..., 136.
    assert evaluation.evictions <= 14


@pytest.mark.parametrize("policy", ["window", "none"])
def test_the_cache_takes_the_bytes_of_the_formula(policy: str) -> None:
    session = base_session(cache__policy=policy)
    evaluation, _, _ = scored(session, slots=3)
    prompts = [len(session.task.prompt_ids(problem)) for problem in session.task.evaluation["chained"]]
    assert evaluation.peak_cache_bytes == analytic_bytes(
        session.policy.cache_shape,
        batch=3,
        prompt_slots=max(prompts),
        window_slots=16 if policy == "window" else 55,
        dtype=torch.float32,
    )


def test_several_samples_of_a_problem_give_avg_and_pass_at_k() -> None:
    session = base_session(eval__problems=6)
    settings = {"samples_per_problem": 4, "temperature": 1.0, "pass_at": (1, 2, 4)}
    evaluation, right, texts = scored(session, **settings)
    table = torch.tensor(right).view(6, 4)
    assert 0 < table.double().mean() < 1, "a table of one value would prove nothing"
    assert evaluation.accuracy == pytest.approx(table.double().mean().item())
    assert evaluation.pass_at == {k: pytest.approx(pass_at_k(table, k)) for k in (1, 2, 4)}
    assert evaluation.pass_at[4] == pytest.approx(table.any(1).double().mean().item())
    assert evaluation.pass_at[1] == pytest.approx(evaluation.accuracy)
    assert evaluation.ci95[0] < evaluation.accuracy < evaluation.ci95[1]
    assert (evaluation.problems, evaluation.samples_per_problem, len(texts)) == (6, 4, 24)
    assert any(len(set(texts[start : start + 4])) > 1 for start in range(0, 24, 4)), "samples differ"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_scores_do_not_depend_on_how_many_run_at_once(temperature: float) -> None:
    _, session = open_short(eval__problems=5)
    results = [scored(session, slots=slots, temperature=temperature)[1:] for slots in (1, 3, 16)]
    assert results[0] == results[1] == results[2]


def test_another_seed_draws_other_samples_and_greedy_decoding_has_no_seed() -> None:
    _, session = open_short()
    sampled = [scored(session, temperature=1.0, seed=seed)[2] for seed in (0, 0, 1)]
    assert sampled[0] == sampled[1] != sampled[2]
    assert scored(session, seed=0)[2] == scored(session, seed=1)[2]


def test_controls_of_the_state_change_what_a_policy_with_a_state_computes() -> None:
    _, session = open_short()

    def logprobs(policy: BoundedPolicy, control: str) -> list[torch.Tensor]:
        found: list[Rollout] = []
        scored(replace(session, policy=policy), state_control=control, on_finish=found.append)
        return [rollout.rollout_logprobs for rollout in sorted(found, key=lambda rollout: rollout.prompt_ids)]

    own, zeroed, shuffled = (logprobs(session.policy, control) for control in ("own", "zeroed", "shuffled"))
    for others in (zeroed, shuffled):
        assert max((one[:24] - other[:24]).abs().max() for one, other in zip(own, others, strict=True)) > 1e-6
    # A state of zero makes the whole update zero: the zeroed policy is the base under the same window.
    base = logprobs(session.policy.without_adapter(), "own")
    assert all(torch.equal(one, other) for one, other in zip(zeroed, base, strict=True))


def test_right_means_an_accuracy_of_one_and_the_reward_is_not_asked() -> None:
    session = base_session()

    def halves(completions: list[str], **_: object) -> list[float]:
        return [1.0, 0.5, 0.0, 1.0][: len(completions)]

    task = replace(session.task, accuracy=halves, reward=odd_ids)
    evaluation, right, _ = scored(replace(session, task=task))
    assert right == [True, False, False, True]
    assert evaluation.accuracy == 0.5


def test_scores_become_plain_json_values() -> None:
    evaluation, _, _ = scored(base_session())
    plain = evaluation.as_json()
    assert plain["pass_at"] == {"1": plain["accuracy"]}
    assert plain["ci95"] == list(evaluation.ci95)
    assert set(plain) == set(Evaluation.__dataclass_fields__)


def test_every_completion_is_announced_as_it_ends() -> None:
    session, seen = base_session(), []
    _, _, texts = scored(session, on_finish=seen.append, slots=2)
    assert sorted(session.task.text(rollout.completion_ids) for rollout in seen) == sorted(texts)
