"""Claims about bases that are made here: the same weights again, how they are measured, what a whole base is."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from shlex import split as words

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from pte.cli import main
from pte.tasks import bases
from pte.tasks.base_training import (
    BaseSettings,
    BaseSize,
    BaseStep,
    build_tokenizer,
    encode_batch,
    is_complete,
    measure_base,
    train_base,
)
from pte.tasks.bases import RECIPES, BaseRecipe, make_base
from pte.tasks.chained import embedded_model_dir
from pte.tasks.families import FAMILIES, joint_vocabulary
from pte.tasks.generated import GeneratedProblem

pytestmark = pytest.mark.system

BOTH = [FAMILIES["recall"], FAMILIES["chained"]]
TINY = BaseSettings(
    steps=3,
    warmup_steps=1,
    size=BaseSize(hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2, num_kv_heads=1, max_positions=512),
)


def draw_in_turn(rng: random.Random, done: float) -> Sequence[GeneratedProblem]:
    """Recall first, then chained."""
    seed = rng.getrandbits(30)
    if done < 0.5:
        return BOTH[0].generate(2, seed=seed, split="train", num_facts=4, num_queries=2)
    return BOTH[1].generate(2, seed=seed, split="train", num_statements=2)


def make_tiny(folder: Path, settings: BaseSettings = TINY) -> list[BaseStep]:
    steps: list[BaseStep] = []
    vocabulary = joint_vocabulary(BOTH)
    train_base(folder, vocabulary=vocabulary, draw_batch=draw_in_turn, settings=settings, on_step=steps.append)
    return steps


def test_the_same_settings_give_the_same_weights_and_another_seed_others(tmp_path: Path) -> None:
    steps = make_tiny(tmp_path / "one")
    torch.rand(3)
    make_tiny(tmp_path / "two")
    make_tiny(tmp_path / "other", replace(TINY, seed=1))
    one, two, other = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two", "other"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["model.embed_tokens.weight"], other["model.embed_tokens.weight"])
    assert [str(step).split()[1] for step in steps] == ["1/3", "2/3", "3/3"]


def test_training_lowers_the_loss_of_the_reasoning_tokens(tmp_path: Path) -> None:
    problems = draw_in_turn(random.Random(0), 0.0)
    steps: list[BaseStep] = []
    train_base(
        tmp_path,
        vocabulary=joint_vocabulary(BOTH),
        draw_batch=lambda rng, done: problems,
        settings=replace(TINY, steps=100, peak_lr=2e-2),
        on_step=steps.append,
    )
    assert steps[-1].loss < steps[0].loss / 2, "the same two traces at every step"


def test_the_saved_tokenizer_has_a_token_for_each_word_of_the_vocabulary_and_refuses_others(tmp_path: Path) -> None:
    make_tiny(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    vocabulary = joint_vocabulary(BOTH)
    assert tokenizer.encode(" ".join(vocabulary), add_special_tokens=False) == list(range(len(vocabulary)))
    with pytest.raises(Exception, match="UNK"):
        tokenizer.encode("hello")


def test_the_shipped_tokenizer_is_the_one_that_is_built_for_chained_assignments(tmp_path: Path) -> None:
    build_tokenizer(FAMILIES["chained"].vocabulary(), max_positions=2048).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / name).read_text()) == json.loads((embedded_model_dir() / name).read_text())


def test_a_batch_is_prompts_with_their_traces_and_knows_where_reasoning_begins() -> None:
    tokenizer = build_tokenizer(joint_vocabulary(BOTH), max_positions=512)
    problems = BOTH[0].generate(3, seed=0, split="train", num_facts=4, num_queries=2)
    token_ids, prompt_tokens = encode_batch(problems, tokenizer)
    assert tokenizer.decode(token_ids[1, :prompt_tokens]) == f"<bos> {problems[1].problem}"
    assert tokenizer.decode(token_ids[1, prompt_tokens:]) == problems[1].trace


def test_problems_of_different_lengths_in_one_step_are_refused() -> None:
    tokenizer = build_tokenizer(joint_vocabulary(BOTH), max_positions=512)
    mixed = [*draw_in_turn(random.Random(0), 0.0), *draw_in_turn(random.Random(0), 1.0)]
    with pytest.raises(
        ValueError, match=r"problems of a training step must be of one length, got prompts of \[6, 15\]"
    ):
        encode_batch(mixed, tokenizer)


def test_a_base_that_solves_its_task_measures_as_right_and_an_untrained_one_as_wrong(tmp_path: Path) -> None:
    shape = {"num_statements": 4}
    solved = measure_base(embedded_model_dir(), FAMILIES["chained"], shape=shape, count=8)
    assert (solved.right_fraction, solved.temperature, solved.completion_tokens) == (1.0, 0.0, 44)
    make_tiny(tmp_path)
    drawn = measure_base(tmp_path, FAMILIES["recall"], shape={"num_facts": 4, "num_queries": 2}, count=8)
    assert (drawn.right_fraction, drawn.temperature, drawn.completion_tokens) == (0.0, 0.5, 9)


def test_a_base_is_whole_once_it_has_been_measured_and_is_then_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = {"num_facts": 4, "num_queries": 2}
    recipe = BaseRecipe(("recall", "chained"), draw_in_turn, TINY, measured=(("recall", shape),))
    monkeypatch.setitem(RECIPES, "tiny", recipe)
    monkeypatch.setattr(bases, "MEASURED_PROBLEMS", 4)
    make_tiny(tmp_path)
    assert not is_complete(tmp_path, TINY), "weights alone"
    steps: list[BaseStep] = []
    make_base("tiny", tmp_path, on_step=steps.append)
    assert [step.step for step in steps] == [1, 2, 3]
    assert is_complete(tmp_path, TINY) and not is_complete(tmp_path, replace(TINY, seed=1))
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["base"] == "tiny" and record["settings"]["size"]["hidden_size"] == 16
    (row,) = record["accuracy"]
    assert (row["family"], row["shape"], row["problems"], row["right_fraction"]) == ("recall", shape, 4, 0.0)
    make_base("tiny", tmp_path, on_step=steps.append)
    assert len(steps) == 3, "nothing was trained"


def test_an_unknown_base_is_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"base must be one of .*'recall'.*, got 'recal'; use one of these"):
        make_base("recal", tmp_path, on_step=print)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_draws_training_problems_of_its_families_of_one_length_at_any_time(name: str) -> None:
    recipe, rng = RECIPES[name], random.Random(0)
    tokenizer = build_tokenizer(joint_vocabulary([FAMILIES[one] for one in recipe.families]), max_positions=8192)
    for done in [step / 12 for step in range(12)]:
        problems = recipe.draw_batch(rng, done)
        assert {problem.source for problem in problems} <= {f"{family}/train" for family in recipe.families}
        token_ids, _ = encode_batch(problems, tokenizer)
        assert token_ids.shape[1] <= recipe.settings.size.max_positions
    assert {family for family, _ in recipe.measured} == set(recipe.families)


def test_the_commands_run_on_recall_and_on_a_mixture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_tiny(tmp_path / "base")
    flags = words(f"--model.path {tmp_path / 'base'} --cache.window-tokens 8 --cache.evict-tokens 4 --adapter.rank 2")
    flags += words("--rollout.max-new-tokens 30 --eval.max-new-tokens 30 --eval.temperature 1 --eval.problems 2")
    mixture = words("--task.kind mixture --task.mixture recall chained --task.num-facts 4 --task.num-queries 2")
    mixture += words("--task.num-statements 2")
    steps = words("--distill.steps 1 --distill.batch-size 2 --train.steps 1 --train.prompts-per-step 2")
    steps += ["--train.group-size", "2", "--run.output-dir", str(tmp_path / "runs")]
    assert main(["train", *flags, *mixture, *steps]) == 0
    summary = json.loads((tmp_path / "runs" / "run" / "summary.json").read_text())
    assert {name: one["problems"] for name, one in summary["evaluations"].items()} == {"recall": 2, "chained": 2}
    recall = words("--task.kind recall --task.num-facts 4 --task.num-queries 2 --task.max-age 2")
    assert main(["eval", *flags, *recall, "--output", str(tmp_path / "scores.json")]) == 0
    assert json.loads((tmp_path / "scores.json").read_text())["recall"]["accuracy"] == 0.0
    assert main(["generate", *flags, *recall, "--prompt", "key1 ..."]) == 0
