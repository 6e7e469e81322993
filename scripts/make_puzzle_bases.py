"""Trains the base of one of two generated tasks: permutations in S5, or long multiplication.

    OMP_NUM_THREADS=1 python scripts/make_puzzle_bases.py permutation --out bases/permutation
    OMP_NUM_THREADS=1 python scripts/make_puzzle_bases.py multiplication --out bases/multiplication

Each is the smallest of the sizes tried that solves held-out problems under the full cache (docs/log.md). Weights,
tokenizer and `training.json`, with the accuracy on every shape, go into the folder.
"""

import argparse
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from pte.tasks.base_training import BaseSettings, BaseSize, DrawBatch, measure_base, train_base, write_record
from pte.tasks.families import FAMILIES
from pte.tasks.generated import GeneratedProblem

TOKENS_PER_STEP = 2500
MOST_MOVES = 3
STEPS_PER_REVEAL = 6


@dataclass(frozen=True)
class Recipe:
    """How the base of a family is made, and on which shapes it is measured."""

    settings: BaseSettings
    draw_batch: DrawBatch
    shapes: Sequence[Mapping[str, int | None]]


def draw_permutations(rng: random.Random, done: float) -> list[GeneratedProblem]:
    """Problems of one shape: 1 to 6 reveals; one move between them until a sixth of the training, two until a third.

    A model that cannot yet carry one move on learns little from three: a state looks like chance until all moves are
    right. 40 % of the batches have the most moves of their time, the others 1 to 3.
    """
    most = min(MOST_MOVES, 1 + int(6 * done))
    moves = most if rng.random() < 0.4 else rng.randint(1, MOST_MOVES)
    num_reveals = rng.choice((1, 2, 2, 3, 4, 6))
    tokens_each = num_reveals * (3 * STEPS_PER_REVEAL + 5) + 10
    return FAMILIES["permutation"].generate(
        TOKENS_PER_STEP // tokens_each,
        seed=rng.getrandbits(48),
        split="train",
        num_reveals=num_reveals,
        steps_per_reveal=STEPS_PER_REVEAL,
        moves_per_reveal=moves,
    )


def draw_multiplications(rng: random.Random, done: float) -> list[GeneratedProblem]:
    """Products of three and two digits, from the first step to the last."""
    return FAMILIES["multiplication"].generate(64, seed=rng.getrandbits(48), split="train")


RECIPES = {
    "permutation": Recipe(
        BaseSettings(steps=1500, peak_lr=2e-3, size=BaseSize(num_layers=3, initializer_range=0.06)),
        draw_permutations,
        [{"num_reveals": number} for number in range(1, 7)],
    ),
    "multiplication": Recipe(
        BaseSettings(steps=1000, peak_lr=3e-3, size=BaseSize(num_layers=2, initializer_range=0.06)),
        draw_multiplications,
        [{"left_digits": 3, "right_digits": 2}],
    ),
}


def main() -> None:
    """Trains, saves, then measures what was saved."""
    parser = argparse.ArgumentParser(description="Trains the base of a generated task.")
    parser.add_argument("family", choices=sorted(RECIPES))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--heldout-problems", type=int, default=256, help="for each shape evaluated")
    options = parser.parse_args()
    torch.set_num_threads(1)
    family, recipe = FAMILIES[options.family], RECIPES[options.family]
    print(recipe.settings, flush=True)
    seconds = train_base(
        options.out,
        vocabulary=family.vocabulary(),
        draw_batch=recipe.draw_batch,
        settings=recipe.settings,
        on_progress=lambda line: print(line, flush=True),
    )
    measured = []
    for shape in recipe.shapes:
        accuracy = measure_base(options.out, family, shape=shape, count=options.heldout_problems)
        print(f"{dict(shape)}: {accuracy}", flush=True)
        measured.append({"shape": dict(shape), **asdict(accuracy)})
    write_record(options.out, {"family": family.name, "accuracy": measured}, recipe.settings, seconds=seconds)


if __name__ == "__main__":
    main()
