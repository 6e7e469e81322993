"""What an evidence run measures: every question at every seed, equal budgets, nothing twice, nothing too early."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable
from dataclasses import fields, replace
from itertools import groupby
from pathlib import Path

import pytest

from pte.arms import ARMS, arm_config
from pte.config import ExperimentConfig, ModelConfig
from pte.evidence.levels import levels_of
from pte.evidence.measurements import part_file
from pte.evidence.parts import BasePart, CostPart, ScoredPart, TrainedPart, fingerprint_of
from pte.evidence.plan import (
    CAPACITY_FACTS,
    CONTROLS,
    MAIN_ARMS,
    MEMORY_TOKENS,
    OTHER_ARMS,
    PRESETS,
    Part,
    plan,
)
from pte.evidence.readings import Reading
from pte.model.load import check_positions
from pte.session import open_session
from pte.tasks.bases import RECIPES

DIRECTORY = Path("runs/evidence")
PLANS = {preset: plan(preset, DIRECTORY) for preset in PRESETS}
FULL = PLANS["full"]
TRAINED = [part for part in FULL if isinstance(part, TrainedPart)]


def readings_of(parts: list[Part]) -> list[Reading]:
    found: list[Reading] = []
    for part in parts:
        if isinstance(part, TrainedPart):
            found += [*part.between, *part.readings]
        elif isinstance(part, ScoredPart):
            found += part.readings
    return found


@pytest.mark.parametrize("preset", PRESETS)
def test_every_part_has_a_name_of_its_own_that_is_a_file_name_anywhere(preset: str) -> None:
    names = [part.name for part in PLANS[preset]]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z][\w-]*", name, re.ASCII) for name in names)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_part_comes_after_the_base_that_it_waits_for_and_every_base_has_a_recipe(preset: str) -> None:
    seen: dict[str, Part] = {}
    for part in PLANS[preset]:
        if part.after is not None:
            assert isinstance(seen[part.after], BasePart)
        seen[part.name] = part
    assert {part.base for part in PLANS[preset] if isinstance(part, BasePart)} <= set(RECIPES)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_part_runs_on_the_base_that_it_waits_for_in_everything_it_does(preset: str) -> None:
    for part in PLANS[preset]:
        made = "embedded" if part.after is None else str(DIRECTORY / "bases" / part.after.removeprefix("base-"))
        configs = [one.config for one in readings_of([part])]
        configs += [part.config] if isinstance(part, (TrainedPart, CostPart)) else []
        assert {config.model.path for config in configs} <= {made}


@pytest.mark.parametrize("preset", PRESETS)
def test_no_number_is_measured_twice(preset: str) -> None:
    names = ("question", "task", "arm", "stage", "seed")
    keys = [
        (one.kind, *(getattr(one.label, name) for name in names), *one.label.setting.items())
        for one in readings_of(PLANS[preset])
    ]
    assert len(set(keys)) == len(keys)


def budget(config: ExperimentConfig) -> dict[str, Hashable]:
    """Everything that arms of a comparison must share, by name: all but what an arm is."""
    found = {
        f"{section.name}.{field.name}": getattr(getattr(config, section.name), field.name)
        for section in fields(config)
        for field in fields(getattr(config, section.name))
    }
    changes = ("adapter.kind", "adapter.update_rule", "cache.policy", "cache.window_tokens", "cache.evict_tokens")
    return {name: value for name, value in found.items() if name not in (*changes, "eval.state_control")}


def of_the_arm(part: TrainedPart) -> ExperimentConfig:
    """The experiment that a part runs; bytes of a token are read from the shipped base, as no other is there."""
    return arm_config(replace(part.config, model=ModelConfig()), part.arm)


def comparison(part: TrainedPart) -> str:
    """The name of a part without its arm: parts of one comparison share it."""
    return part.name.replace(f"-{part.arm}", "")


def test_all_arms_of_a_comparison_have_equal_budgets() -> None:
    compared = 0
    for preset in PRESETS:
        parts = sorted((part for part in PLANS[preset] if isinstance(part, TrainedPart)), key=comparison)
        for name, group in groupby(parts, key=comparison):
            arms = list(group)
            first = budget(of_the_arm(arms[0]))
            for part in arms[1:]:
                assert budget(of_the_arm(part)) == first, name
                assert part.config.model == arms[0].config.model
                assert {one.kind for one in part.readings} - {"state_size", "age"} == {
                    one.kind for one in arms[0].readings
                } - {"state_size", "age"}
            compared += len(arms) - 1
    assert compared > 100, "names say which parts are compared"


def test_a_policy_is_scored_at_the_seed_that_it_was_trained_with() -> None:
    for part in TRAINED:
        about = [one.label for one in readings_of([part])]
        about += [label for label in (part.curve, part.cost) if label is not None]
        assert {label.seed for label in about} == {part.config.run.seed}
        assert {one.config.run.seed for one in readings_of([part])} == {part.config.run.seed}
        assert part.name.endswith(f"seed{part.config.run.seed}")
        assert {label.arm for label in about} - set(CONTROLS) == {part.arm}


def labels(question: str) -> list[Reading]:
    return [one for one in readings_of(FULL) if one.label.question == question]


def test_arms_and_rules_compete_at_three_seeds_and_every_question_is_asked() -> None:
    for question in ("arms", "stages", "forgetting", "rules"):
        seeds = {one.label.seed for one in labels(question) if one.label.stage != "none"}
        assert seeds == {0, 1, 2}, question
    for question in ("capacity", "length", "ablation", "transfer"):
        assert {one.label.seed for one in labels(question)} == {0}, question
    assert {part.curve.seed for part in TRAINED if part.curve is not None} == {0, 1, 2}
    costs = [part for part in FULL if isinstance(part, CostPart) and part.label.question == "cost"]
    assert costs and all(part.lengths == MEMORY_TOKENS for part in costs)
    bases = {part.base for part in FULL if isinstance(part, BasePart)}
    assert bases == {"recall", "permutation", "multiplication", "puzzles"}


def test_the_arms_of_the_issue_are_compared_on_all_four_tasks_and_on_three_lengths_of_the_first() -> None:
    arms = {"base_full", "base_window", *MAIN_ARMS, *OTHER_ARMS, *CONTROLS}
    assert arms == set(ARMS) - {"pte"}, "pte is whatever the experiment says"
    found = {(one.label.task, one.label.setting["windows"]) for one in labels("arms")}
    assert {task for task, _ in found} == {"chained", "recall", "permutation", "multiplication"}
    assert {windows for task, windows in found if task == "chained"} == {4, 8, 16}
    for task, windows in found:
        here = [
            one.label for one in labels("arms") if (one.label.task, one.label.setting["windows"]) == (task, windows)
        ]
        assert {label.arm for label in here} == arms


def test_stages_are_learned_separately_warm_start_alone_grpo_alone_and_both() -> None:
    assert {one.label.stage for one in labels("stages")} == {"warm_start", "grpo", "both"}
    for part in TRAINED:
        if part.curve is None:
            continue
        warm, grpo = part.config.distill.steps, part.config.train.steps
        assert grpo > 0 and (warm > 0) == (part.curve.stage == "both") == bool(part.between)


def test_capacity_has_every_number_of_facts_at_every_rank() -> None:
    settings = [
        (one.label.arm, one.label.setting["facts"], one.label.setting.get("rank")) for one in labels("capacity")
    ]
    for facts in CAPACITY_FACTS:
        assert {("pte_delta", facts, rank) for rank in (8, 32, 64)} <= set(settings)
    assert (min(CAPACITY_FACTS), max(CAPACITY_FACTS)) == (4, 128)
    bases = [one for one in labels("capacity") if one.label.arm == "base_full"]
    assert [one.config.task.num_facts for one in bases] == list(CAPACITY_FACTS)
    for one in labels("capacity"):
        if one in bases:
            continue
        assert (one.config.task.num_facts, one.config.adapter.rank) == (
            one.label.setting["facts"],
            one.label.setting["rank"],
        )


def test_generation_goes_from_the_training_length_to_64_windows_beyond_it() -> None:
    trained = levels_of(DIRECTORY)["recall-length"].windows
    lengths = {one.label.setting["windows"] for one in labels("length")}
    assert lengths == {trained + beyond for beyond in (0, 4, 16, 32, 64)}
    for one in labels("length"):
        tokens = one.config.task.num_facts + 2 * one.config.task.num_queries
        assert tokens / 8 == one.label.setting["windows"]
        assert one.label.setting["trained_windows"] == trained
    assert {one.label.arm for one in labels("length")} >= {"lora_full", "lora_window", "pte_delta"}


def test_ages_of_eviction_reach_64() -> None:
    for one in labels("forgetting"):
        # A fact and its share of the queries take two tokens, a block; the window keeps four blocks.
        most = (one.config.task.max_age or 0) - 4
        assert most >= 64 and one.kind == "age"


def test_an_ablation_differs_from_its_reference_in_one_factor() -> None:
    parts = [part for part in TRAINED if part.name.startswith("ablation") and part.config.run.seed == 0]
    (reference,) = [part.config for part in parts if "reference" in part.name]
    changed = {}
    for part in parts:
        differ = {
            f"{section.name}.{field.name}"
            for section in fields(reference)
            for field in fields(getattr(reference, section.name))
            if getattr(getattr(part.config, section.name), field.name)
            != getattr(getattr(reference, section.name), field.name)
        }
        changed.setdefault(str(part.readings[0].label.setting["factor"]), set()).update(differ)
    assert changed == {
        "reference": set(),
        "global_tokens": {"adapter.global_tokens"},
        "rank": {"adapter.rank"},
        "adapted maps": {"adapter.targets"},
        "adapted layers": {"adapter.layers"},
        "keys": {"adapter.key_space"},
        "start of B": {"adapter.down_start"},
        "gradient_mode": {"distill.gradient_mode", "distill.horizon"},
        "evicted of 20 tokens": {"cache.window_tokens", "cache.evict_tokens"},
    }


def test_quick_is_the_first_two_tasks_with_the_main_arms_and_one_seed() -> None:
    labels = [one.label for one in readings_of(PLANS["quick"])]
    assert {(label.task, label.seed) for label in labels} == {("chained", 0), ("recall", 0)}
    for task in ("chained", "recall"):
        arms = {label.arm for label in labels if label.task == task}
        assert arms == {"base_full", "base_window", *MAIN_ARMS, *CONTROLS}
    assert not [part for part in PLANS["quick"] if isinstance(part, TrainedPart) and part.config.train.steps]


def test_the_longest_completions_on_the_shipped_base_fit_its_trained_positions() -> None:
    level = levels_of(DIRECTORY)["chained-8w"]
    session = open_session(replace(level.config, eval=replace(level.config.eval, problems=1)))
    check_positions(
        session.policy.base.config,
        prompt_tokens=len(session.task.longest_prompt()),
        completion_tokens=max(MEMORY_TOKENS),
        allow_beyond_trained_positions=False,
    )


def test_every_published_part_is_still_what_its_fingerprint_says() -> None:
    published = Path(__file__).parents[2] / "benchmarks" / "evidence"
    for part in plan("full", published):
        kept = json.loads(part_file(published, part.name).read_text(encoding="utf-8"))
        assert kept["fingerprint"] == fingerprint_of(part, published), part.name
