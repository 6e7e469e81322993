"""Claims about permutation composition: what is drawn, what is revealed when, what counts as right."""

import re
from collections import Counter
from itertools import permutations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pte.tasks.generated import split_of
from pte.tasks.permutation import (
    FAMILY,
    GENERATORS,
    MAX_STEPS,
    REST,
    generate_problems,
    parse_answer,
    vocabulary,
)


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    """Permitted arguments of `generate_problems`."""
    steps_per_reveal = draw(st.integers(1, 16))
    return {
        "seed": draw(st.integers(0, 2**32)),
        "split": draw(st.sampled_from(["train", "heldout"])),
        "num_reveals": draw(st.integers(1, min(6, MAX_STEPS // steps_per_reveal))),
        "steps_per_reveal": steps_per_reveal,
        "moves_per_reveal": draw(st.integers(1, steps_per_reveal)),
        "num_generators": draw(st.integers(2, 3)),
    }


IMAGES_OF_A_STEP = GENERATORS | {REST: (1, 2, 3, 4, 5)}


def matrix(images: tuple[int, ...]) -> list[list[int]]:
    """The permutation matrix: row i has its 1 in the column of i's image."""
    return [[int(image == column) for column in range(1, 6)] for image in images]


def step_names(prompt: str) -> list[str]:
    """Names of a prompt's steps; their numbers count up, and the head names how many there are."""
    head, _, *steps = prompt.split()[:-5]
    numbers, names = zip(*(re.fullmatch(r"(\d+)([a-z]+)", step).groups() for step in steps), strict=True)
    assert numbers == tuple(str(1 + index) for index in range(len(steps)))
    assert head == f"?{len(steps)}"
    return list(names)


def product(left: list[list[int]], right: list[list[int]]) -> list[list[int]]:
    return [
        [sum(x * y for x, y in zip(row, column, strict=True)) for column in zip(*right, strict=True)] for row in left
    ]


@given(shape=shapes())
def test_the_answer_is_the_product_of_all_permutation_matrices_of_the_prompt(shape: dict[str, Any]) -> None:
    for problem in generate_problems(3, **shape):
        words = problem.problem.split()
        running = matrix(tuple(int(word[2]) for word in words[-5:]))
        for name in step_names(problem.problem):
            running = product(running, matrix(IMAGES_OF_A_STEP[name]))
        assert problem.answer == " ".join(str(1 + row.index(1)) for row in running)
        assert parse_answer(problem.trace) == problem.answer


@given(shape=shapes())
def test_the_trace_repeats_the_steps_and_reveals_the_state_as_often_as_the_prompt_says(shape: dict[str, Any]) -> None:
    for problem in generate_problems(3, **shape):
        prompt, names = problem.problem.split(), step_names(problem.problem)
        state = dict(word.split(">") for word in prompt[-5:])
        period = int(prompt[1].removeprefix("/"))
        assert (period, len(names)) == (shape["steps_per_reveal"], shape["num_reveals"] * shape["steps_per_reveal"])
        expected = []
        for number, name in enumerate(names, start=1):
            state = {point: str(IMAGES_OF_A_STEP[name][int(value) - 1]) for point, value in state.items()}
            expected += [f"#{number}", f"{number}{name}"]
            expected += ["=>"] * (number == len(names))
            expected += [f"{point}>{value}" for point, value in state.items()] * (number % period == 0)
        assert problem.trace.split() == [*expected, "<eos>"]


@given(shape=shapes())
def test_every_stretch_between_reveals_has_the_asked_number_of_moves(shape: dict[str, Any]) -> None:
    steps = shape["steps_per_reveal"]
    for problem in generate_problems(3, **shape):
        names = step_names(problem.problem)
        stretches = [names[start : start + steps] for start in range(0, len(names), steps)]
        assert {sum(name != REST for name in names) for names in stretches} == {shape["moves_per_reveal"]}
        assert set(names) <= {*list(GENERATORS)[: shape["num_generators"]], REST}


@pytest.mark.parametrize(
    ("moves", "places"),
    [(1, [6]), (2, [3, 6]), (3, [2, 4, 6]), (4, [1, 3, 4, 6]), (6, [1, 2, 3, 4, 5, 6])],
)
def test_moves_stand_evenly_apart_and_the_last_right_before_the_reveal(moves: int, places: list[int]) -> None:
    for problem in generate_problems(8, seed=0, split="train", num_reveals=2, moves_per_reveal=moves):
        names = step_names(problem.problem)
        found = [number for number, name in enumerate(names, start=1) if name != REST]
        assert found == [*places, *(6 + place for place in places)]


def test_every_generator_is_drawn_equally_often() -> None:
    drawn = generate_problems(400, seed=0, split="train", moves_per_reveal=6, num_generators=3)
    counts = Counter(name for problem in drawn for name in step_names(problem.problem))
    assert set(counts) == set(GENERATORS)
    # 9600 draws: 3200 of each expected, with a standard deviation of 46.
    assert all(abs(count - 3200) < 200 for count in counts.values())


def test_a_trace_has_two_tokens_a_step_and_five_a_reveal_and_two() -> None:
    for problem in generate_problems(4, seed=0, split="train", num_reveals=3, steps_per_reveal=6):
        assert len(problem.trace.split()) == 2 * 18 + 5 * 3 + 2
        assert len(problem.problem.split()) == 2 + 18 + 5


def test_the_generators_of_the_default_reach_all_120_permutations() -> None:
    reached, new = set(), {(1, 2, 3, 4, 5)}
    while new:
        reached |= new
        new = {tuple(GENERATORS[name][v - 1] for v in state) for state in new for name in ("swap", "turn")} - reached
    assert reached == set(permutations(range(1, 6)))


@given(shape=shapes())
def test_splits_share_no_problem_and_the_text_alone_decides(shape: dict[str, Any]) -> None:
    for problem in generate_problems(3, **shape):
        assert split_of(problem.problem) == shape["split"]
        assert problem.source == f"permutation/{shape['split']}"


def test_equal_arguments_give_equal_problems_and_other_seeds_others() -> None:
    first, again, other = (generate_problems(8, seed=seed, split="heldout") for seed in (3, 3, 4))
    assert first == again
    assert not {one.id for one in first} & {one.id for one in other}


@given(shape=shapes())
def test_every_word_is_in_the_vocabulary_once(shape: dict[str, Any]) -> None:
    words = vocabulary()
    assert len(words) == len(set(words))
    for problem in generate_problems(3, **shape):
        assert set(f"{problem.problem} {problem.trace}".split()) <= set(words)


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("#6 6turn => 1>3 2>1 3>5 4>4 5>2 <eos>", "3 1 5 4 2"),
        ("=> 1>3 2>1 3>5 4>4 5>2", "3 1 5 4 2"),
        ("=> 1>3 2>1 3>5 4>4 5>2 <eos> #7", "3 1 5 4 2"),
        ("", None),
        ("1>3 2>1 3>5 4>4 5>2", None),
        ("=> 1>3 2>1 3>5 4>4", None),
        ("=> 1>3 2>1 3>5 4>4 5>3", None),
        ("=> 2>1 1>3 3>5 4>4 5>2", None),
        ("=> 1>3 2>1 3>5 4>4 5>2 #7", None),
        ("=> 1>3 2>1 3>5 4>4 6swap", None),
        ("=> 1>1 2>2 3>3 4>4 5>5 => 1>3 2>1 3>5 4>4 5>2", None),
    ],
)
def test_only_one_whole_permutation_behind_the_last_marker_is_an_answer(completion: str, answer: str | None) -> None:
    assert parse_answer(completion) == answer


def test_a_right_state_that_is_not_the_last_is_wrong() -> None:
    problem = generate_problems(1, seed=0, split="train", num_reveals=2)[0]
    words = problem.trace.split()
    reveal = words.index("#6") + 2
    early = " ".join((*words[:reveal], "=>", *words[reveal : reveal + 5], "<eos>"))
    assert FAMILY.accuracy(completions=[problem.trace, early], answer=[problem.answer] * 2) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"count": -1}, r"count must be at least 0, got -1"),
        ({"seed": -1}, r"seed must be at least 0, got -1"),
        ({"split": "test"}, r"split must be 'train' or 'heldout', got 'test'"),
        ({"num_reveals": 0}, r"num_reveals must be from 1 to 8 .* got 0"),
        ({"num_reveals": 9}, r"num_reveals must be from 1 to 8 \(with 6 steps_per_reveal, 48 steps in all\), got 9"),
        ({"steps_per_reveal": 49}, r"steps_per_reveal must be from 1 to 48, got 49; use 6"),
        ({"moves_per_reveal": 0}, r"moves_per_reveal must be from 1 to steps_per_reveal \(6\), got 0; use 3"),
        ({"moves_per_reveal": 7}, r"moves_per_reveal must be from 1 to steps_per_reveal \(6\), got 7; use 3"),
        ({"num_generators": 1}, r"num_generators must be from 2 to 3, got 1; use 2"),
        ({"num_generators": 4}, r"num_generators must be from 2 to 3, got 4; use 2"),
    ],
)
def test_shapes_out_of_range_are_refused_by_name(changed: dict[str, Any], message: str) -> None:
    arguments = {"count": 1, "seed": 0, "split": "train"} | changed
    with pytest.raises(ValueError, match=message):
        generate_problems(arguments.pop("count"), **arguments)
