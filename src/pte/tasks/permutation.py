"""Permutation composition in S5: a running state that the reasoning reveals only now and then.

Decides what a problem looks like, which problems are held out, and what counts as a right answer.
Plain Python: knows no tensors, no tokenizer and no model. Every token is a word between spaces.

A prompt asks for the state after so many steps (`?12`) and says how often to reveal it on the way (`/6`); then come the
steps, each with its number in one token (`7swap`), and the start permutation, a token for each image (`2>5`: 2 goes to
5). The trace repeats step by step and writes the running permutation after every sixth, the last one after `=>`:

    prompt  <bos> ?12 /6 1rest 2turn ... 12turn 1>3 2>1 3>5 4>4 5>2
    trace   #1 1rest #2 2turn ... #6 6turn 1>4 2>2 3>1 4>5 5>3 #7 7rest ... #12 12turn => 1>1 2>3 3>2 4>4 5>5 <eos>

Every image passes through every generator, in order (generator after state); `rest` changes nothing, so that distance
and amount of computing can be set apart. With six steps to a reveal, 12 tokens lie between the last image of a reveal
and the first of the next. A window shorter than that holds no image of the state that the next one is computed from: it
must come from a memory of evicted tokens, and be carried on by computing. The prompt alone gives the answer only to who
composes all generators at once.
"""

import random
from collections.abc import Iterator, Sequence

from pte.learn.rewards import exact_reward
from pte.tasks.generated import (
    ANSWER_TOKEN,
    COMMON_TOKENS,
    EOS_TOKEN,
    Family,
    GeneratedProblem,
    Split,
    check_draw,
    named_problem,
    require_shape,
    split_of,
    tokens_before_eos,
)

DEGREE = 5
GENERATORS = {"swap": (2, 1, 3, 4, 5), "turn": (2, 3, 4, 5, 1), "flip": (5, 4, 3, 2, 1)}
"""Images of 1 to 5 by name; the first two generate all 120 permutations."""
REST = "rest"
"""A step that leaves the state as it is."""
MAX_STEPS = 48


def generate_problems(
    count: int,
    *,
    seed: int,
    split: Split,
    num_reveals: int = 4,
    steps_per_reveal: int = 6,
    moves_per_reveal: int = 3,
    num_generators: int = 2,
) -> list[GeneratedProblem]:
    """Problems of one shape, the same for the same arguments on every machine.

    A problem belongs to the split that `split_of` its text names, whatever the seed, so a held-out
    problem cannot occur in training.

    Args:
        count: How many problems, 0 or more.
        seed: Seed of the draw, 0 or more. Other seeds give other problems.
        split: "train" or "heldout".
        num_reveals: How often the running permutation is written, the answer included.
        steps_per_reveal: Generators between two of them; twice as many tokens.
        moves_per_reveal: How many of these steps, evenly apart, apply a generator; the others `rest`. With fewer there
            is less to compute over the same distance.
        num_generators: Generators that problems draw from, the first ones of `GENERATORS`.

    Raises:
        ValueError: An argument is out of range.
    """
    check_draw(count, seed=seed, split=split)
    rule = f"be from 1 to {MAX_STEPS}"
    require_shape(1 <= steps_per_reveal <= MAX_STEPS, "steps_per_reveal", rule=rule, value=steps_per_reveal, remedy="6")
    most = MAX_STEPS // steps_per_reveal
    rule = f"be from 1 to {most} (with {steps_per_reveal} steps_per_reveal, {MAX_STEPS} steps in all)"
    require_shape(
        1 <= num_reveals <= most,
        "num_reveals",
        rule=rule,
        value=num_reveals,
        remedy=f"{most} or fewer, or fewer steps_per_reveal",
    )
    rule = f"be from 1 to steps_per_reveal ({steps_per_reveal})"
    require_shape(
        1 <= moves_per_reveal <= steps_per_reveal,
        "moves_per_reveal",
        rule=rule,
        value=moves_per_reveal,
        remedy=f"{min(3, steps_per_reveal)}",
    )
    rule = f"be from 2 to {len(GENERATORS)}"
    require_shape(2 <= num_generators <= len(GENERATORS), "num_generators", rule=rule, value=num_generators, remedy="2")
    drawn = _draw_problems(
        random.Random(seed),
        split=split,
        num_reveals=num_reveals,
        steps_per_reveal=steps_per_reveal,
        moves=moves_per_reveal,
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
    tokens = tokens_before_eos(completion_text)
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
    counted = range(1, MAX_STEPS + 1)
    numbers = [f"{mark}{number}" for mark in "#?/" for number in counted]
    steps = [f"{number}{name}" for number in counted for name in (*GENERATORS, REST)]
    return [*COMMON_TOKENS, *numbers, *steps, *_IMAGES]


_POINTS = range(1, DEGREE + 1)
_IMAGES = {f"{point}>{value}": (point, value) for point in _POINTS for value in _POINTS}


def _draw_problems(
    rng: random.Random, *, split: Split, num_reveals: int, steps_per_reveal: int, moves: int, names: Sequence[str]
) -> Iterator[GeneratedProblem]:
    """Endless problems of one split: draws until the hash of the text falls into it."""
    while True:
        state = rng.sample(_POINTS, DEGREE)
        steps = [name for _ in range(num_reveals) for name in _draw_steps(rng, names, moves, steps_per_reveal)]
        numbered = [f"{number}{name}" for number, name in enumerate(steps, start=1)]
        problem = " ".join((f"?{len(steps)}", f"/{steps_per_reveal}", *numbered, _written(state)))
        if split_of(problem) != split:
            continue
        trace = []
        for number, name in enumerate(steps, start=1):
            trace.append(f"#{number} {number}{name}")
            if name != REST:
                state = [GENERATORS[name][value - 1] for value in state]
            if number == len(steps):
                trace.append(ANSWER_TOKEN)
            if number % steps_per_reveal == 0:
                trace.append(_written(state))
        trace_text = " ".join((*trace, EOS_TOKEN))
        yield named_problem("permutation", problem=problem, answer=" ".join(map(str, state)), trace=trace_text)


def _draw_steps(rng: random.Random, names: Sequence[str], moves: int, steps_per_reveal: int) -> list[str]:
    """The steps up to a reveal: moves evenly apart, the last one right before it."""
    steps = [REST] * steps_per_reveal
    for move in range(1, moves + 1):
        steps[move * steps_per_reveal // moves - 1] = rng.choice(names)
    return steps


def _written(state: Sequence[int]) -> str:
    return " ".join(f"{point}>{value}" for point, value in zip(_POINTS, state, strict=True))


FAMILY = Family("permutation", generate_problems, exact_reward(parse_answer), vocabulary)
