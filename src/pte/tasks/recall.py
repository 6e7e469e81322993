"""Recall of facts in the policy's own thoughts: what is asked for is written nowhere but in the reasoning.

Decides what a problem looks like, which completions are right, and how each query is scored alone.
Plain Python: knows no tensors, no tokenizer and no model. Every token is a word between spaces.

A prompt names the first and the last key and lists queries. The reasoning writes a fact for each key from the first to
the last, one token that joins key and value; the value is the policy's own choice. Then it repeats each query and
answers with the fact:

    prompt  <bos> key17 key20 ? ask19 ask17
    trace   key17=4 key18=0 key19=6 key20=4 ask19 key19=6 ask17 key17=4 <eos>

With `max_age` the problem is a stream, which has no end of its own: two facts, then a query of the policy's own choice
about one of the last `max_age` facts, and so on; after the last key comes the first one again, with a new value:

    prompt  <bos> key17 ...
    trace   key17=4 key18=0 ask17 key17=4 key19=6 key20=4 ask19 key19=6 ...

Completions are sampled: a greedy policy has no choice to make. Everything that is chosen is drawn uniformly, so that a
temperature below 1, which spares the policy slips at tokens that it does not choose, changes no distribution. A policy
that writes one value always would need no memory, so a completion is wrong where a value stands in more than
n / 8 + 4 sqrt(n / 8) + 1 of its n facts: uniform draws break this less than once in 1000 completions. The rule refuses
nothing below five facts, and does not see a policy whose values follow from the keys, nor one that asks for new facts
only; compare `read_completion(...)` over problems.
"""

import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pte.tasks.generated import (
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

NUM_VALUES = 8
MAX_KEYS = 128
STREAM_TOKEN = "..."
KEYS = tuple(f"key{index}" for index in range(MAX_KEYS))
ASKS = tuple(f"ask{index}" for index in range(MAX_KEYS))
FACTS = tuple(f"{key}={value}" for key in KEYS for value in range(NUM_VALUES))
_FACT_SET = frozenset(FACTS)
FACTS_PER_QUERY = 2
"""Of a stream."""
FEWEST_PROMPTS = 64
"""Of a shape of lists, so that both splits have some."""


@dataclass(frozen=True)
class ScoredQuery:
    """One query of a completion.

    Args:
        key: The key asked for.
        fact_token: Index of the reasoning token that is the fact, the newest of its key.
        query_token: Index of the reasoning token that should repeat it.
        facts_since: Facts written after it, up to the query.
        right: Whether the answer is the fact.
        restated: Whether an earlier answer stated the fact again, so that it left later than when it was written.
    """

    key: str
    fact_token: int
    query_token: int
    facts_since: int
    right: bool
    restated: bool = False


@dataclass(frozen=True)
class ReadCompletion:
    """What a completion holds, up to the first token that is out of place.

    Args:
        facts: (key, value) in the order written.
        queries: Every query that was answered, in order.
        expected_queries: As many as a whole completion has.
        values_vary: Whether no value stands in more facts than uniform draws would have it in.
    """

    facts: tuple[tuple[str, str], ...]
    queries: tuple[ScoredQuery, ...]
    expected_queries: int
    values_vary: bool

    @property
    def fraction_right(self) -> float:
        """Share of the expected queries that are right; 0.0 where values do not vary."""
        return sum(query.right for query in self.queries) / self.expected_queries if self.values_vary else 0.0


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

    A completion has one token for each fact and two for each query; that of a list ends with `<eos>`. Streams of one
    first key share a prompt, and are in both splits: what is new in a completion is what the policy chooses.

    Args:
        count: How many problems, 0 or more.
        seed: Seed of the draw, 0 or more.
        split: "train" or "heldout"; the prompt's text decides which one it is in, but for streams.
        num_facts: Facts to write; of a stream, twice the queries.
        num_queries: Queries. Without `max_age` each asks for another key, so at most as many as there are facts.
        num_keys: Keys that follow each other, the first ones of the pool; after the last comes the first again.
        max_age: Makes a stream, in which a query asks for one of the last `max_age` facts.

    Raises:
        ValueError: An argument is out of range.
    """
    check_draw(count, seed=seed, split=split)
    shape = _checked_shape(num_facts, num_queries, num_keys, max_age)
    rng = random.Random(f"{seed}/{split}")
    drawn = (
        _draw_streams(rng, shape=shape, split=split) if shape.max_age else _draw_lists(rng, shape=shape, split=split)
    )
    return [next(drawn) for _ in range(count)]


def read_completion(completion_text: str, answer: str) -> ReadCompletion:
    """A completion's facts and queries.

    Args:
        completion_text: What the model wrote, without the prompt. Text after `<eos>` is ignored.
        answer: `GeneratedProblem.answer`.
    """
    tokens, layout = tokens_before_eos(completion_text), _Layout(answer)
    facts: list[tuple[str, str]] = []
    newest: dict[str, int] = {}
    fact_tokens: list[int] = []
    answered: set[int] = set()
    queries: list[ScoredQuery] = []
    asked: str | None = None
    for index, (token, expected) in enumerate(zip(tokens, layout.expected(), strict=False)):
        key, _, value = token.partition("=")
        if expected == "answer":
            assert asked is not None
            fact = newest[asked]
            since = len(facts) - 1 - fact
            right = token == "=".join(facts[fact]) and since < layout.max_age
            queries.append(ScoredQuery(asked, fact_tokens[fact], index, since, right, restated=fact in answered))
            answered.add(fact)
        elif token in ASKS and (expected == "ask" or token == expected):
            asked = KEYS[ASKS.index(token)]
            if asked not in newest:
                break
        elif key == expected and token in _FACT_SET:
            newest[key] = len(facts)
            facts.append((key, value))
            fact_tokens.append(index)
        else:
            break
    return ReadCompletion(
        tuple(facts),
        tuple(queries),
        expected_queries=layout.num_queries,
        values_vary=_values_vary([value for _, value in facts]),
    )


def all_right(completions: Sequence[str], answer: Sequence[str], **ignored: object) -> list[float]:
    """1.0 where every expected query is answered and right and the values vary, else 0.0.

    Args:
        completions: What the model wrote, without the prompts.
        answer: `GeneratedProblem.answer`, one for each completion.
        ignored: The rest of a reward's arguments.
    """
    return [float(share == 1.0) for share in fraction_right(completions, answer)]


def fraction_right(completions: Sequence[str], answer: Sequence[str], **ignored: object) -> list[float]:
    """The share of the expected queries that are right; 0.0 where values do not vary.

    A reward for GRPO: `task.reward = "pte.tasks.recall:fraction_right"`.

    Args:
        completions: What the model wrote, without the prompts.
        answer: `GeneratedProblem.answer`, one for each completion.
        ignored: The rest of a reward's arguments.
    """
    return [read_completion(*pair).fraction_right for pair in zip(completions, answer, strict=True)]


def vocabulary() -> list[str]:
    """Every token of the task, in the order of its ids; independent of shape and split."""
    return [*COMMON_TOKENS, STREAM_TOKEN, *KEYS, *ASKS, *FACTS]


def most_of_one_value(num_facts: int) -> int:
    """Facts that one value may stand in: what uniform draws exceed less than once in 1000 completions."""
    expected = num_facts / NUM_VALUES
    return math.floor(expected + 4 * math.sqrt(expected) + 1)


class _Layout:
    """What each token of a completion must be, from a problem's answer: `FIRST NUM_KEYS NUM_FACTS AGE ASK ASK ...`."""

    def __init__(self, answer: str) -> None:
        first, num_keys, num_facts, max_age, *self.asks = answer.split()
        self.first, self.num_keys, self.num_facts = KEYS.index(first), int(num_keys), int(num_facts)
        self.max_age = int(max_age) if int(max_age) else self.num_facts
        self.is_stream = not self.asks

    @property
    def num_queries(self) -> int:
        """Of a whole completion."""
        return self.num_facts // FACTS_PER_QUERY if self.is_stream else len(self.asks)

    def key(self, fact: int) -> str:
        """The key of a fact, from 0."""
        return KEYS[(self.first + fact) % self.num_keys]

    def expected(self) -> Iterator[str]:
        """For each token the key of a fact, a query, "ask" for any query, or "answer"."""
        for fact in range(self.num_facts):
            yield self.key(fact)
            if self.is_stream and (fact + 1) % FACTS_PER_QUERY == 0:
                yield from ("ask", "answer")
        for ask in self.asks:
            yield from (ask, "answer")


def _values_vary(values: Sequence[str]) -> bool:
    return max(Counter(values).values(), default=0) <= most_of_one_value(len(values))


def _draw_lists(rng: random.Random, *, shape: _Shape, split: Split) -> Iterator[GeneratedProblem]:
    """Facts, then queries: endless problems of one split; what falls into the other or does not vary is left out."""
    while True:
        first = rng.randrange(shape.num_keys)
        keys = [KEYS[(first + fact) % shape.num_keys] for fact in range(shape.num_facts)]
        asked = rng.sample(keys, shape.num_queries)
        asks = [key.replace("key", "ask") for key in asked]
        problem = " ".join((keys[0], keys[-1], ASK_TOKEN, *asks))
        if split_of(problem) != split:
            continue
        facts = {key: f"{key}={rng.randrange(NUM_VALUES)}" for key in keys}
        if not _values_vary([fact.partition("=")[2] for fact in facts.values()]):
            continue
        answers = [word for ask, key in zip(asks, asked, strict=True) for word in (ask, facts[key])]
        layout = " ".join((keys[0], str(shape.num_keys), str(shape.num_facts), "0", *asks))
        trace = " ".join((*facts.values(), *answers, EOS_TOKEN))
        yield named_problem("recall", problem=problem, answer=layout, trace=trace)


def _draw_streams(rng: random.Random, *, shape: _Shape, split: Split) -> Iterator[GeneratedProblem]:
    """Endless streams with values that vary; a query asks for each of the last facts alike."""
    assert shape.max_age is not None
    while True:
        first = rng.randrange(shape.num_keys)
        facts: list[str] = []
        trace: list[str] = []
        for fact in range(shape.num_facts):
            key = KEYS[(first + fact) % shape.num_keys]
            facts.append(f"{key}={rng.randrange(NUM_VALUES)}")
            trace.append(facts[-1])
            if len(facts) % FACTS_PER_QUERY == 0:
                asked = facts[-rng.randint(1, min(shape.max_age, len(facts)))]
                trace += [asked.partition("=")[0].replace("key", "ask"), asked]
        if not _values_vary([fact.partition("=")[2] for fact in facts]):
            continue
        yield named_problem(
            "recall",
            problem=f"{KEYS[first]} {STREAM_TOKEN}",
            answer=f"{KEYS[first]} {shape.num_keys} {shape.num_facts} {shape.max_age}",
            trace=" ".join(trace),
            split=split,
        )


def _checked_shape(num_facts: int, num_queries: int, num_keys: int, max_age: int | None) -> _Shape:
    """The shape, or a ValueError that names the parameter, the rule, the value and a remedy."""
    require_shape(num_facts >= 1, "num_facts", rule="be at least 1", value=num_facts, remedy="16")
    rule = f"be from 2 to {MAX_KEYS} (the keys of the vocabulary)"
    require_shape(2 <= num_keys <= MAX_KEYS, "num_keys", rule=rule, value=num_keys, remedy=str(MAX_KEYS))
    if max_age is None:
        rule = f"be at most num_keys ({num_keys}; every key is written once)"
        require_shape(num_facts <= num_keys, "num_facts", rule=rule, value=num_facts, remedy=str(num_keys))
        rule = f"be from 1 to {num_facts} (each key is asked for once)"
        require_shape(
            1 <= num_queries <= num_facts, "num_queries", rule=rule, value=num_queries, remedy=f"{num_facts} or fewer"
        )
        prompts = num_keys * math.perm(num_facts, num_queries)
        rule = f"be enough for {FEWEST_PROMPTS} prompts (num_keys times the orders of queries; both splits need some)"
        require_shape(prompts >= FEWEST_PROMPTS, "num_keys", rule=rule, value=num_keys, remedy=str(MAX_KEYS))
    else:
        rule = f"be from 1 to num_keys ({num_keys}; an older fact is overwritten)"
        require_shape(1 <= max_age <= num_keys, "max_age", rule=rule, value=max_age, remedy=f"{num_keys} or less")
        rule = f"be a multiple of {FACTS_PER_QUERY} in a stream (so many facts come before each query)"
        even = num_facts % FACTS_PER_QUERY == 0
        require_shape(even, "num_facts", rule=rule, value=num_facts, remedy=str(num_facts + 1))
        rule = f"be num_facts / {FACTS_PER_QUERY} ({num_facts} / {FACTS_PER_QUERY}) in a stream"
        holds = num_facts == FACTS_PER_QUERY * num_queries
        require_shape(holds, "num_queries", rule=rule, value=num_queries, remedy=f"{num_facts // FACTS_PER_QUERY}")
    return _Shape(num_facts, num_queries, num_keys, max_age)


FAMILY = Family("recall", generate_problems, all_right, vocabulary, temperature=0.5)
