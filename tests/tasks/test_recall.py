"""Claims about recall: what is drawn, how far a completion is read, how each query is scored alone."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pte.tasks.base_training import build_tokenizer
from pte.tasks.generated import BOS_TOKEN, split_of
from pte.tasks.recall import (
    FEWEST_PROMPTS,
    MAX_KEYS,
    NUM_VALUES,
    ScoredQuery,
    all_right,
    fraction_right,
    generate_problems,
    most_of_one_value,
    read_completion,
    vocabulary,
)

# A list: facts of key7 to key10, then the answers to two queries.
LIST = "key7 128 4 0 ask9 ask7"
RIGHT = "key7=4 key8=0 key9=6 key10=4 ask9 key9=6 ask7 key7=4 <eos>"
# token    0      1      2       3     4      5     6      7
# A stream of four facts, each query about one of the last three; key0 follows key127.
STREAM = "key126 128 4 3"
STREAMED = "key126=4 key127=0 ask126 key126=4 key0=6 key1=4 ask127 key127=0"
# token        0        1       2        3       4      5      6        7


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, int | None]:
    num_keys = draw(st.integers(2, MAX_KEYS))
    if draw(st.booleans()):
        num_queries = draw(st.integers(1, 80))
        max_age = draw(st.integers(1, num_keys))
        return {"num_facts": 2 * num_queries, "num_queries": num_queries, "num_keys": num_keys, "max_age": max_age}
    num_facts = draw(st.integers(1, num_keys))
    num_queries = draw(st.integers(1, num_facts))
    assume(num_keys * math.perm(num_facts, num_queries) >= FEWEST_PROMPTS)
    return {"num_facts": num_facts, "num_queries": num_queries, "num_keys": num_keys, "max_age": None}


def in_order(first: int, count: int, num_keys: int) -> list[str]:
    return [f"key{(first + fact) % num_keys}" for fact in range(count)]


@settings(max_examples=40, deadline=None)
@given(shape=shapes(), seed=st.integers(0, 2**40))
def test_right_reasoning_is_right_in_any_shape(shape: dict[str, int | None], seed: int) -> None:
    for problem in generate_problems(2, seed=seed, split="train", **shape):
        tokens = problem.trace.split()
        is_list = shape["max_age"] is None
        assert len(tokens) == shape["num_facts"] + 2 * shape["num_queries"] + is_list
        assert problem.trace.endswith(" <eos>") == is_list and problem.trace.count("<eos>") == is_list
        read = read_completion(problem.trace, problem.answer)
        assert (len(read.facts), len(read.queries)) == (shape["num_facts"], shape["num_queries"])
        assert read.expected_queries == shape["num_queries"] and read.values_vary
        first = int(problem.problem.split()[0].removeprefix("key"))
        assert [key for key, _ in read.facts] == in_order(first, shape["num_facts"], shape["num_keys"])
        assert fraction_right([problem.trace], [problem.answer]) == [1.0]
        assert all_right([problem.trace], [problem.answer]) == [1.0]


@settings(max_examples=40, deadline=None)
@given(shape=shapes(), seed=st.integers(0, 2**40))
def test_a_scored_query_names_the_newest_fact_of_its_key_and_the_token_that_repeats_it(
    shape: dict[str, int | None], seed: int
) -> None:
    (problem,) = generate_problems(1, seed=seed, split="heldout", **shape)
    tokens = problem.trace.split()
    for query in read_completion(problem.trace, problem.answer).queries:
        assert tokens[query.query_token - 1] == query.key.replace("key", "ask")
        assert tokens[query.query_token] == tokens[query.fact_token]
        assert tokens[query.fact_token].startswith(f"{query.key}=")
        between = [
            token
            for before, token in pairwise(tokens[query.fact_token : query.query_token - 1])
            if "=" in token and not before.startswith("ask")
        ]
        assert query.facts_since == len(between)
        assert not [fact for fact in between if fact.startswith(f"{query.key}=")], "a newer fact"
        assert shape["max_age"] is None or query.facts_since < shape["max_age"]


def test_the_queries_of_a_list_are_scored_as_laid_out() -> None:
    read = read_completion(RIGHT, LIST)
    assert read.facts == (("key7", "4"), ("key8", "0"), ("key9", "6"), ("key10", "4"))
    assert read.queries == (ScoredQuery("key9", 2, 5, 1, True), ScoredQuery("key7", 0, 7, 3, True))
    assert (read.expected_queries, read.values_vary, read.fraction_right) == (2, True, 1.0)


def test_the_queries_of_a_stream_are_scored_as_laid_out() -> None:
    read = read_completion(STREAMED, STREAM)
    assert read.facts == (("key126", "4"), ("key127", "0"), ("key0", "6"), ("key1", "4"))
    assert read.queries == (ScoredQuery("key126", 0, 3, 1, True), ScoredQuery("key127", 1, 7, 2, True))
    assert (read.expected_queries, read.values_vary, read.fraction_right) == (2, True, 1.0)


@pytest.mark.parametrize(
    ("completion", "answer", "facts", "queries", "share"),
    [
        (RIGHT.replace(" <eos>", ""), LIST, 4, 2, 1.0),
        (RIGHT + " ask9 key9=0", LIST, 4, 2, 1.0),
        (RIGHT.replace("<eos>", "key11=0 key12=0"), LIST, 4, 2, 1.0),  # more than was asked for is not read
        (RIGHT.replace("ask9 key9=6", "ask9 key9=5"), LIST, 4, 2, 0.5),  # wrong value
        (RIGHT.replace("ask9 key9=6", "ask9 key7=4"), LIST, 4, 2, 0.5),  # the fact of another key
        (RIGHT.replace("ask9 key9=6", "ask9 ask7"), LIST, 4, 2, 0.5),  # no fact at all
        (RIGHT.replace("key8=0 key9=6", "key9=6 key8=0"), LIST, 1, 0, 0.0),  # keys out of order
        (RIGHT.replace("key8=0 ", ""), LIST, 1, 0, 0.0),  # a fact is missing
        (RIGHT.replace("key9=6 key10=4 ask9", "ask9"), LIST, 2, 0, 0.0),  # queries too early
        (RIGHT.replace("key10=4 ", "key10 "), LIST, 3, 0, 0.0),  # a key without a value
        (RIGHT.replace("key10=4 ", "key10=8 "), LIST, 3, 0, 0.0),  # a value that there is not
        (RIGHT.replace("ask9", "ask8"), LIST, 4, 0, 0.0),  # another query than asked for
        (RIGHT.replace("ask9", "ask9=6"), LIST, 4, 0, 0.0),
        (RIGHT.replace("ask7", "ask8"), LIST, 4, 1, 0.5),
        (RIGHT.replace("ask7 key7=4 <eos>", "ask7"), LIST, 4, 1, 0.5),
        (RIGHT.replace("ask7 key7=4 ", ""), LIST, 4, 1, 0.5),
        ("", LIST, 0, 0, 0.0),
        ("<eos> " + RIGHT, LIST, 0, 0, 0.0),
        (STREAMED + " key2=5 key3=5 ask2 key2=0", STREAM, 4, 2, 1.0),
        (STREAMED.replace("ask127 key127=0", "ask1 key1=4"), STREAM, 4, 2, 1.0),  # its own choice
        (STREAMED.replace("ask127 key127=0", "ask126 key126=4"), STREAM, 4, 2, 0.5),  # older than the last three
        (STREAMED.replace("ask126 key126=4", "ask5 key5=4"), STREAM, 2, 0, 0.0),  # never written
        (STREAMED.replace("ask126 key126=4", "ask0 key0=6"), STREAM, 2, 0, 0.0),  # not yet written
        (STREAMED.replace("key0=6 key1=4", "key0=6"), STREAM, 3, 1, 0.5),
        (STREAMED.replace("key0=6", "key2=6"), STREAM, 2, 1, 0.5),
        (STREAMED.replace("ask126 key126=4 ", ""), STREAM, 2, 0, 0.0),
        (STREAMED.replace("ask126 ", "ask=1 "), STREAM, 2, 0, 0.0),
        ("", STREAM, 0, 0, 0.0),
    ],
)
def test_the_first_token_out_of_place_ends_what_is_read_and_a_wrong_answer_costs_its_query_alone(
    completion: str, answer: str, facts: int, queries: int, share: float
) -> None:
    read = read_completion(completion, answer)
    assert (len(read.facts), len(read.queries)) == (facts, queries)
    assert fraction_right([completion], [answer]) == [share]
    assert all_right([completion], [answer]) == [float(share == 1.0)]


def test_the_value_of_a_key_that_was_written_again_is_its_newest() -> None:
    facts = "key0=1 key1=2 ask0 key0=1 key0=3 key1=4 ask0"
    answer = "key0 2 4 2"
    assert fraction_right([f"{facts} key0=3", f"{facts} key0=1"], [answer] * 2) == [1.0, 0.5]
    assert read_completion(f"{facts} key0=3", answer).queries[1] == ScoredQuery("key0", 4, 7, 1, True)


def test_a_query_whose_fact_an_answer_has_stated_again_is_marked_until_the_fact_is_written_anew() -> None:
    stream = "key0=1 key1=2 ask0 key0=1 key0=3 key1=4 ask0 key0=3 key0=5 key1=6 ask1 key1=6 key0=7 key1=0 ask1 key1=0"
    assert [query.restated for query in read_completion(stream, "key0 2 8 2").queries] == [False] * 4
    again = "key0=1 key1=2 ask0 key0=1 key2=3 key3=4 ask0 key0=1 key4=5 key5=6 ask1 key1=2"
    assert [query.restated for query in read_completion(again, "key0 128 6 72").queries] == [False, True, False]


def test_a_stream_past_the_last_key_goes_on_with_the_first() -> None:
    # Every query asks for the fact before it, so fact f stands at token f + 2 (f // 2).
    tokens: list[str] = []
    for fact, key in enumerate(in_order(100, 256, 128)):
        tokens.append(f"{key}={(fact + fact // 128) % NUM_VALUES}")
        if fact % 2:
            tokens += [key.replace("key", "ask"), tokens[-1]]
    read = read_completion(" ".join(tokens), "key100 128 256 1")
    assert read.facts[28][0] == "key0" and read.facts[128] == ("key100", "1") and read.facts[0] == ("key100", "0")
    assert read.fraction_right == 1.0
    assert read.queries[64] == ScoredQuery("key101", 129 + 128, 129 + 128 + 2, 0, True)


def test_a_completion_that_writes_one_value_in_too_many_facts_is_wrong() -> None:
    # 16 facts: 2 expected for each value, 2 + 4 sqrt(2) + 1 = 8.7, so 8 permitted.
    assert [most_of_one_value(count) for count in (4, 5, 16, 32, 128)] == [4, 4, 8, 13, 33]
    for same, right in ((8, 1.0), (9, 0.0)):
        values = [0] * same + [1 + index % 7 for index in range(16 - same)]
        facts = " ".join(f"key{index}={value}" for index, value in enumerate(values))
        completion, answer = f"{facts} ask0 key0=0", "key0 128 16 0 ask0"
        read = read_completion(completion, answer)
        assert (read.values_vary, read.queries[0].right) == (bool(right), True)
        assert all_right([completion], [answer]) == fraction_right([completion], [answer]) == [right]


def test_uniform_values_break_the_rule_in_less_than_one_completion_of_1000() -> None:
    for count in range(1, 300):
        above = range(most_of_one_value(count) + 1, count + 1)
        ways = sum(math.comb(count, same) * (NUM_VALUES - 1) ** (count - same) for same in above)
        assert NUM_VALUES * ways * 1000 < NUM_VALUES**count, count


def test_traces_whose_values_do_not_vary_are_left_out() -> None:
    # At 17 facts one draw in 1800 breaks the rule.
    problems = generate_problems(6000, seed=0, split="train", num_facts=17, num_queries=1)
    assert all(all_right([one.trace for one in problems], [one.answer for one in problems]))


def test_a_list_names_its_first_and_last_key_and_what_it_asks_for() -> None:
    for problem in generate_problems(20, seed=0, split="train", num_facts=6, num_queries=3, num_keys=8):
        first, last, mark, *asks = problem.problem.split()
        tokens = problem.trace.split()
        keys = in_order(int(first.removeprefix("key")), 6, 8)
        assert (last, mark, tokens[6:-1:2]) == (keys[-1], "?", asks)
        assert len(set(asks)) == 3 and {one.replace("ask", "key") for one in asks} <= set(keys)
        assert problem.answer == " ".join((first, "8", "6", "0", *asks))


def test_lists_are_split_by_the_hash_of_their_prompt_however_few_there_are() -> None:
    for shape in ({"num_facts": 1, "num_queries": 1}, {"num_facts": 8, "num_queries": 2, "num_keys": 8}):
        for split in ("train", "heldout"):
            problems = generate_problems(30, seed=2, split=split, **shape)
            assert {split_of(problem.problem) for problem in problems} == {split}
            assert {problem.source for problem in problems} == {f"recall/{split}"}


def test_streams_share_prompts_but_neither_ids_nor_splits() -> None:
    # An id seeds the samples of its problem: equal ids would give equal completions.
    shape = {"num_facts": 8, "num_queries": 4, "num_keys": 2, "max_age": 2}
    train, heldout = (generate_problems(30, seed=2, split=split, **shape) for split in ("train", "heldout"))
    assert (
        {problem.problem for problem in train} == {problem.problem for problem in heldout} == {"key0 ...", "key1 ..."}
    )
    assert len({problem.id for problem in (*train, *heldout)}) == 60
    assert {problem.source for problem in train} == {"recall/train"}
    assert {problem.source for problem in heldout} == {"recall/heldout"}
    assert all(problem.answer == f"{problem.problem.split()[0]} 2 8 2" for problem in train)


def test_queries_of_a_stream_ask_for_each_of_the_last_facts_alike() -> None:
    ages = Counter[int]()
    for problem in generate_problems(40, seed=3, split="train", num_facts=256, num_queries=128, max_age=16):
        queries = read_completion(problem.trace, problem.answer).queries
        ages.update(query.facts_since for query in queries[8:])
    # After 16 facts every one of the last 16 may be asked for: 40 * 120 / 16 = 300 queries each.
    assert set(ages) == set(range(16))
    assert all(abs(count - 300) < 70 for count in ages.values())


@pytest.mark.parametrize("max_age", [None, 8])
def test_the_same_arguments_give_the_same_problems_and_other_seeds_others(max_age: int | None) -> None:
    first = generate_problems(6, seed=1, split="train", max_age=max_age)
    assert first == generate_problems(6, seed=1, split="train", max_age=max_age)
    assert first[:3] == generate_problems(3, seed=1, split="train", max_age=max_age)
    other = generate_problems(6, seed=2, split="train", max_age=max_age)
    assert not {one.id for one in first} & {one.id for one in other}
    assert not {one.trace for one in first} & {one.trace for one in other}


@pytest.mark.parametrize("max_age", [None, 128])
def test_the_tokenizer_of_the_vocabulary_has_a_token_for_each_word_of_a_problem(max_age: int | None) -> None:
    words = vocabulary()
    assert len(words) == len(set(words)) == 6 + 128 + 128 + 128 * NUM_VALUES
    tokenizer = build_tokenizer(words, max_positions=512)
    for problem in generate_problems(40, seed=0, split="train", num_facts=128, num_queries=64, max_age=max_age):
        text = f"{BOS_TOKEN} {problem.problem} {problem.trace}"
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert [words[one] for one in ids] == text.split()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"num_facts": 0}, "num_facts must be at least 1, got 0; use 16"),
        ({"num_keys": 1}, "num_keys must be from 2 to 128 (the keys of the vocabulary), got 1; use 128"),
        ({"num_keys": 129}, "num_keys must be from 2 to 128 (the keys of the vocabulary), got 129; use 128"),
        ({"num_keys": 15}, "num_facts must be at most num_keys (15; every key is written once), got 16; use 15"),
        ({"num_queries": 0}, "num_queries must be from 1 to 16 (each key is asked for once), got 0; use 16 or fewer"),
        ({"num_queries": 17}, "num_queries must be from 1 to 16 (each key is asked for once), got 17; use 16 or fewer"),
        (
            {"num_keys": 7, "num_facts": 2, "num_queries": 1},
            "num_keys must be enough for 64 prompts (num_keys times the orders of queries; both splits need some), "
            "got 7; use 128",
        ),
        (
            {"max_age": 17, "num_keys": 16},
            "max_age must be from 1 to num_keys (16; an older fact is overwritten), got 17; use 16 or less",
        ),
        (
            {"max_age": 0},
            "max_age must be from 1 to num_keys (128; an older fact is overwritten), got 0; use 128 or less",
        ),
        (
            {"num_facts": 5, "num_queries": 2, "max_age": 4},
            "num_facts must be a multiple of 2 in a stream (so many facts come before each query), got 5; use 6",
        ),
        ({"num_queries": 7, "max_age": 4}, "num_queries must be num_facts / 2 (16 / 2) in a stream, got 7; use 8"),
    ],
)
def test_a_shape_out_of_range_is_refused_with_rule_value_and_remedy(shape: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError) as refusal:
        generate_problems(1, seed=0, split="train", **shape)
    assert str(refusal.value) == message
