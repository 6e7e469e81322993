"""Recipes of the bases that are rebuilt when they are needed: for each name its problems, its size, its training.

Decides: on which shapes a base is trained and measured. Whether a base solves them under the full cache is in the
`training.json` that `make_base` writes; docs/log.md has the attempts. A new base is one `BaseRecipe` here.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from pte.tasks import multiplication, permutation, recall
from pte.tasks.base_training import (
    BaseSettings,
    BaseSize,
    BaseStep,
    DrawBatch,
    is_complete,
    measure_base,
    train_base,
    write_record,
)
from pte.tasks.families import FAMILIES, joint_vocabulary
from pte.tasks.generated import GeneratedProblem

RECALL_FACTS = (4, 8, 16, 32, 64, 128)
MEASURED_PROBLEMS = 256
TOKENS_PER_STEP = 4000
STREAM_AGE = 72
"""Facts that a query of a stream may be away: more than 64 evictions of two tokens."""
NEAR_AGE = 16
"""The same in streams that a state can hold: fewer facts than its rank."""
PERMUTATION_MOVES = 3
PERMUTATION_TOKENS_PER_STEP = 2500


@dataclass(frozen=True)
class BaseRecipe:
    """How a base is made and measured.

    Args:
        families: Whose words it knows.
        draw_batch: Problems of a training step.
        settings: Size and optimisation.
        measured: (family, shape) of each row of its record.
    """

    families: tuple[str, ...]
    draw_batch: DrawBatch
    settings: BaseSettings
    measured: tuple[tuple[str, Mapping[str, int | None]], ...]


def draw_recall(rng: random.Random, done: float) -> list[GeneratedProblem]:
    """Lists of up to 8 facts at first, of up to 128 in the last half, and streams from a quarter on.

    Any number of facts goes with any number of queries: a model that is shown few pairs of the two counts positions
    instead of looking for the last key. One list in seven is as long as its time allows.
    """
    most = next(most for until, most in ((0.1, 8), (0.2, 16), (0.3, 32), (0.45, 64), (1.0, 128)) if done < until)
    num_facts = most if rng.random() < 1 / 7 else int(2 ** rng.uniform(2, math.log2(most + 1)))
    num_queries = rng.randint(1, min(num_facts, 16))
    max_age: int | None = None
    if done > 0.25 and rng.random() < 0.4:
        num_queries, max_age = num_facts // recall.FACTS_PER_QUERY, rng.choice((NEAR_AGE, STREAM_AGE))
        num_facts = recall.FACTS_PER_QUERY * num_queries
    return recall.generate_problems(
        max(4, TOKENS_PER_STEP // (num_facts + 3 * num_queries)),
        seed=rng.getrandbits(48),
        split="train",
        num_facts=num_facts,
        num_queries=num_queries,
        max_age=max_age,
    )


def draw_permutations(rng: random.Random, done: float) -> list[GeneratedProblem]:
    """1 to 6 reveals; mostly one move between them until a sixth of the training, two until a third, then three.

    A model that cannot yet carry one move on learns little from three: a state looks like chance until all moves are
    right. 40 % of the batches have the most moves of their time, the others 1 to 3. Steps 31 to 36 have words that only
    the longest problems use, hence two batches in seven.
    """
    most = min(PERMUTATION_MOVES, 1 + int(6 * done))
    moves = most if rng.random() < 0.4 else rng.randint(1, PERMUTATION_MOVES)
    num_reveals = rng.choice((1, 2, 3, 4, 5, 6, 6))
    tokens_each = 23 * num_reveals + 10  # prompt and trace: three for each of six steps, five for each state
    return permutation.generate_problems(
        PERMUTATION_TOKENS_PER_STEP // tokens_each,
        seed=rng.getrandbits(48),
        split="train",
        num_reveals=num_reveals,
        moves_per_reveal=moves,
    )


def draw_multiplications(rng: random.Random, done: float) -> list[GeneratedProblem]:
    """Three digits by two, from first to last."""
    return multiplication.generate_problems(64, seed=rng.getrandbits(48), split="train")


def draw_puzzles(rng: random.Random, done: float) -> list[GeneratedProblem]:
    """A batch of permutations or one of multiplications."""
    return rng.choice((draw_permutations, draw_multiplications))(rng, done)


RECIPES: dict[str, BaseRecipe] = {
    "recall": BaseRecipe(
        families=("recall",),
        draw_batch=draw_recall,
        settings=BaseSettings(
            steps=3600, peak_lr=3e-3, size=BaseSize(rope_theta=1e6, initializer_range=0.06, intermediate_size=256)
        ),
        measured=(
            *(("recall", {"num_facts": number, "num_queries": min(number, 8)}) for number in RECALL_FACTS),
            ("recall", {"num_facts": 64, "num_queries": 32, "max_age": STREAM_AGE}),
        ),
    ),
    "permutation": BaseRecipe(
        families=("permutation",),
        draw_batch=draw_permutations,
        settings=BaseSettings(steps=1400, peak_lr=2e-3, size=BaseSize(num_layers=3, initializer_range=0.06)),
        measured=tuple(
            ("permutation", {"num_reveals": number, "moves_per_reveal": PERMUTATION_MOVES}) for number in range(1, 7)
        ),
    ),
    "multiplication": BaseRecipe(
        families=("multiplication",),
        draw_batch=draw_multiplications,
        settings=BaseSettings(steps=1000, peak_lr=3e-3, size=BaseSize(num_layers=2, initializer_range=0.06)),
        measured=(("multiplication", {"left_digits": 3, "right_digits": 2}),),
    ),
    "puzzles": BaseRecipe(
        families=("permutation", "multiplication"),
        draw_batch=draw_puzzles,
        settings=BaseSettings(steps=1800, peak_lr=2e-3, size=BaseSize(num_layers=3, initializer_range=0.06)),
        measured=(
            ("permutation", {"num_reveals": 4, "moves_per_reveal": PERMUTATION_MOVES}),
            ("multiplication", {"left_digits": 3, "right_digits": 2}),
        ),
    ),
}


def make_base(name: str, folder: Path, *, on_step: Callable[[BaseStep], None]) -> None:
    """Trains and measures the base of a recipe, unless the folder holds it already.

    Args:
        name: In `RECIPES`.
        folder: For weights, tokenizer and `training.json`.
        on_step: Called after each step of its training; never where the base is there already.

    Raises:
        ValueError: There is no such recipe.
    """
    if name not in RECIPES:
        raise ValueError(f"base must be one of {', '.join(map(repr, RECIPES))}, got {name!r}; use one of these")
    recipe = RECIPES[name]
    if is_complete(folder, recipe.settings):
        return
    seconds = train_base(
        folder,
        vocabulary=joint_vocabulary([FAMILIES[family] for family in recipe.families]),
        draw_batch=recipe.draw_batch,
        settings=recipe.settings,
        on_step=on_step,
    )
    rows = []
    for family, shape in recipe.measured:
        accuracy = measure_base(folder, FAMILIES[family], shape=shape, count=MEASURED_PROBLEMS)
        rows.append({"family": family, "shape": dict(shape), **asdict(accuracy)})
    write_record(folder, {"base": name, "accuracy": rows}, recipe.settings, seconds=seconds)
