"""Claims about the registry: what every family keeps to, and how several become one task."""

from __future__ import annotations

from dataclasses import fields
from typing import get_args

import pytest

from pte.config import GeneratedKind, TaskConfig
from pte.session import check_no_idle_fields
from pte.tasks.base_training import build_tokenizer
from pte.tasks.families import FAMILIES, joint_vocabulary
from pte.tasks.generated import COMMON_TOKENS, Family, split_of
from pte.tasks.task import Task, generated_task, mixed_seed

every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)


def mixture(**changes: object) -> Task:
    families = {name: FAMILIES[name] for name in ("recall", "chained")}
    tokenizer = build_tokenizer(joint_vocabulary(list(families.values())), max_positions=2048)
    shapes = {"recall": {"num_facts": 4, "num_queries": 4}, "chained": {"num_statements": 2}}
    settings = {"shapes": shapes, "seed": 0, "eval_problems": 3}
    return generated_task(tokenizer, families, **{**settings, **changes})


@every_family
def test_the_traces_of_a_family_are_right_and_empty_completions_wrong(family: Family) -> None:
    problems = family.generate(8, seed=1, split="heldout")
    answers = [problem.answer for problem in problems]
    assert family.accuracy(completions=[problem.trace for problem in problems], answer=answers) == [1.0] * 8
    assert family.accuracy(completions=[""] * 8, answer=answers) == [0.0] * 8


@every_family
def test_a_family_writes_words_of_its_vocabulary_only_and_ends_the_traces_of_its_default_shape(family: Family) -> None:
    vocabulary = family.vocabulary()
    assert tuple(vocabulary[: len(COMMON_TOKENS)]) == COMMON_TOKENS
    assert len(set(vocabulary)) == len(vocabulary)
    for problem in family.generate(8, seed=1, split="train"):
        assert set(problem.problem.split()) | set(problem.trace.split()) <= set(vocabulary)
        assert problem.trace.endswith(" <eos>") and problem.trace.count("<eos>") == 1


@every_family
def test_held_out_problems_of_a_family_never_occur_in_training(family: Family) -> None:
    for split in ("train", "heldout"):
        problems = family.generate(40, seed=2, split=split)
        assert {split_of(problem.problem) for problem in problems} == {split}
        assert {problem.source for problem in problems} == {f"{family.name}/{split}"}
        assert problems == family.generate(40, seed=2, split=split)


@every_family
@pytest.mark.parametrize(
    ("draw", "message"),
    [
        ({"count": -1, "seed": 0, "split": "train"}, "count must be at least 0, got -1; use 0 for none"),
        ({"count": 1, "seed": -2, "split": "train"}, "seed must be at least 0, got -2; use 2"),
        ({"count": 1, "seed": 0, "split": "test"}, "split must be 'train' or 'heldout', got 'test'; use 'heldout'"),
    ],
)
def test_every_family_refuses_a_draw_by_name(family: Family, draw: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        family.generate(**draw)


@every_family
def test_the_parameters_of_a_shape_are_fields_of_the_configuration_with_the_same_defaults(family: Family) -> None:
    defaults = {field.name: field.default for field in fields(TaskConfig)}
    at_default = family.generate(2, seed=0, split="train", **{name: defaults[name] for name in family.shape_fields})
    assert at_default == family.generate(2, seed=0, split="train")


def test_the_configuration_names_every_family_of_the_registry() -> None:
    assert get_args(GeneratedKind) == tuple(FAMILIES)
    assert TaskConfig(kind="mixture", mixture=("recall", "chained")).families == ("recall", "chained")
    assert TaskConfig(kind="recall").families == ("recall",)
    assert TaskConfig(kind="jsonl", train_path="p.jsonl").families == ()


@pytest.mark.parametrize(
    ("task", "name", "kind"),
    [
        (TaskConfig(num_facts=4), "num_facts", "recall"),
        (TaskConfig(kind="recall", num_statements=4), "num_statements", "chained"),
        (TaskConfig(kind="recall", boxed_instruction=False), "boxed_instruction", "jsonl"),
        (TaskConfig(mixture=("chained", "recall")), "mixture", "mixture"),
        (TaskConfig(kind="jsonl", train_path="p.jsonl", max_age=4), "max_age", "recall"),
    ],
)
def test_a_field_of_another_kind_is_refused_with_the_kind_that_reads_it(task: TaskConfig, name: str, kind: str) -> None:
    said = rf"task.{name} must be left out with task.kind '{task.kind}', .* set task.kind to '{kind}', or drop it"
    with pytest.raises(ValueError, match=said):
        check_no_idle_fields(task)


def test_a_mixture_may_set_the_fields_of_all_its_kinds() -> None:
    check_no_idle_fields(TaskConfig(kind="mixture", mixture=("chained", "recall"), num_statements=2, num_facts=4))


def test_the_families_of_a_mixture_take_turns_in_training_and_are_evaluated_apart() -> None:
    task = mixture()
    sources = [task.training(position).problem.source for position in range(4)]
    assert sources == ["recall/train", "chained/train"] * 2
    second_of_recall = FAMILIES["recall"].generate(2, seed=mixed_seed(0, 0), split="train", num_facts=4, num_queries=4)[
        1
    ]
    assert task.training(2).trace == second_of_recall.trace, "no problem of a family is left out"
    assert {name: len(problems) for name, problems in task.evaluation.items()} == {"recall": 3, "chained": 3}
    alone = FAMILIES["recall"].generate(3, seed=0, split="heldout", num_facts=4, num_queries=4)
    assert [one.id for one in task.evaluation["recall"]] == [one.id for one in alone]
    longest = max(len(task.prompt_ids(task.training(position).problem)) for position in range(128))
    assert len(task.longest_prompt()) == longest


def test_the_training_problems_of_a_mixture_depend_on_the_position_alone() -> None:
    forwards, backwards = mixture(), mixture()
    positions = [0, 1, 511, 512, 513, 1500]
    there = [forwards.training(position).problem.id for position in positions]
    back = [backwards.training(position).problem.id for position in reversed(positions)]
    assert there == back[::-1] and len(set(there)) == len(positions)


def test_each_completion_of_a_mixture_is_scored_by_its_own_family() -> None:
    task = mixture()
    drawn = [task.training(position) for position in range(4)]
    traces = [one.trace for one in drawn]
    wrong = [*traces[2:], *traces[:2]]
    columns = task.columns([one.problem for one in drawn])
    assert task.accuracy(completions=traces, **columns) == [1.0] * 4
    assert task.accuracy(completions=wrong, **columns)[::2] == [0.0, 0.0]
    assert task.accuracy(completions=traces[:1] + wrong[1:2], **{k: v[:2] for k, v in columns.items()})[0] == 1.0


def test_a_joint_vocabulary_has_each_token_once_and_one_family_keeps_its_ids() -> None:
    families = list(FAMILIES.values())
    joint = joint_vocabulary(families)
    assert len(set(joint)) == len(joint) and set(joint) == {word for one in families for word in one.vocabulary()}
    assert all(joint_vocabulary([family]) == family.vocabulary() for family in families)
