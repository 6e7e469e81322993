"""Chained assignments: a task whose intermediate values exist only in the reasoning.

Decides what a problem looks like, which problems are held out, and what counts as a right answer.
Plain Python: knows no tensors, no tokenizer and no model. Every token is a word between spaces.

A prompt gives constants as joint tokens (`A3`: variable A has value 3), then numbered statements
`#k x y r` (r = x + y mod the modulus), then `? r`, the asked variable. The trace spends ten tokens
on a statement and four on the answer, so 13 statements make 134 reasoning tokens:

    #k  x  x3 3  y  y9 9  r 2  r2   ...   => r 2 <eos>

A result is written once as a joint token, and read again some statements later. Under a window
shorter than that distance it can only come from a memory of evicted tokens.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from pte.learn.rewards import exact_reward
from pte.tasks.generated import (
    ANSWER_TOKEN,
    ASK_TOKEN,
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

UPPER = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
VARIABLE_NAMES = (*UPPER, *UPPER.lower(), *(2 * letter for letter in UPPER[:8]))
MAX_MODULUS = 10
MAX_STATEMENTS = 63
PAIR_TRIES = 50
"""Draws before a pair of operands that an earlier statement has is accepted."""
CONSTANT_FRACTION = 1 / 8
"""How often one operand is a constant although results are at a permitted distance."""


@dataclass(frozen=True)
class _Shape:
    """Checked parameters of a family of problems; `max_distance` is resolved to an integer."""

    num_statements: int
    num_constants: int
    modulus: int
    min_distance: int
    max_distance: int
    names: tuple[str, ...]


def generate_problems(
    count: int,
    *,
    seed: int,
    split: Split,
    num_statements: int = 13,
    num_constants: int = 4,
    modulus: int = MAX_MODULUS,
    min_distance: int = 1,
    max_distance: int | None = None,
    num_names: int | None = None,
) -> list[GeneratedProblem]:
    """Problems of one shape, the same for the same arguments on every machine.

    A problem belongs to the split that `split_of` its text names, whatever the seed, so a held-out
    problem cannot occur in training.

    Args:
        count: How many problems, 0 or more.
        seed: Seed of the draw, 0 or more. Other seeds give other problems.
        split: "train" or "heldout".
        num_statements: Statements in a prompt; the trace has ten times as many tokens, plus four.
        num_constants: Variables whose values the prompt gives, 2 or more.
        modulus: Sums are taken modulo this, 2 to 10.
        min_distance: Fewest statements between the last mention of a result (where it is computed,
            or used as an operand) and its next use; 1 is the statement right after it. Where no
            result is far enough back, operands are constants.
        max_distance: Most statements between the two; None sets no upper bound.
        num_names: Variable names that problems draw from, the first ones of the pool; None for all 60.
            With fewer, a memory has fewer keys to tell apart.

    Raises:
        ValueError: An argument is out of range, or the constants make too few different pairs for
            the statements that have only constants to add.
    """
    check_draw(count, seed=seed, split=split)
    names = _checked_names(num_names, needed=num_statements + num_constants)
    shape = _checked_shape(num_statements, num_constants, modulus, min_distance, max_distance, names)
    drawn = _draw_problems(random.Random(seed), shape=shape, split=split)
    return [next(drawn) for _ in range(count)]


def parse_answer(completion_text: str) -> str | None:
    """The value a completion answers with, or None where it gives no well-formed answer.

    The completion must end in `=> variable value`, optionally followed by `<eos>`, and hold one
    answer marker only: a completion that tries several answers gives none.

    Args:
        completion_text: What the model wrote, without the prompt. Text after `<eos>` is ignored.
    """
    tokens = tokens_before_eos(completion_text)
    if tokens.count(ANSWER_TOKEN) != 1 or tokens[-3:-2] != [ANSWER_TOKEN]:
        return None
    variable, value = tokens[-2:]
    is_value = value.isdecimal() and len(value) == 1
    return value if variable in VARIABLE_NAMES and is_value else None


def answer_is_right(completion_text: str, answer: str) -> bool:
    """Whether a completion answers with the right value; an empty completion is wrong.

    Args:
        completion_text: What the model wrote, without the prompt.
        answer: `GeneratedProblem.answer`.
    """
    return parse_answer(completion_text) == answer


def trace_is_right(completion_text: str, problem: GeneratedProblem) -> bool:
    """Whether every reasoning token is right, the answer included; `<eos>` may be stripped.

    Args:
        completion_text: What the model wrote, without the prompt.
        problem: The problem it was asked.
    """
    return tokens_before_eos(completion_text) == tokens_before_eos(problem.trace)


def vocabulary() -> list[str]:
    """Every token of the task, in the order of its ids; independent of shape and split."""
    values = [str(value) for value in range(MAX_MODULUS)]
    numbers = [f"#{number}" for number in range(MAX_STATEMENTS + 1)]
    joint = [name + value for name in VARIABLE_NAMES for value in values]
    return [*COMMON_TOKENS, *values, *numbers, *VARIABLE_NAMES, *joint]


def embedded_model_dir() -> Path:
    """Folder of the shipped reasoner and its tokenizer, for Transformers' `from_pretrained`."""
    return Path(str(resources.files("pte.tasks").joinpath("embedded")))


def _draw_problems(rng: random.Random, *, shape: _Shape, split: Split) -> Iterator[GeneratedProblem]:
    """Endless problems of one split: draws until the hash of the text falls into it."""
    while True:
        names = rng.sample(shape.names, shape.num_constants + shape.num_statements)
        constants, results = names[: shape.num_constants], names[shape.num_constants :]
        values = {name: rng.randrange(shape.modulus) for name in constants}
        statements = _draw_statements(rng, constants=constants, results=results, shape=shape)
        asked = rng.choice(results)
        prompt = [name + str(value) for name, value in values.items()]
        for number, (left, right, result) in enumerate(statements, start=1):
            prompt += (f"#{number}", left, right, result)
        problem = " ".join((*prompt, ASK_TOKEN, asked))
        if split_of(problem) != split:
            continue
        trace = []
        for number, (left, right, result) in enumerate(statements, start=1):
            x, y = values[left], values[right]
            z = values[result] = (x + y) % shape.modulus
            trace.append(f"#{number} {left} {left}{x} {x} {right} {right}{y} {y} {result} {z} {result}{z}")
        answer = str(values[asked])
        trace.append(f"{ANSWER_TOKEN} {asked} {answer} {EOS_TOKEN}")
        yield named_problem("chained", problem=problem, answer=answer, trace=" ".join(trace))


def _draw_statements(
    rng: random.Random, *, constants: list[str], results: list[str], shape: _Shape
) -> list[tuple[str, str, str]]:
    """(operand, operand, result) of each statement; no two add the same pair of variables."""
    statements: list[tuple[str, str, str]] = []
    pairs_used: set[frozenset[str]] = set()
    last_mention: dict[str, int] = {}
    for index, result in enumerate(results):
        reachable = [
            name
            for name, mention in last_mention.items()
            if shape.min_distance <= index - mention <= shape.max_distance
        ]
        for _ in range(PAIR_TRIES):
            if not reachable:
                left, right = rng.sample(constants, 2)
            elif len(reachable) == 1 or rng.random() < CONSTANT_FRACTION:
                left, right = rng.choice(reachable), rng.choice(constants)
                if rng.random() < 0.5:
                    left, right = right, left
            else:
                left, right = rng.sample(reachable, 2)
            pair = frozenset((left, right))
            if pair not in pairs_used:
                break
        pairs_used.add(pair)
        last_mention[result] = index
        last_mention.update((name, index) for name in (left, right) if name in last_mention)
        statements.append((left, right, result))
    return statements


def _checked_shape(
    num_statements: int,
    num_constants: int,
    modulus: int,
    min_distance: int,
    max_distance: int | None,
    names: tuple[str, ...],
) -> _Shape:
    """The shape, or a ValueError that names the parameter, the rule, the value and a remedy."""
    require_shape(num_constants >= 2, "num_constants", rule="be at least 2", value=num_constants, remedy="2 or more")
    most = min(MAX_STATEMENTS, len(VARIABLE_NAMES) - num_constants)
    rule = f"be from 1 to {most} (each statement and each of {num_constants} constants has its own name)"
    remedy = f"{most} or fewer statements, or fewer constants"
    require_shape(1 <= num_statements <= most, "num_statements", rule=rule, value=num_statements, remedy=remedy)
    rule = f"be from 2 to {MAX_MODULUS} (values are single digits)"
    require_shape(2 <= modulus <= MAX_MODULUS, "modulus", rule=rule, value=modulus, remedy=str(MAX_MODULUS))
    require_shape(min_distance >= 1, "min_distance", rule="be at least 1", value=min_distance, remedy="1")
    furthest = num_statements if max_distance is None else max_distance
    rule = f"be at least min_distance ({min_distance})"
    require_shape(
        max_distance is None or furthest >= min_distance,
        "max_distance",
        rule=rule,
        value=max_distance,
        remedy="None for no bound",
    )
    only_constants = min(min_distance, num_statements)
    pairs = num_constants * (num_constants - 1) // 2
    rule = f"make {only_constants} different pairs, for the statements before min_distance ({min_distance})"
    require_shape(
        pairs >= only_constants,
        "num_constants",
        rule=rule,
        value=num_constants,
        remedy="more constants or a smaller min_distance",
    )
    return _Shape(num_statements, num_constants, modulus, min_distance, furthest, names)


def _checked_names(num_names: int | None, *, needed: int) -> tuple[str, ...]:
    """The names to draw from, or a ValueError; too many variables for the whole pool are `_checked_shape`'s to say."""
    if num_names is None:
        return VARIABLE_NAMES
    most = len(VARIABLE_NAMES)
    rule = f"be from num_statements + num_constants ({needed}) to {most}"
    require_shape(
        needed <= num_names <= most, "num_names", rule=rule, value=num_names, remedy=f"{min(needed, most)} or more"
    )
    return VARIABLE_NAMES[:num_names]


FAMILY = Family("chained", generate_problems, exact_reward(parse_answer), vocabulary)
