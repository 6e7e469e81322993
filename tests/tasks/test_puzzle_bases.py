"""Claims about the recipes of the bases for permutations and multiplication; training them takes minutes, not here."""

import random
from collections.abc import Iterator

import pytest

from pte.tasks.bases import RECIPES
from pte.tasks.families import FAMILIES
from pte.tasks.generated import GeneratedProblem
from pte.tasks.permutation import REST

PUZZLES = ("permutation", "multiplication")


def batches(name: str, *, done: float, count: int = 60) -> Iterator[list[GeneratedProblem]]:
    rng = random.Random(0)
    for _ in range(count):
        yield list(RECIPES[name].draw_batch(rng, done))


def shape_of(problem: GeneratedProblem) -> tuple[int, int]:
    """(reveals, moves between two of them) of a permutation problem, from its text."""
    steps = problem.problem.split()[2:-5]
    reveals = problem.trace.count(" 1>")
    return reveals, sum(not step.endswith(REST) for step in steps) // reveals


@pytest.mark.parametrize("name", PUZZLES)
@pytest.mark.parametrize("done", [0.0, 0.5, 0.999])
def test_a_training_step_has_problems_of_one_length_and_none_held_out(name: str, done: float) -> None:
    for batch in batches(name, done=done, count=20):
        assert batch
        assert {problem.source for problem in batch} == {f"{name}/train"}
        assert len({(len(one.problem.split()), len(one.trace.split())) for one in batch}) == 1


def test_a_base_is_trained_on_every_shape_that_it_is_measured_on() -> None:
    """A number of reveals that is left out of training is answered wrong: its token was never seen."""
    trained = {shape_of(batch[0]) for batch in batches("permutation", done=0.9, count=200)}
    measured = {
        shape_of(FAMILIES[family].generate(1, seed=0, split="heldout", **shape)[0])
        for family, shape in RECIPES["permutation"].measured
    }
    assert measured <= trained
    assert {shape["num_reveals"] for _, shape in RECIPES["permutation"].measured} == {1, 2, 3, 4, 5, 6}
    lengths = {len(one.problem) for batch in batches("multiplication", done=0.5, count=1) for one in batch}
    family, shape = RECIPES["multiplication"].measured[0]
    assert lengths == {len(FAMILIES[family].generate(1, seed=0, split="heldout", **shape)[0].problem)}


@pytest.mark.parametrize(("done", "moves"), [(0.0, 1), (0.16, 1), (0.17, 2), (0.33, 2), (0.34, 3), (0.999, 3)])
def test_most_permutation_batches_have_the_most_moves_of_their_time(done: float, moves: int) -> None:
    drawn = [shape_of(batch[0])[1] for batch in batches("permutation", done=done, count=400)]
    # 40 % and a third of the rest: 240 of 400, with a standard deviation of 10.
    assert 190 < drawn.count(moves) < 290
    assert set(drawn) == {1, 2, 3}
