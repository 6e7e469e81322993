"""Claims about recall: what is drawn, what a completion must carry out, how queries are scored alone."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pte.tasks.generated import BOS_TOKEN
from pte.tasks.recall import (
    MAX_KEYS,
    VALUES,
    all_right,
    fraction_right,
    generate_problems,
    most_of_one_value,
    read_completion,
    vocabulary,
)

OPERATIONS = "key7 key3 key12 ask3 ask7"
RIGHT = "key7 val4 key3 val11 key12 val4 ask3 val11 ask7 val4 <eos>"


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, int | None]:
    num_keys = draw(st.integers(2, MAX_KEYS))
    num_facts = draw(st.integers(1, 128))
    max_age = draw(st.none() | st.integers(1, num_keys))
    most = num_facts if max_age else min(num_facts, num_keys)
    return {
        "num_facts": num_facts,
        "num_queries": draw(st.integers(1, most)),
        "num_keys": num_keys,
        "max_age": max_age,
    }


@settings(max_examples=40, deadline=None)
@given(shape=shapes(), seed=st.integers(0, 2**40))
def test_every_trace_repeats_the_newest_value_of_each_key_and_has_two_tokens_an_operation(
    shape: dict[str, int | None], seed: int
) -> None:
    for problem in generate_problems(2, seed=seed, split="train", **shape):
        tokens = problem.trace.split()
        assert tokens[:-1:2] == problem.problem.split() == problem.answer.split()
        assert len(tokens) == 2 * (shape["num_facts"] + shape["num_queries"]) + 1
        assert set(problem.problem.split()) | set(tokens) <= set(vocabulary()) - {BOS_TOKEN}
        values: dict[str, str] = {}
        for operation, value in zip(tokens[:-1:2], tokens[1::2], strict=True):
            if operation.startswith("key"):
                values[operation] = value
            assert values[operation.replace("ask", "key")] == value
        read = read_completion(problem.trace, problem.answer)
        assert read is not None and all(query.right for query in read.queries)
        assert (len(read.facts), len(read.queries)) == (shape["num_facts"], shape["num_queries"])


@settings(max_examples=40, deadline=None)
@given(shape=shapes(), seed=st.integers(0, 2**40))
def test_the_tokens_of_a_scored_query_are_its_fact_and_its_repetition(shape: dict[str, int | None], seed: int) -> None:
    (problem,) = generate_problems(1, seed=seed, split="heldout", **shape)
    tokens = problem.trace.split()
    read = read_completion(problem.trace, problem.answer)
    assert read is not None
    for query in read.queries:
        assert tokens[query.fact_token - 1] == query.key
        assert tokens[query.query_token - 1] == query.key.replace("key", "ask")
        between = tokens[query.fact_token + 1 : query.query_token : 2]
        assert query.key not in between, "a newer fact"
        assert query.facts_since == sum(operation.startswith("key") for operation in between)
        assert shape["max_age"] is None or query.facts_since < shape["max_age"]


def test_queries_of_a_stream_come_in_between_and_ask_at_every_octave_of_age() -> None:
    problems = generate_problems(20, seed=3, split="train", num_facts=128, num_queries=64, max_age=64)
    ages = Counter[int]()
    for problem in problems:
        operations = problem.problem.split()
        assert len(set(operations)) == len(operations) == 192, "no fact is asked for twice"
        assert operations[0].startswith("key") and operations[-1].startswith("ask")
        assert all(sum(one.startswith("ask") for one in operations[at : at + 12]) == 4 for at in range(0, 192, 12))
        read = read_completion(problem.trace, problem.answer)
        assert read is not None
        ages.update((query.facts_since + 1).bit_length() for query in read.queries)
    assert set(ages) - {7} == {1, 2, 3, 4, 5, 6}, "ages 1, 2 to 3, ..., 32 to 63, rarely 64"
    assert all(ages[octave] > 20 * 64 / 20 for octave in (1, 2, 3, 4, 5, 6))


def test_with_fewer_keys_than_facts_keys_are_written_again_after_all_others() -> None:
    (problem,) = generate_problems(1, seed=0, split="train", num_facts=24, num_queries=8, num_keys=8)
    keys = problem.problem.split()[:24]
    assert all(len(set(keys[start : start + 8])) == 8 for start in (0, 8, 16))
    assert {problem.problem.split()[-1]} <= {f"ask{index}" for index in range(8)}


def test_the_same_arguments_give_the_same_problems_and_other_seeds_others() -> None:
    first = generate_problems(6, seed=1, split="train")
    assert first == generate_problems(6, seed=1, split="train")
    assert not {one.id for one in first} & {one.id for one in generate_problems(6, seed=2, split="train")}
    assert {one.source for one in first} == {"recall/train"}
    assert {one.source for one in generate_problems(3, seed=1, split="heldout")} == {"recall/heldout"}


@pytest.mark.parametrize(
    ("completion", "share"),
    [
        (RIGHT, 1.0),
        (RIGHT.replace(" <eos>", ""), 1.0),
        (RIGHT + " ask3 val0", 1.0),
        (RIGHT.replace("ask3 val11", "ask3 val4"), 0.5),
        (RIGHT.replace("key12 val4", "key12 val9"), 1.0),
        ("key3 val11 key7 val4 key12 val4 ask3 val11 ask7 val4", 0.0),
        ("key7 val4 key3 val11 ask3 val11 ask7 val4", 0.0),
        (RIGHT.replace("ask7 val4 <eos>", "ask7"), 0.0),
        (RIGHT.replace("<eos>", "ask7 val4"), 0.0),
        (RIGHT.replace("val11", "key3"), 0.0),
        ("", 0.0),
    ],
)
def test_a_completion_is_worth_its_share_of_right_queries_if_it_carries_out_all_operations(
    completion: str, share: float
) -> None:
    assert fraction_right([completion], [OPERATIONS]) == [share]
    assert all_right([completion], [OPERATIONS]) == [float(share == 1.0)]


def test_the_value_of_a_key_that_was_written_again_is_its_newest() -> None:
    operations, facts = "key1 key2 key1 ask1", "key1 val5 key2 val6 key1 val7"
    assert fraction_right([f"{facts} ask1 val7", f"{facts} ask1 val5"], [operations] * 2) == [1.0, 0.0]
    read = read_completion(f"{facts} ask1 val7", operations)
    assert read is not None
    (query,) = read.queries
    assert (query.fact_token, query.query_token, query.facts_since, query.right) == (5, 7, 0, True)


def test_a_completion_that_writes_one_value_in_too_many_facts_is_wrong() -> None:
    # 16 facts: one expected for each value, 1 + 4 + 1 = 6 permitted.
    assert (most_of_one_value(4), most_of_one_value(16), most_of_one_value(128)) == (3, 6, 20)
    keys = [f"key{index}" for index in range(16)]
    operations = " ".join((*keys, "ask0"))
    for same, right in ((6, 1.0), (7, 0.0)):
        values = [VALUES[0]] * same + [VALUES[1 + index] for index in range(16 - same)]
        facts = " ".join(f"{key} {value}" for key, value in zip(keys, values, strict=True))
        assert all_right([f"{facts} ask0 val0"], [operations]) == [right]
        read = read_completion(f"{facts} ask0 val0", operations)
        assert read is not None and read.values_vary == bool(right)


@pytest.mark.parametrize("num_facts", [4, 8, 16, 32, 128])
def test_uniform_values_are_refused_in_less_than_one_completion_of_200(num_facts: int) -> None:
    problems = generate_problems(1000, seed=5, split="train", num_facts=num_facts, num_queries=1)
    right = all_right([one.trace for one in problems], [one.answer for one in problems])
    assert sum(right) > 995


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"num_facts": 0}, "num_facts must be at least 1, got 0; use 16"),
        ({"num_keys": 129}, "num_keys must be from 2 to 128 (the keys of the vocabulary), got 129; use 128"),
        ({"num_queries": 17}, "num_queries must be from 1 to 16 (each key is asked for once), got 17; use 16 or fewer"),
        ({"num_queries": 5, "num_keys": 4}, "num_queries must be from 1 to 4 (each key"),
        ({"max_age": 17, "num_keys": 16}, "max_age must be from 1 to num_keys (16; an older fact may be overwritten)"),
        ({"max_age": 0}, "max_age must be from 1 to num_keys (128;"),
        ({"num_queries": 17, "max_age": 4}, "num_queries must be from 1 to 16, got 17; use 16 or fewer"),
    ],
)
def test_a_shape_out_of_range_is_refused_by_name(shape: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError) as refusal:
        generate_problems(1, seed=0, split="train", **shape)
    assert str(refusal.value).startswith(message)
