"""Permutation composition in S5: a running state that the reasoning reveals only now and then.

Decides what a problem looks like, which problems are held out, and what counts as a right answer.
Plain Python: knows no tensors, no tokenizer and no model. Every token is a word between spaces.

A prompt numbers its generators and ends with the start permutation, one token for each image (`2>5`: 2 goes to 5).
Generators at which the state is revealed are numbered `=k`, all others `#k`:

    #1 swap #2 turn ... =6 turn #7 swap ... =12 turn 1>3 2>1 3>5 4>4 5>2

The trace copies the numbered generators and writes the running permutation after each `=k`, the last one after `=>`:

    #1 swap #2 turn ... =6 turn 1>4 2>2 3>1 4>5 5>3 #7 swap ... =12 turn => 1>1 2>3 3>2 4>4 5>5 <eos>

Every image passes through every generator, in order (generator after state). With six generators to a reveal, 12 tokens
lie between the last image of a reveal and the first of the next. A window shorter than that holds no image of the state
that the next one is computed from: it must come from a memory of evicted tokens, and be carried on by computing. The
prompt alone gives the answer only to who composes all generators at once.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256

from pte.tasks.chained import (
    ANSWER_TOKEN,
    BOS_TOKEN,
    EOS_TOKEN,
    PAD_TOKEN,
    Split,
    split_of,
)

DEGREE = 5
GENERATORS = {"swap": (2, 1, 3, 4, 5), "turn": (2, 3, 4, 5, 1), "flip": (5, 4, 3, 2, 1)}
"""Images of 1 to 5 by name; the first two generate all 120 permutations."""
MAX_STEPS = 63


@dataclass(frozen=True)
class PermutationProblem:
    """One problem with the only right reasoning for it."""

    id: str
    """Names the problem by its content: equal ids, equal problems."""
    problem: str
    """The prompt, tokens separated by spaces, without `<bos>`."""
    answer: str
    """Images of 1 to 5 under the last permutation, for example "3 1 5 4 2"."""
    source: str
    """"permutation/train" or "permutation/heldout"."""
    trace: str
    """The right reasoning: two tokens a generator, five a reveal, `=>` before the last one, then `<eos>`."""


def generate_problems(
    count: int,
    *,
    seed: int,
    split: Split,
    num_reveals: int = 4,
    steps_per_reveal: int = 6,
    num_generators: int = 2,
) -> list[PermutationProblem]:
    """Problems of one shape, the same for the same arguments on every machine.

    A problem belongs to the split that `split_of` its text names, whatever the seed, so a held-out
    problem cannot occur in training.

    Args:
        count: How many problems, 0 or more.
        seed: Seed of the draw, 0 or more. Other seeds give other problems.
        split: "train" or "heldout".
        num_reveals: How often the running permutation is written, the answer included.
        steps_per_reveal: Generators between two of them; twice as many tokens.
        num_generators: Generators that problems draw from, the first ones of `GENERATORS`.

    Raises:
        ValueError: An argument is out of range.
    """
    _require(count >= 0, "count", "be at least 0", count, "0 for none")
    _require(seed >= 0, "seed", "be at least 0", seed, str(abs(seed)))
    _require(split in ("train", "heldout"), "split", "be 'train' or 'heldout'", split, "'heldout'")
    rule = f"be from 1 to {MAX_STEPS}"
    _require(1 <= steps_per_reveal <= MAX_STEPS, "steps_per_reveal", rule, steps_per_reveal, "6")
    most = MAX_STEPS // steps_per_reveal
    rule = f"be from 1 to {most} (with {steps_per_reveal} steps_per_reveal, {MAX_STEPS} steps in all)"
    _require(1 <= num_reveals <= most, "num_reveals", rule, num_reveals, f"{most} or fewer, or fewer steps_per_reveal")
    rule = f"be from 2 to {len(GENERATORS)}"
    _require(2 <= num_generators <= len(GENERATORS), "num_generators", rule, num_generators, "2")
    drawn = _draw_problems(
        random.Random(seed),
        split=split,
        num_steps=num_reveals * steps_per_reveal,
        steps_per_reveal=steps_per_reveal,
        names=tuple(GENERATORS)[:num_generators],
    )
    return [next(drawn) for _ in range(count)]


def parse_answer(completion_text: str) -> str | None:
    """The permutation a completion answers with, or None where it gives no well-formed answer.

    The completion must end in `=>` and the images of 1 to 5 in order, all different, optionally followed by `<eos>`,
    and hold one answer marker only: a completion that tries several answers gives none.

    Args:
        completion_text: What the model wrote, without the prompt. Text after `<eos>` is ignored.
    """
    tokens = completion_text.split()
    if EOS_TOKEN in tokens:
        tokens = tokens[: tokens.index(EOS_TOKEN)]
    if tokens.count(ANSWER_TOKEN) != 1 or tokens[-DEGREE - 1 : -DEGREE] != [ANSWER_TOKEN]:
        return None
    images = [_IMAGES.get(token) for token in tokens[-DEGREE:]]
    points = [image[0] for image in images if image]
    values = [image[1] for image in images if image]
    if points != list(_POINTS) or sorted(values) != list(_POINTS):
        return None
    return " ".join(map(str, values))


def vocabulary() -> list[str]:
    """Every token of the task, in the order of its ids; independent of shape and split."""
    numbers = [mark + str(number) for mark in "#=" for number in range(1, MAX_STEPS + 1)]
    return [PAD_TOKEN, BOS_TOKEN, EOS_TOKEN, ANSWER_TOKEN, *numbers, *GENERATORS, *_IMAGES]


_POINTS = range(1, DEGREE + 1)
_IMAGES = {f"{point}>{value}": (point, value) for point in _POINTS for value in _POINTS}


def _draw_problems(
    rng: random.Random, *, split: Split, num_steps: int, steps_per_reveal: int, names: Sequence[str]
) -> Iterator[PermutationProblem]:
    """Endless problems of one split: draws until the hash of the text falls into it."""
    while True:
        state = rng.sample(_POINTS, DEGREE)
        steps = rng.choices(names, k=num_steps)
        numbered = [
            f"{'=' if step % steps_per_reveal == 0 else '#'}{step} {name}" for step, name in enumerate(steps, start=1)
        ]
        problem = " ".join((*numbered, _written(state)))
        if split_of(problem) != split:
            continue
        trace = []
        for step, name in enumerate(steps, start=1):
            trace.append(numbered[step - 1])
            state = [GENERATORS[name][value - 1] for value in state]
            if step == num_steps:
                trace.append(ANSWER_TOKEN)
            if step % steps_per_reveal == 0:
                trace.append(_written(state))
        yield PermutationProblem(
            id=f"permutation-{split}-{sha256(problem.encode()).hexdigest()[:16]}",
            problem=problem,
            answer=" ".join(map(str, state)),
            source=f"permutation/{split}",
            trace=" ".join((*trace, EOS_TOKEN)),
        )


def _written(state: Sequence[int]) -> str:
    return " ".join(f"{point}>{value}" for point, value in zip(_POINTS, state, strict=True))


def _require(holds: bool, name: str, rule: str, value: object, remedy: str) -> None:
    if not holds:
        raise ValueError(f"{name} must {rule}, got {value!r}; use {remedy}")
