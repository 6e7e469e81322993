"""How the evidence scores a policy: recall by age of eviction, worked by hand, and the states of real evictions."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from pte.config import TaskConfig
from pte.evidence import readings
from pte.evidence.measurements import Label
from pte.evidence.readings import Reading, accuracy_by_age, read, scored_queries, share, state_sizes, trace_blocks
from pte.method.cache import EvictedTokens
from pte.method.schedule import EvictionSchedule
from pte.model.segment import folded_keys
from pte.rollout import evict
from pte.rollout.generate import RolloutEngine
from pte.rollout.record import Rollout, RolloutRequest
from pte.rollout.walk import expanded_first_state
from pte.session import Session
from pte.tasks.evaluate import EvaluatedCompletion
from pte.tasks.problems import Problem
from pte.tasks.task import TrainingProblem
from short_runs import open_short

LABEL = Label("forgetting", "recall", "pte_delta", "warm_start", 0, {"rank": 4})
ANSWER = "key1 128 5 0 ask5 ask3 ask1 ask2"
RIGHT = "key1=1 key2=2 key3=3 key4=4 key5=5 ask5 key5=5 ask3 key3=3 ask1 key1=1 ask2 key2=2 <eos>"
# Window 4, blocks of 2: before token 4 enters tokens 0 and 1 leave (eviction 0), before token 6 tokens 2 and 3
# (eviction 1), before 8 tokens 4 and 5, before 10 tokens 6 and 7 (eviction 3).
#   query  answer  predicted as enters  evictions by then  fact at  leaves at eviction  evictions ago
#   ask5      6             5                  1              4             2           still kept
#   ask3      8             7                  2              2             1           1
#   ask1     10             9                  3              0             0           3, octave 2
#   ask2     12            11                  4              1             0           4
SCHEDULE = EvictionSchedule(4, 2)
AGES = [-1, 1, 3, 4]


def completion(text: str, answer: str = ANSWER) -> EvaluatedCompletion:
    problem = Problem(id="one", problem="", answer=answer, source="recall/heldout")
    rollout = Rollout((1,), (1,), torch.zeros(1), "stop", 0, 1.0, 0, 0.0)
    return EvaluatedCompletion(problem, text, right=True, rollout=rollout)


def by_age(*texts: str, schedule: EvictionSchedule = SCHEDULE) -> dict[object, tuple[int | None, int | None, float]]:
    found = accuracy_by_age([completion(text) for text in texts], LABEL, schedule=schedule)
    assert all(one.at("rank") == 4 for one in found), "further conditions stay"
    answered, *ages = found
    assert answered.metric == "answered_fraction" and {one.metric for one in ages} <= {"accuracy"}
    return {one.at("evictions_ago"): (one.right, one.total, one.value) for one in ages}


def test_the_age_of_a_query_is_the_number_of_evictions_since_its_fact_left() -> None:
    assert scored_queries(completion(RIGHT), SCHEDULE) == [(True, age) for age in AGES]
    wrong = RIGHT.replace("ask3 key3=3", "ask3 key3=4").replace("ask2 key2=2", "ask2 key1=1")
    assert [right for right, _ in scored_queries(completion(wrong), SCHEDULE)] == [True, False, True, False]


def test_ages_in_a_stream_are_those_of_the_facts_that_were_asked_for() -> None:
    stream = "key1=1 key2=2 ask1 key1=1 key3=3 key4=4 ask1 key1=1 key5=5 key6=6 ask6 key6=7"
    # Token 3 comes before any eviction. Token 7 is predicted as token 6 enters, after two evictions, of which the first
    # took token 0. Token 11 is predicted as token 10 enters, after four; its fact, token 9, leaves at eviction 4.
    # Token 7 states again what token 3 had stated: its fact left later than token 0, and the query has no age.
    found = scored_queries(completion(stream, "key1 128 6 72"), SCHEDULE)
    assert found == [(True, 0), (False, 0)]


def test_a_fact_that_is_written_anew_is_asked_for_the_first_time_again() -> None:
    stream = "key0=1 key1=2 ask0 key0=1 key0=3 key1=4 ask0 key0=3 key0=5 key1=6 ask1 key1=6"
    assert [right for right, _ in scored_queries(completion(stream, "key0 2 6 2"), SCHEDULE)] == [True, True, True]


def test_queries_that_were_never_answered_are_said_beside_the_ages() -> None:
    cut = " ".join(RIGHT.split()[:9])  # two of four answers
    answered, *_ = accuracy_by_age([completion(RIGHT), completion(cut)], LABEL, schedule=SCHEDULE)
    assert answered.value == 6 / 8


def test_answers_to_one_problem_count_as_independent_as_they_are() -> None:
    # Every problem all right or all wrong: 4 samples say no more than one. p (1 - p) / v, v = 2 * 4 / 16 / 16 * 4 / 3.
    assert share(LABEL, "accuracy", [(4, 4), (0, 4), (4, 4), (0, 4)]) == LABEL.measured(
        "accuracy", 0.5, right=2, total=4
    )
    # Every problem half right, the last one but for a chance: as good as independent.
    assert share(LABEL, "accuracy", [(2, 4), (2, 4), (3, 4), (1, 4)]).total == 16
    assert share(LABEL, "accuracy", [(1, 1), (0, 1), (1, 1)]) == LABEL.measured("accuracy", 2 / 3, right=2, total=3)
    assert share(LABEL, "accuracy", [(4, 4), (4, 4), (0, 0)]) == LABEL.measured("accuracy", 1.0, right=2, total=2)


def test_accuracy_by_age_counts_right_answers_in_octaves_over_all_completions() -> None:
    wrong = RIGHT.replace("ask1 key1=1", "ask1 key1=7")
    assert by_age(RIGHT, wrong, wrong) == {0: (3, 3, 1.0), 1: (3, 3, 1.0), 2: (1, 3, 1 / 3), 4: (3, 3, 1.0)}
    assert list(by_age(RIGHT)) == [0, 1, 2, 4], "ascending"


@pytest.mark.parametrize(
    ("text", "answered"),
    [
        ("", 0),
        (RIGHT.replace("key2=2 ", "", 1), 0),
        (RIGHT.replace("ask5", "ask4"), 0),
        (RIGHT.replace("ask1", "ask4"), 2),
        (RIGHT.replace("ask2 key2=2", "ask2"), 3),
        (RIGHT.replace("<eos>", "ask1 key1=1 <eos>"), 4),
    ],
)
def test_queries_without_an_answer_have_no_age(text: str, answered: int) -> None:
    assert scored_queries(completion(text), SCHEDULE) == [(True, age) for age in AGES[:answered]]


def test_a_completion_of_one_value_is_wrong_at_every_age() -> None:
    same = " ".join(word[:-1] + "1" if "=" in word else word for word in RIGHT.split())  # four of five may be equal
    assert scored_queries(completion(same), SCHEDULE) == [(False, age) for age in AGES]
    assert by_age(RIGHT, same) == {age: (1, 2, 0.5) for age in (0, 1, 2, 4)}


def test_a_reading_of_queries_counts_those_that_were_never_answered_as_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    config, session = open_short(eval__problems=3, double=False)
    same = " ".join(word[:-1] + "1" if "=" in word else word for word in RIGHT.split())
    texts = [RIGHT, RIGHT.replace("ask5 key5=5", "ask5 key5=6"), RIGHT.replace("ask1", "ask4"), same, ""]
    completions = [completion(text) for text in texts]
    evaluation = SimpleNamespace(
        samples_per_problem=1, peak_cache_bytes=10, peak_state_bytes=2, evictions=3.0, completion_tokens=4.0
    )
    monkeypatch.setattr(readings, "evaluate_session", lambda *_, **__: (evaluation, completions))
    task, sampled = TaskConfig(kind="recall", num_facts=5, num_queries=4), replace(config.eval, temperature=0.5)
    recall = replace(config, task=task, eval=sampled)
    monkeypatch.setattr(readings, "session_of", lambda session, _: session)
    found, *_ = read(session, Reading(LABEL, recall))
    assert found == share(LABEL, "accuracy", [(4, 4), (3, 4), (2, 4), (0, 4), (0, 4)])
    assert found.value == (4 + 3 + 2) / 20


def test_under_the_full_cache_every_value_is_still_kept() -> None:
    assert by_age(RIGHT, RIGHT, schedule=EvictionSchedule(None)) == {0: (2, 2, 1.0)}


def test_a_reading_scores_under_its_own_cache_whatever_the_session_has() -> None:
    config, session = open_short(eval__problems=3, double=False, adapter__kind="lora")
    for arm, evicts in (("lora_window", True), ("lora_full", False)):
        label = replace(LABEL, arm=arm)
        found = {one.metric: one for one in read(session, Reading(label, config))}
        assert (found["evictions"].value > 0) == evicts
        assert found["accuracy"].total == 3
        assert found["accuracy"].right == round(3 * found["accuracy"].value)
        assert all(
            one == label.measured(one.metric, one.value, right=one.right, total=one.total) for one in found.values()
        )
    assert not session.policy.schedule.is_full, "the session keeps its own"


def session_of_three(monkeypatch: pytest.MonkeyPatch, **changes: object) -> Session:
    monkeypatch.setattr(readings, "STATE_PROBLEMS", 3)
    return open_short(**changes)[1]


def test_blocks_of_traces_are_what_the_rollout_engine_evicts(monkeypatch: pytest.MonkeyPatch) -> None:
    session = session_of_three(monkeypatch)
    task, policy = session.task, session.policy
    problems = [task.training(index).problem for index in range(3)]
    evicted: list[EvictedTokens] = []
    fold = evict.fold

    def noting(policy: object, state: Tensor, block: EvictedTokens) -> Tensor:
        evicted.append(block)
        return fold(policy, state, block)

    monkeypatch.setattr(evict, "fold", noting)
    engine = RolloutEngine(policy, slots=3, max_new_tokens=40, temperature=0.0, stop_token_ids=())
    rollouts = engine.run([RolloutRequest(task.prompt_ids(problem), 0) for problem in problems])
    texts = [task.tokenizer.decode(one.completion_ids, skip_special_tokens=False) for one in rollouts]
    sampled = [TrainingProblem(problem, text) for problem, text in zip(problems, texts, strict=True)]
    blocks = trace_blocks(replace(session, task=replace(task, training=lambda index: sampled[index])))
    # 40 tokens and a window of 16, blocks of 4: evictions before tokens 16, 20 .. 36.
    assert len(blocks) == len(evicted) == 6
    for block, other in zip(blocks, evicted, strict=True):
        assert torch.equal(block.positions, other.positions)
        torch.testing.assert_close(block.keys, other.keys)
        torch.testing.assert_close(block.values, other.values)


@pytest.mark.parametrize("rule", ["paper", "read", "delta"])
def test_state_sizes_are_those_of_folding_the_blocks_one_by_one_and_again(
    rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readings, "STATE_EVICTIONS", 9)
    session = session_of_three(monkeypatch, adapter__update_rule=rule)
    policy = session.policy
    adapter = policy.adapter
    assert adapter is not None and adapter.encoder is not None
    blocks = trace_blocks(session)
    assert len(blocks) < 9, "the blocks come again"
    state = expanded_first_state(policy, 3)
    expected = {}
    for eviction, block in enumerate(islice([*blocks, *blocks], 9), start=1):
        state = adapter.encoder.fold(state, folded_keys(policy, block), block.values)
        if eviction in (1, 2, 4, 8, 9):
            for name, one in (("state_norm", state), ("read_norm", adapter.encoder.read(state))):
                expected[name, eviction] = max(torch.linalg.matrix_norm(one).flatten().tolist())
    found = {(one.metric, one.at("evictions")): one.value for one in state_sizes(session, LABEL)}
    assert found == pytest.approx(expected, rel=1e-9)
