"""Long multiplication: partial products, written digit by digit, that the sum needs after they are gone.

Decides what a problem looks like, which problems are held out, and what counts as a right answer.
Plain Python: knows no tensors, no tokenizer and no model. Every token is a word between spaces.

A prompt is `4 3 2 * 5 6`. The trace writes one row for each digit of the second factor, the lowest first, then the sum
of the rows, then the product. Rows and sum go from the lowest place up, each place as its name, its digit and the carry
into the next; the highest place of a row is the last carry:

    @00 2 ^1 @01 9 ^1 @02 5 ^2 @03 2   @10 0 ^1 ...   +0 2 ^0 +1 9 ^0 ...   => 2 4 1 9 2 <eos>

`@10` is place 0 of row 1 (times the second factor's digit at place 1), `+k` is place k of the sum: digit k of row 0,
digit k - 1 of row 1 and so on, and the carry. The factors' digits are in the prompt; those of rows and sum are only in
the reasoning, many tokens before they are needed. Factors have no leading zero, products are padded with zeros.
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

TIMES_TOKEN = "*"
MAX_DIGITS = 6
"""Of a factor."""
MAX_CARRY = 8
"""9 * 9 + 8 = 89 carries 8, and six digits of 9 with a carry of 5 carry 5."""


def generate_problems(
    count: int, *, seed: int, split: Split, left_digits: int = 3, right_digits: int = 2
) -> list[GeneratedProblem]:
    """Problems of one shape, the same for the same arguments on every machine.

    A problem belongs to the split that `split_of` its text names, whatever the seed, so a held-out
    problem cannot occur in training.

    Args:
        count: How many problems, 0 or more.
        seed: Seed of the draw, 0 or more. Other seeds give other problems.
        split: "train" or "heldout".
        left_digits: Digits of the first factor, the places of a row.
        right_digits: Digits of the second factor, the rows.

    Raises:
        ValueError: An argument is out of range.
    """
    check_draw(count, seed=seed, split=split)
    rule = f"be from 1 to {MAX_DIGITS}"
    require_shape(1 <= left_digits <= MAX_DIGITS, "left_digits", rule=rule, value=left_digits, remedy="3")
    require_shape(1 <= right_digits <= MAX_DIGITS, "right_digits", rule=rule, value=right_digits, remedy="2")
    drawn = _draw_problems(random.Random(seed), split=split, left_digits=left_digits, right_digits=right_digits)
    return [next(drawn) for _ in range(count)]


def parse_answer(completion_text: str) -> str | None:
    """The digits a completion answers with, or None where it gives no well-formed answer.

    The completion must end in `=>` and digits, optionally followed by `<eos>`, and hold one answer marker only: a
    completion that tries several answers gives none.

    Args:
        completion_text: What the model wrote, without the prompt. Text after `<eos>` is ignored.
    """
    tokens = tokens_before_eos(completion_text)
    if ANSWER_TOKEN not in tokens:
        return None
    digits = tokens[tokens.index(ANSWER_TOKEN) + 1 :]
    return " ".join(digits) if digits and all(digit in _DIGITS for digit in digits) else None


def vocabulary() -> list[str]:
    """Every token of the task, in the order of its ids; independent of shape and split."""
    places = [f"@{row}{place}" for row in range(MAX_DIGITS) for place in range(MAX_DIGITS + 1)]
    sums = [f"+{place}" for place in range(2 * MAX_DIGITS)]
    carries = [f"^{carry}" for carry in range(MAX_CARRY + 1)]
    return [*COMMON_TOKENS, TIMES_TOKEN, *_DIGITS, *places, *sums, *carries]


_DIGITS = tuple("0123456789")


def _draw_problems(
    rng: random.Random, *, split: Split, left_digits: int, right_digits: int
) -> Iterator[GeneratedProblem]:
    """Endless problems of one split: draws until the hash of the text falls into it."""
    while True:
        left, right = (rng.randrange(10 ** (digits - 1), 10**digits) for digits in (left_digits, right_digits))
        problem = " ".join((*str(left), TIMES_TOKEN, *str(right)))
        if split_of(problem) != split:
            continue
        answer = " ".join(str(left * right).zfill(left_digits + right_digits))
        trace_text = " ".join((*_long_multiplication(left, right), ANSWER_TOKEN, answer, EOS_TOKEN))
        yield named_problem("multiplication", problem=problem, answer=answer, trace=trace_text)


def _long_multiplication(left: int, right: int) -> list[str]:
    """The words of the rows, then those of the sum."""
    left_lowest_first = [int(digit) for digit in reversed(str(left))]
    columns = [0] * (len(str(left)) + len(str(right)))
    words: list[str] = []
    for row, factor in enumerate(reversed(str(right))):
        digits = _write_places(words, [digit * int(factor) for digit in left_lowest_first] + [0], name=f"@{row}")
        for place, digit in enumerate(digits, start=row):
            columns[place] += digit
    _write_places(words, columns, name="+")
    return words


def _write_places(words: list[str], totals: Sequence[int], *, name: str) -> list[int]:
    """Appends each place with its digit and the carry into the next; the digits."""
    digits, carry = [], 0
    for place, total in enumerate(totals):
        carry, digit = divmod(total + carry, 10)
        digits.append(digit)
        words += (f"{name}{place}", str(digit))
        if place < len(totals) - 1:
            words.append(f"^{carry}")
    return digits


FAMILY = Family("multiplication", generate_problems, exact_reward(parse_answer), vocabulary)
