"""What a family of generated problems is, and what all families have in common.

Decides: the record of a problem with its right reasoning, which problems are held out, the tokens that every
vocabulary begins with. Plain Python: knows no tensors, no tokenizer and no model. Every token is a word between spaces.
A new family is one module with a `Family` in it, and one line in `families.py`.
"""

import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pte.learn.rewards import RewardFunction

PAD_TOKEN, BOS_TOKEN, EOS_TOKEN = "<pad>", "<bos>", "<eos>"
ASK_TOKEN = "?"
ANSWER_TOKEN = "=>"
COMMON_TOKENS = (PAD_TOKEN, BOS_TOKEN, EOS_TOKEN, ASK_TOKEN, ANSWER_TOKEN)
"""The first tokens of every vocabulary."""
HELDOUT_ONE_IN = 8

Split = Literal["train", "heldout"]


@dataclass(frozen=True)
class GeneratedProblem:
    """One problem with right reasoning for it."""

    id: str
    """Names the problem by its content: equal ids, equal problems."""
    problem: str
    """The prompt, tokens separated by spaces, without `<bos>`."""
    answer: str
    """What the family's accuracy compares a completion with, for example "7"."""
    source: str
    """The family and the split, for example "chained/train"."""
    trace: str
    """Right reasoning, with `<eos>` where it has an end."""


@dataclass(frozen=True)
class Family:
    """Problems of one kind.

    Args:
        name: `task.kind`, and the first part of each problem's source.
        generate: `generate(count, *, seed, split, **shape)`: problems of one shape, the same for the same arguments
            on every machine; the parameters of the shape are fields of the configuration's task section.
        accuracy: 1.0 where a completion is right; gets the problems' answers.
        vocabulary: Every token, in the order of its ids, `COMMON_TOKENS` first.
        temperature: At which completions are scored; above 0 where they choose something at random, so that a greedy
            one means nothing.
    """

    name: str
    generate: Callable[..., list[GeneratedProblem]]
    accuracy: RewardFunction
    vocabulary: Callable[[], list[str]]
    temperature: float = 0.0

    @property
    def shape_fields(self) -> tuple[str, ...]:
        """Names of the parameters that make a shape."""
        parameters = inspect.signature(self.generate).parameters
        return tuple(name for name in parameters if name not in ("count", "seed", "split"))


def split_of(problem: str) -> Split:
    """The split a prompt belongs to: a hash of its text holds out one in eight."""
    return "heldout" if _digest(problem)[0] % HELDOUT_ONE_IN == 0 else "train"


def named_problem(
    family: str, *, problem: str, answer: str, trace: str, split: Split | None = None
) -> GeneratedProblem:
    """The record of a problem, with the id and the source that its content gives it.

    Args:
        family: `Family.name`.
        problem: The prompt, without `<bos>`.
        answer: What accuracy compares with.
        trace: Right reasoning.
        split: Where problems share prompts, the split that this one was drawn for; its trace then names it as well.
    """
    content = problem if split is None else f"{problem} {trace}"
    split = split or split_of(problem)
    return GeneratedProblem(
        id=f"{family}-{split}-{_digest(content).hex()[:16]}",
        problem=problem,
        answer=answer,
        source=f"{family}/{split}",
        trace=trace,
    )


def check_draw(count: int, *, seed: int, split: Split) -> None:
    """Refuses arguments of a draw that every family shares.

    Raises:
        ValueError: `count` or `seed` is negative, or there is no such split.
    """
    require_shape(count >= 0, "count", rule="be at least 0", value=count, remedy="0 for none")
    require_shape(seed >= 0, "seed", rule="be at least 0", value=seed, remedy=str(abs(seed)))
    require_shape(
        split in ("train", "heldout"), "split", rule="be 'train' or 'heldout'", value=split, remedy="'heldout'"
    )


def require_shape(holds: bool, name: str, *, rule: str, value: object, remedy: str) -> None:
    """Refuses a parameter of a shape that breaks a rule.

    Args:
        holds: Whether the rule holds.
        name: Of the parameter.
        rule: What it must do, for example "be at least 1".
        value: What it got.
        remedy: What to use instead.

    Raises:
        ValueError: The rule does not hold.
    """
    if not holds:
        raise ValueError(f"{name} must {rule}, got {value!r}; use {remedy}")


def tokens_before_eos(text: str) -> list[str]:
    """The tokens of a completion up to `<eos>`, which decoding may have stripped."""
    tokens = text.split()
    return tokens[: tokens.index(EOS_TOKEN)] if EOS_TOKEN in tokens else tokens


def _digest(problem: str) -> bytes:
    return hashlib.sha256(problem.encode()).digest()
