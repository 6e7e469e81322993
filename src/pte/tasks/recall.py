"""Recall of facts in the policy's own thoughts: what is asked for is written nowhere but in the reasoning.

Decides what a problem looks like, which completions are right, and how each query is scored alone.
Plain Python: knows no tensors, no tokenizer and no model. Every token is a word between spaces.

A prompt lists operations: `key7` writes a fact, `ask7` asks for it. The reasoning carries them out in this order, two
tokens each: an operation is repeated, then comes a value. The value of a fact is the policy's own choice; the value
behind a query must be that of the last fact with this key:

    prompt  <bos> key7 key3 key12 ask3 ask7
    trace   key7 val4 key3 val11 key12 val4 ask3 val11 ask7 val4 <eos>

Without `max_age` all queries follow all facts. With it, queries come in between (a stream): each asks for a fact that
was written at most `max_age` facts ago, each octave of ages about as often as another. With fewer keys than facts,
keys are written again with new values.

Completions are sampled: a greedy policy has no choice to make. A policy that writes one value always would need no
memory, so a completion is wrong where a value stands in more than n / 16 + 4 sqrt(n / 16) + 1 of its n facts: uniform
draws break this less than once in 1000 completions (3 of 4 facts may agree, 6 of 16, 20 of 128).
The rule does not see a policy whose values follow from the keys; compare `read_completion(...).facts` over problems.
"""

import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pte.tasks.generated import (
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

NUM_VALUES = 16
MAX_KEYS = 128
KEYS = tuple(f"key{index}" for index in range(MAX_KEYS))
ASKS = tuple(f"ask{index}" for index in range(MAX_KEYS))
VALUES = tuple(f"val{index}" for index in range(NUM_VALUES))
WRITTEN_BY_ASK = dict(zip(ASKS, KEYS, strict=True))
TOKENS_PER_OPERATION = 2
QUERY_TRIES = 50
"""Draws before a fact of a stream is asked for again."""


@dataclass(frozen=True)
class ScoredQuery:
    """One query of a completion.

    Args:
        key: The key asked for.
        fact_token: Index of the reasoning token that holds the value of the fact, the newest of its key.
        query_token: Index of the reasoning token that should repeat it.
        facts_since: Facts written after it, up to the query.
        right: Whether the two values agree.
    """

    key: str
    fact_token: int
    query_token: int
    facts_since: int
    right: bool


@dataclass(frozen=True)
class ReadCompletion:
    """A completion that carries out a problem's operations in their order, each with a value.

    Args:
        facts: (key, value) in the order written.
        queries: Every query, in order.
        values_vary: Whether no value stands in more facts than uniform draws would have it in.
    """

    facts: tuple[tuple[str, str], ...]
    queries: tuple[ScoredQuery, ...]
    values_vary: bool


@dataclass(frozen=True)
class _Shape:
    """Checked parameters of a family of problems."""

    num_facts: int
    num_queries: int
    num_keys: int
    max_age: int | None


def generate_problems(
    count: int,
    *,
    seed: int,
    split: Split,
    num_facts: int = 16,
    num_queries: int = 8,
    num_keys: int = MAX_KEYS,
    max_age: int | None = None,
) -> list[GeneratedProblem]:
    """Problems of one shape, the same for the same arguments on every machine.

    A completion has two tokens for each fact and each query, and `<eos>`. The answer of a problem is its list of
    operations, which a completion must carry out.

    Args:
        count: How many problems, 0 or more.
        seed: Seed of the draw, 0 or more.
        split: "train" or "heldout"; the prompt's text decides which one it is in.
        num_facts: Facts to write.
        num_queries: Queries. Without `max_age` each asks for another key, so at most as many as there are facts.
        num_keys: Keys that problems draw from, the first ones of the pool. With fewer than `num_facts`, keys are
            written again, after all others have been.
        max_age: A query asks for one of the last `max_age` facts, in between; None for all queries after all facts.

    Raises:
        ValueError: An argument is out of range.
    """
    check_draw(count, seed=seed, split=split)
    shape = _checked_shape(num_facts, num_queries, num_keys, max_age)
    drawn = _draw_problems(random.Random(seed), shape=shape, split=split)
    return [next(drawn) for _ in range(count)]


def read_completion(completion_text: str, operations: str) -> ReadCompletion | None:
    """A completion's facts and queries, or None where it does not carry out the operations in order.

    Args:
        completion_text: What the model wrote, without the prompt. Text after `<eos>` is ignored.
        operations: `GeneratedProblem.answer`.
    """
    tokens, asked = tokens_before_eos(completion_text), operations.split()
    if tokens[::2] != asked or len(tokens) != 2 * len(asked) or not set(tokens[1::2]) <= set(VALUES):
        return None
    facts: list[tuple[str, str]] = []
    newest: dict[str, int] = {}
    fact_tokens: list[int] = []
    queries: list[ScoredQuery] = []
    for index, (operation, value) in enumerate(zip(asked, tokens[1::2], strict=True)):
        token = TOKENS_PER_OPERATION * index + 1
        key = WRITTEN_BY_ASK.get(operation)
        if key is None:
            newest[operation] = len(facts)
            facts.append((operation, value))
            fact_tokens.append(token)
        else:
            fact = newest[key]
            queries.append(
                ScoredQuery(
                    key=key,
                    fact_token=fact_tokens[fact],
                    query_token=token,
                    facts_since=len(facts) - 1 - fact,
                    right=value == facts[fact][1],
                )
            )
    return ReadCompletion(tuple(facts), tuple(queries), values_vary=_values_vary([value for _, value in facts]))


def all_right(completions: Sequence[str], answer: Sequence[str], **ignored: object) -> list[float]:
    """1.0 where every operation is carried out in order, every query is right and the values vary, else 0.0.

    Args:
        completions: What the model wrote, without the prompts.
        answer: `GeneratedProblem.answer`, one for each completion.
        ignored: The rest of a reward's arguments.
    """
    return [float(share == 1.0) for share in fraction_right(completions, answer)]


def fraction_right(completions: Sequence[str], answer: Sequence[str], **ignored: object) -> list[float]:
    """The share of the queries that are right; 0.0 where operations are not carried out in order or values do not vary.

    A reward for GRPO: `task.reward = "pte.tasks.recall:fraction_right"`.

    Args:
        completions: What the model wrote, without the prompts.
        answer: `GeneratedProblem.answer`, one for each completion.
        ignored: The rest of a reward's arguments.
    """
    shares = []
    for completion, operations in zip(completions, answer, strict=True):
        read = read_completion(completion, operations)
        counts = read is not None and read.values_vary
        shares.append(sum(query.right for query in read.queries) / len(read.queries) if read and counts else 0.0)
    return shares


def vocabulary() -> list[str]:
    """Every token of the task, in the order of its ids; independent of shape and split."""
    return [*COMMON_TOKENS, *VALUES, *KEYS, *ASKS]


def most_of_one_value(num_facts: int) -> int:
    """Facts that one value may stand in: what uniform draws exceed less than once in 1000 completions."""
    expected = num_facts / NUM_VALUES
    return math.floor(expected + 4 * math.sqrt(expected) + 1)


def _values_vary(values: Sequence[str]) -> bool:
    return max(Counter(values).values()) <= most_of_one_value(len(values))


def _draw_problems(rng: random.Random, *, shape: _Shape, split: Split) -> Iterator[GeneratedProblem]:
    """Endless problems of one split: draws until the hash of the text falls into it."""
    while True:
        operations = _draw_stream(rng, shape) if shape.max_age else _draw_facts_then_queries(rng, shape)
        problem = " ".join(operations)
        if split_of(problem) != split:
            continue
        values: dict[str, str] = {}
        trace = []
        for operation in operations:
            if operation not in WRITTEN_BY_ASK:
                values[operation] = rng.choice(VALUES)
            trace.append(f"{operation} {values[WRITTEN_BY_ASK.get(operation, operation)]}")
        yield named_problem("recall", problem=problem, answer=problem, trace=" ".join((*trace, EOS_TOKEN)))


def _draw_facts_then_queries(rng: random.Random, shape: _Shape) -> list[str]:
    keys = _draw_keys(rng, shape)
    asked = rng.sample(sorted(set(keys)), shape.num_queries)
    return [*keys, *(key.replace("key", "ask") for key in asked)]


def _draw_stream(rng: random.Random, shape: _Shape) -> list[str]:
    """Facts with queries in between, evenly; no fact is asked for twice, if it can be helped.

    The policy copies operations from the prompt one by one: an operation that occurs once says which one comes next.
    """
    assert shape.max_age is not None
    keys = _draw_keys(rng, shape)
    operations: list[str] = []
    asked: list[int] = []
    for written, key in enumerate(keys, start=1):
        operations.append(key)
        while len(asked) < shape.num_queries * written // shape.num_facts:
            for _ in range(QUERY_TRIES):
                fact = written - _draw_age(rng, most=min(shape.max_age, written))
                if fact not in asked:
                    break
            asked.append(fact)
            operations.append(keys[fact].replace("key", "ask"))
    return operations


def _draw_age(rng: random.Random, *, most: int) -> int:
    """Facts back from here, 1 to `most`, each octave alike."""
    return min(most, int(2 ** rng.uniform(0, math.log2(most + 1))))


def _draw_keys(rng: random.Random, shape: _Shape) -> list[str]:
    """The keys of the facts: rounds over the pool, each in an order of its own."""
    keys: list[str] = []
    while len(keys) < shape.num_facts:
        keys += rng.sample(KEYS[: shape.num_keys], min(shape.num_keys, shape.num_facts - len(keys)))
    return keys


def _checked_shape(num_facts: int, num_queries: int, num_keys: int, max_age: int | None) -> _Shape:
    """The shape, or a ValueError that names the parameter, the rule, the value and a remedy."""
    require_shape(num_facts >= 1, "num_facts", rule="be at least 1", value=num_facts, remedy="16")
    rule = f"be from 2 to {MAX_KEYS} (the keys of the vocabulary)"
    require_shape(2 <= num_keys <= MAX_KEYS, "num_keys", rule=rule, value=num_keys, remedy=str(MAX_KEYS))
    require_shape(
        max_age is None or 1 <= max_age <= num_keys,
        "max_age",
        rule=f"be from 1 to num_keys ({num_keys}; an older fact may be overwritten)",
        value=max_age,
        remedy=f"{num_keys} or less, or None for all queries at the end",
    )
    most = min(num_facts, num_keys) if max_age is None else num_facts
    rule = f"be from 1 to {most} (each key is asked for once)" if max_age is None else f"be from 1 to {most}"
    require_shape(1 <= num_queries <= most, "num_queries", rule=rule, value=num_queries, remedy=f"{most} or fewer")
    return _Shape(num_facts, num_queries, num_keys, max_age)


FAMILY = Family("recall", generate_problems, all_right, vocabulary, sampled=True)
