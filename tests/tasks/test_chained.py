"""Claims about chained assignments: what is drawn, what is held out, what counts as right."""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from pte.tasks.chained import (
    MAX_STATEMENTS,
    VARIABLE_NAMES,
    answer_is_right,
    embedded_model_dir,
    generate_problems,
    parse_answer,
    trace_is_right,
    vocabulary,
)
from pte.tasks.generated import GeneratedProblem, split_of


@dataclass(frozen=True)
class ParsedPrompt:
    """A prompt read by rules of its own, so that the generator is not checked by itself."""

    constants: dict[str, int]
    statements: list[tuple[str, str, str]]
    asked: str


def parse_prompt(problem: str) -> ParsedPrompt:
    body, asked = problem.split(" ? ")
    constants, *statements = re.split(r" #(?=\d)", body)
    pairs = [re.fullmatch(r"([A-Za-z]+)(\d)", joint).groups() for joint in constants.split()]
    numbered = [statement.split() for statement in statements]
    assert [number for number, *_ in numbered] == [str(k + 1) for k in range(len(numbered))]
    return ParsedPrompt(
        constants={name: int(value) for name, value in pairs},
        statements=[(left, right, result) for _, left, right, result in numbered],
        asked=asked,
    )


def value_of(name: str, prompt: ParsedPrompt, modulus: int) -> int:
    """Backwards from the asked variable: the opposite direction to the generator's."""
    if name in prompt.constants:
        return prompt.constants[name]
    left, right = next((x, y) for x, y, result in prompt.statements if result == name)
    return (value_of(left, prompt, modulus) + value_of(right, prompt, modulus)) % modulus


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    """Permitted arguments of `generate_problems`, small enough to recurse through."""
    min_distance = draw(st.integers(1, 4))
    max_distance = draw(st.none() | st.integers(min_distance, 16))
    return {
        "seed": draw(st.integers(0, 2**32)),
        "split": draw(st.sampled_from(["train", "heldout"])),
        "num_statements": draw(st.integers(1, 14)),
        "num_constants": draw(st.integers(4, 8)),
        "modulus": draw(st.integers(2, 10)),
        "min_distance": min_distance,
        "max_distance": max_distance,
    }


def operand_distances(prompt: ParsedPrompt) -> list[tuple[int, str, int]]:
    """(statement, operand, statements since its last mention as a result or operand) of every operand; 0 if new."""
    mentioned: dict[str, int] = {}
    found = []
    for index, (left, right, result) in enumerate(prompt.statements):
        found += [(index, operand, index - mentioned.get(operand, index)) for operand in (left, right)]
        mentioned |= dict.fromkeys((left, right, result), index)
    return found


@given(shape=shapes())
def test_the_answer_equals_an_independent_evaluation_of_the_prompt(shape: dict[str, Any]) -> None:
    for problem in generate_problems(3, **shape):
        prompt = parse_prompt(problem.problem)
        assert problem.answer == str(value_of(prompt.asked, prompt, shape["modulus"]))
        assert parse_answer(problem.trace) == problem.answer
        assert prompt.asked not in prompt.constants


@given(shape=shapes())
def test_every_value_in_a_trace_is_right(shape: dict[str, Any]) -> None:
    for problem in generate_problems(3, **shape):
        prompt = parse_prompt(problem.problem)
        expected: list[str] = []
        for number, names in enumerate(prompt.statements, start=1):
            x, y, z = (value_of(name, prompt, shape["modulus"]) for name in names)
            a, b, c = names
            expected += [
                f"#{number}",
                a,
                f"{a}{x}",
                f"{x}",
                b,
                f"{b}{y}",
                f"{y}",
                c,
                f"{z}",
                f"{c}{z}",
            ]
        asked_value = value_of(prompt.asked, prompt, shape["modulus"])
        assert problem.trace.split() == [*expected, "=>", prompt.asked, str(asked_value), "<eos>"]


@given(shape=shapes())
def test_every_operand_is_defined_before_its_use_and_at_a_permitted_distance(
    shape: dict[str, Any],
) -> None:
    for problem in generate_problems(3, **shape):
        prompt = parse_prompt(problem.problem)
        most = shape["max_distance"] or shape["num_statements"]
        for index, operand, distance in operand_distances(prompt):
            in_reach = operand in prompt.constants or shape["min_distance"] <= distance <= most
            assert in_reach, (operand, index, problem.problem)


@given(shape=shapes())
def test_no_variable_is_assigned_twice_and_no_two_statements_add_the_same_pair(
    shape: dict[str, Any],
) -> None:
    for problem in generate_problems(3, **shape):
        prompt = parse_prompt(problem.problem)
        assigned = [*prompt.constants, *(result for _, _, result in prompt.statements)]
        assert len(set(assigned)) == len(assigned) == shape["num_constants"] + shape["num_statements"]
        pairs = [frozenset((left, right)) for left, right, _ in prompt.statements]
        assert all(len(pair) == 2 for pair in pairs)
        assert len(set(pairs)) == len(pairs)


@given(shape=shapes())
def test_every_token_is_in_the_vocabulary_and_a_statement_costs_ten(shape: dict[str, Any]) -> None:
    known = set(vocabulary())
    for problem in generate_problems(2, **shape):
        assert known.issuperset(problem.problem.split() + problem.trace.split())
        assert len(problem.trace.split()) == 10 * shape["num_statements"] + 4
        assert len(problem.problem.split()) == shape["num_constants"] + 4 * shape["num_statements"] + 2


def test_operands_are_mostly_results_at_every_distance() -> None:
    distances: Counter[int] = Counter()
    constants = 0
    for problem in generate_problems(500, seed=1, split="train", min_distance=2, max_distance=6):
        prompt = parse_prompt(problem.problem)
        for index, operand, distance in operand_distances(prompt):
            if index >= 8 and operand in prompt.constants:
                constants += 1
            elif index >= 8:
                distances[distance] += 1
    # Five statements of 500 problems have 5000 operands; one pair in 8 holds a constant, and more where only one
    # result is far enough from its last mention.
    assert sum(distances.values()) + constants == 5000
    assert 200 < constants < 1000
    assert sorted(distances) == [2, 3, 4, 5, 6]
    assert min(distances.values()) > 0.02 * sum(distances.values())


def test_fewer_names_are_the_first_of_the_pool_and_all_of_them_occur() -> None:
    problems = generate_problems(200, seed=1, split="train", num_statements=6, num_names=12)
    names = set()
    for problem in problems:
        prompt = parse_prompt(problem.problem)
        names |= {*prompt.constants, *(result for _, _, result in prompt.statements)}
    assert names == set(VARIABLE_NAMES[:12])


def test_values_that_must_be_remembered_are_many_when_the_distance_is_large() -> None:
    def far(min_distance: int) -> float:
        problems = generate_problems(200, seed=1, split="train", min_distance=min_distance)
        far_away = [
            distance >= 4 and operand not in parse_prompt(problem.problem).constants
            for problem in problems
            for _, operand, distance in operand_distances(parse_prompt(problem.problem))
        ]
        return sum(far_away) / len(problems)

    assert far(1) < 4 < 12 < far(4)


def test_answers_are_nearly_uniform() -> None:
    answers = Counter(problem.answer for problem in generate_problems(4000, seed=3, split="train"))
    assert set(answers) == set("0123456789")
    # Even values are the likelier ones: all constants even, all results even (one problem in 16).
    assert all(0.07 < count / 4000 < 0.13 for count in answers.values()), answers


def test_the_splits_share_no_problem_whatever_the_seeds() -> None:
    train = {p.problem for seed in (0, 1, 7) for p in generate_problems(1500, seed=seed, split="train")}
    heldout = generate_problems(1500, seed=0, split="heldout")
    assert train.isdisjoint(problem.problem for problem in heldout)
    assert all(split_of(text) == "train" for text in train)
    assert all(split_of(problem.problem) == "heldout" for problem in heldout)
    assert {problem.source for problem in heldout} == {"chained/heldout"}


def test_the_split_is_a_hash_of_the_text_that_holds_out_one_in_eight() -> None:
    # Pinned, for a released split must not move. The first byte of sha256 modulo 8:
    assert split_of("A3 B4 #1 A B C ? C") == "train"  # 0x8b = 139 = 8 * 17 + 3
    assert split_of("A3 B4 #1 A B E ? E") == "heldout"  # 0x30 = 48 = 8 * 6 + 0
    held_out = [split_of(f"text {index}") for index in range(4000)].count("heldout")
    assert held_out == pytest.approx(500, abs=75)


@given(seed=st.integers(0, 2**32), split=st.sampled_from(["train", "heldout"]))
def test_the_same_seed_draws_the_same_problems_and_another_seed_others(seed: int, split: Any) -> None:
    first = generate_problems(4, seed=seed, split=split)
    assert first == generate_problems(4, seed=seed, split=split)
    assert first[:2] == generate_problems(2, seed=seed, split=split)
    assert first != generate_problems(4, seed=seed + 1, split=split)


def test_a_seed_draws_the_problem_it_has_always_drawn() -> None:
    (problem,) = generate_problems(1, seed=5, split="heldout", num_statements=2)
    assert problem == GeneratedProblem(
        id="chained-heldout-8844058ad0e0ed2e",
        problem="FF2 Y2 T4 B1 #1 T Y X #2 T X a ? a",
        answer="0",
        source="chained/heldout",
        trace="#1 T T4 4 Y Y2 2 X 6 X6 #2 T T4 4 X X6 6 a 0 a0 => a 0 <eos>",
    )


def test_ids_name_the_content() -> None:
    problems = generate_problems(500, seed=2, split="train")
    assert len({problem.id for problem in problems}) == len({problem.problem for problem in problems}) == 500


def test_the_worked_example() -> None:
    # A=7; B = A + C = 7 + 5 = 12 = 2 mod 10; D = B + A = 2 + 7 = 9.
    prompt = parse_prompt("A7 C5 #1 A C B #2 B A D ? D")
    assert value_of("B", prompt, 10) == 2
    problem = GeneratedProblem(
        id="worked",
        problem="A7 C5 #1 A C B #2 B A D ? D",
        answer=str(value_of("D", prompt, 10)),
        source="chained/train",
        trace="#1 A A7 7 C C5 5 B 2 B2 #2 B B2 2 A A7 7 D 9 D9 => D 9 <eos>",
    )
    assert problem.answer == "9"
    assert answer_is_right(problem.trace, problem.answer)
    assert trace_is_right(problem.trace, problem)


def test_the_longest_problems_use_every_name() -> None:
    constants = 2
    statements = min(MAX_STATEMENTS, len(VARIABLE_NAMES) - constants)
    (problem,) = generate_problems(1, seed=0, split="train", num_statements=statements, num_constants=constants)
    assert set(VARIABLE_NAMES) == {token for token in problem.trace.split() if token in VARIABLE_NAMES}
    assert len(problem.trace.split()) == 10 * statements + 4


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("=> A 7 <eos>", "7"),
        ("=> A 7", "7"),
        ("#1 A A3 3 B B4 4 C 7 C7 => C 7 <eos> <pad> <pad>", "7"),
        ("=> A 7 <eos> => A 3", "7"),
        ("", None),
        ("<eos>", None),
        ("=> A", None),
        ("=> A <eos>", None),
        ("=>", None),
        ("A 7", None),
        ("=> A 7 #2", None),
        ("=> A B", None),
        ("=> A 77", None),
        ("=> 7 7", None),
        ("=> A A7", None),
        ("=> A 7 => A 8", None),
        ("=> => A 8", None),
    ],
)
def test_an_answer_is_read_only_from_a_well_formed_end(completion: str, answer: str | None) -> None:
    assert parse_answer(completion) == answer


@given(problem=shapes().map(lambda shape: generate_problems(1, **shape)[0]))
def test_an_empty_completion_is_wrong_and_the_prompt_is_no_answer(problem: GeneratedProblem) -> None:
    assert not answer_is_right("", problem.answer)
    assert not trace_is_right("", problem)
    assert not answer_is_right(problem.problem, problem.answer)
    assert answer_is_right(problem.trace, problem.answer)


@given(shape=shapes(), data=st.data())
def test_one_wrong_token_makes_the_trace_wrong(shape: dict[str, Any], data: st.DataObject) -> None:
    (problem,) = generate_problems(1, **shape)
    tokens = problem.trace.split()
    place = data.draw(st.integers(0, len(tokens) - 2))
    other = data.draw(st.sampled_from([token for token in vocabulary() if token != tokens[place]]))
    changed = [*tokens[:place], other, *tokens[place + 1 :]]
    assert not trace_is_right(" ".join(changed), problem)
    assert trace_is_right(" ".join(tokens[:-1]), problem)


def test_a_right_answer_after_wrong_reasoning_is_right_but_its_trace_is_not() -> None:
    (problem,) = generate_problems(1, seed=0, split="train")
    ending = " ".join(problem.trace.split()[-4:])
    assert answer_is_right(ending, problem.answer)
    assert not trace_is_right(ending, problem)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": -1}, "count must be at least 0, got -1; use 0 for none"),
        ({"seed": -3}, "seed must be at least 0, got -3; use 3"),
        ({"split": "test"}, "split must be 'train' or 'heldout', got 'test'; use 'heldout'"),
        ({"num_constants": 1}, "num_constants must be at least 2, got 1; use 2 or more"),
        (
            {"num_statements": 0},
            "num_statements must be from 1 to 56 (each statement and each of 4 constants",
        ),
        ({"num_statements": 57}, "got 57; use 56 or fewer statements, or fewer constants"),
        ({"modulus": 1}, "modulus must be from 2 to 10 (values are single digits), got 1; use 10"),
        ({"modulus": 11}, "got 11; use 10"),
        ({"num_names": 16}, "num_names must be from num_statements + num_constants (17) to 60, got 16; use 17 or more"),
        ({"min_distance": 0}, "min_distance must be at least 1, got 0; use 1"),
        (
            {"min_distance": 3, "max_distance": 2},
            "max_distance must be at least min_distance (3), got 2; use None for no bound",
        ),
        (
            {"min_distance": 7},
            "num_constants must make 7 different pairs, for the statements before min_distance "
            "(7), got 4; use more constants or a smaller min_distance",
        ),
    ],
)
def test_a_bad_parameter_names_itself_its_rule_its_value_and_a_remedy(arguments: dict[str, Any], message: str) -> None:
    permitted: dict[str, Any] = {"count": 1, "seed": 0, "split": "train"} | arguments
    count = permitted.pop("count")
    with pytest.raises(ValueError, match=re.escape(message)):
        generate_problems(count, **permitted)


@given(index=st.integers(0, 10_000), num_statements=st.integers(1, 56))
@settings(max_examples=25)
def test_the_tokenizer_gives_one_id_per_token_after_bos_and_decodes_to_the_text(
    index: int, num_statements: int
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_dir())
    (problem,) = generate_problems(1, seed=index, split="train", num_statements=num_statements)
    ids = {token: place for place, token in enumerate(vocabulary())}
    text = f"{problem.problem} {problem.trace}"
    encoded = tokenizer(text)["input_ids"]
    assert encoded == [ids["<bos>"], *(ids[token] for token in text.split())]
    assert tokenizer.decode(encoded[1:]) == text
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<bos>",
        "<eos>",
        "<pad>",
    )


def test_an_unknown_word_raises_instead_of_becoming_a_token() -> None:
    with pytest.raises(Exception, match="Missing"):
        AutoTokenizer.from_pretrained(embedded_model_dir())("A3 hello")


def test_the_embedded_model_fits_in_four_megabytes() -> None:
    files = [path for path in embedded_model_dir().rglob("*") if path.is_file()]
    assert {"config.json", "model.safetensors", "tokenizer.json", "training.json"} <= {path.name for path in files}
    assert sum(path.stat().st_size for path in files) <= 4 * 2**20


def test_the_embedded_model_solves_heldout_problems_of_thirteen_statements() -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_dir())
    model = AutoModelForCausalLM.from_pretrained(embedded_model_dir())
    problems = generate_problems(64, seed=11, split="heldout", num_statements=13)
    prompts = tokenizer([problem.problem for problem in problems], return_tensors="pt")
    with torch.no_grad():
        output = model.generate(**prompts, do_sample=False, max_new_tokens=140)
    completions = tokenizer.batch_decode(output[:, prompts["input_ids"].shape[1] :])
    answers = [answer_is_right(text, p.answer) for text, p in zip(completions, problems, strict=True)]
    traces = [trace_is_right(text, p) for text, p in zip(completions, problems, strict=True)]
    assert sum(answers) / 64 >= 0.98
    assert sum(traces) / 64 >= 0.98
