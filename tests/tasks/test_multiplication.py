"""Claims about long multiplication: what is drawn, what the trace writes, what counts as right."""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pte.tasks.generated import split_of
from pte.tasks.multiplication import FAMILY, generate_problems, parse_answer, vocabulary


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    """Permitted arguments of `generate_problems`."""
    return {
        "seed": draw(st.integers(0, 2**32)),
        "split": draw(st.sampled_from(["train", "heldout"])),
        "left_digits": draw(st.integers(1, 6)),
        "right_digits": draw(st.integers(1, 6)),
    }


def factors(problem: str) -> tuple[int, int]:
    left, right = problem.split(" * ")
    return int(left.replace(" ", "")), int(right.replace(" ", ""))


def read_line(words: list[str], name: str) -> tuple[int, list[int]]:
    """The number that the places called `name` + k spell, and its carries; checks that they stand in one run."""
    places = [index for index, word in enumerate(words) if word.startswith(name)]
    assert [words[index] for index in places] == [f"{name}{place}" for place in range(len(places))]
    assert all(later - earlier == 3 for earlier, later in pairwise(places))
    carries = [int(words[index + 2].removeprefix("^")) for index in places[:-1]]
    return sum(int(words[index + 1]) * 10**place for place, index in enumerate(places)), carries


@given(shape=shapes())
def test_the_answer_is_the_product_padded_to_the_digits_of_both_factors(shape: dict[str, Any]) -> None:
    for problem in generate_problems(3, **shape):
        left, right = factors(problem.problem)
        digits = problem.answer.split()
        assert int("".join(digits)) == left * right
        assert len(digits) == shape["left_digits"] + shape["right_digits"]
        assert (len(str(left)), len(str(right))) == (shape["left_digits"], shape["right_digits"])
        assert parse_answer(problem.trace) == problem.answer


@given(shape=shapes())
def test_rows_spell_the_partial_products_and_the_sum_spells_the_product(shape: dict[str, Any]) -> None:
    for problem in generate_problems(3, **shape):
        left, right = factors(problem.problem)
        words = problem.trace.split()
        for row, factor in enumerate(reversed(str(right))):
            spelt, carries = read_line(words, f"@{row}")
            assert spelt == left * int(factor)
            for place, carry in enumerate(carries, start=1):
                assert carry == left % 10**place * int(factor) // 10**place
        assert read_line(words, "+")[0] == left * right


def test_the_trace_of_47_times_58_by_hand() -> None:
    """47 * 8 = 376 and 47 * 5 = 235; 376 + 2350 = 2726, where 7 + 5 tens carry one hundred."""
    prompt = "4 7 * 5 8"
    drawn = generate_problems(30_000, seed=0, split=split_of(prompt), left_digits=2, right_digits=2)
    trace = next(one.trace for one in drawn if one.problem == prompt)
    rows = "@00 6 ^5 @01 7 ^3 @02 3 @10 5 ^3 @11 3 ^2 @12 2"
    assert trace == f"{rows} +0 6 ^0 +1 2 ^1 +2 7 ^0 +3 2 => 2 7 2 6 <eos>"


@given(shape=shapes())
def test_a_trace_has_three_tokens_a_place_but_two_for_the_highest(shape: dict[str, Any]) -> None:
    left, right = shape["left_digits"], shape["right_digits"]
    for problem in generate_problems(2, **shape):
        rows, total = right * (3 * (left + 1) - 1), 3 * (left + right) - 1
        assert len(problem.trace.split()) == rows + total + 1 + left + right + 1


@given(shape=shapes())
def test_splits_share_no_problem_and_the_text_alone_decides(shape: dict[str, Any]) -> None:
    for problem in generate_problems(3, **shape):
        assert split_of(problem.problem) == shape["split"]
        assert problem.source == f"multiplication/{shape['split']}"


def test_equal_arguments_give_equal_problems_and_other_seeds_others() -> None:
    first, again, other = (generate_problems(8, seed=seed, split="heldout") for seed in (3, 3, 4))
    assert first == again
    assert first != other


@given(shape=shapes())
def test_every_word_is_in_the_vocabulary_once(shape: dict[str, Any]) -> None:
    words = vocabulary()
    assert len(words) == len(set(words))
    for problem in generate_problems(3, **shape):
        assert set(f"{problem.problem} {problem.trace}".split()) <= set(words)


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("+4 2 => 2 4 1 9 2 <eos>", "2 4 1 9 2"),
        ("=> 0 7", "0 7"),
        ("=> 7 <eos> 8", "7"),
        ("", None),
        ("2 4 1 9 2", None),
        ("=>", None),
        ("=> <eos>", None),
        ("=> 2 4 * 1", None),
        ("=> 24", None),
        ("=> 2 => 3", None),
    ],
)
def test_only_digits_behind_the_one_marker_are_an_answer(completion: str, answer: str | None) -> None:
    assert parse_answer(completion) == answer


def test_a_product_without_its_padding_is_wrong() -> None:
    problem = next(one for one in generate_problems(64, seed=0, split="train") if one.answer.startswith("0"))
    bare = f"=> {problem.answer.removeprefix('0 ')} <eos>"
    assert FAMILY.accuracy(completions=[problem.trace, bare], answer=[problem.answer] * 2) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"count": -1}, r"count must be at least 0, got -1"),
        ({"seed": -1}, r"seed must be at least 0, got -1"),
        ({"split": "test"}, r"split must be 'train' or 'heldout', got 'test'"),
        ({"left_digits": 0}, r"left_digits must be from 1 to 6, got 0; use 3"),
        ({"left_digits": 7}, r"left_digits must be from 1 to 6, got 7; use 3"),
        ({"right_digits": 0}, r"right_digits must be from 1 to 6, got 0; use 2"),
        ({"right_digits": 7}, r"right_digits must be from 1 to 6, got 7; use 2"),
    ],
)
def test_shapes_out_of_range_are_refused_by_name(changed: dict[str, Any], message: str) -> None:
    arguments = {"count": 1, "seed": 0, "split": "train"} | changed
    with pytest.raises(ValueError, match=message):
        generate_problems(arguments.pop("count"), **arguments)
