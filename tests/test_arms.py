"""The arms: each changes what it is named after and nothing else, at equal bytes, and each can be scored."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pte.arms import ARMS, Arm, arm_cache, arm_config, state_tokens
from pte.config import AdapterConfig, CacheConfig
from pte.rollout.record import Rollout
from pte.rollout.walk import expanded_first_state
from pte.session import open_session
from pte.tasks.evaluate import Evaluation, evaluate_session
from short_runs import short_config

pytestmark = pytest.mark.system

CONFIG = short_config(eval__problems=2)
LARGER = {name for name, arm in ARMS.items() if arm.cache == "larger"}


@pytest.mark.parametrize("name", ARMS)
def test_an_arm_changes_kind_rule_cache_and_control_alone(name: str) -> None:
    changed = arm_config(CONFIG, name)
    assert {one.name for one in fields(CONFIG) if getattr(CONFIG, one.name) != getattr(changed, one.name)} <= {
        "adapter",
        "cache",
        "eval",
    }
    own = replace(changed.adapter, kind=CONFIG.adapter.kind, update_rule=CONFIG.adapter.update_rule)
    assert own == CONFIG.adapter
    assert replace(changed.eval, state_control=CONFIG.eval.state_control) == CONFIG.eval
    shape = {"policy": CONFIG.cache.policy}
    if name in LARGER:
        shape |= {"window_tokens": CONFIG.cache.window_tokens, "evict_tokens": CONFIG.cache.evict_tokens}
    assert replace(changed.cache, **shape) == CONFIG.cache


def test_the_arm_pte_is_the_experiment_itself_and_controls_change_its_state_alone() -> None:
    assert arm_config(CONFIG, "pte") == CONFIG
    for control in ("zeroed", "shuffled"):
        scored = replace(CONFIG, eval=replace(CONFIG.eval, state_control=control))
        assert arm_config(CONFIG, f"pte_{control}") == scored
        assert ARMS[f"pte_{control}"] == Arm(state_control=control), "a control changes what is read, nothing else"


def test_the_arms_of_a_rule_have_it_whatever_the_experiment_has() -> None:
    for rule in ("paper", "read", "delta"):
        config = replace(CONFIG, adapter=replace(CONFIG.adapter, update_rule=rule))
        for asked in ("paper", "read", "delta"):
            assert arm_config(config, f"pte_{asked}").adapter.update_rule == asked
        assert arm_config(config, "pte").adapter.update_rule == rule


@given(
    rank=st.integers(1, 96),
    evict=st.integers(1, 40),
    blocks=st.integers(1, 12),
    dtype=st.sampled_from(("float32", "bfloat16")),
)
def test_an_enlarged_window_has_room_for_the_state_and_less_than_a_token_a_block_more(
    rank: int, evict: int, blocks: int, dtype: str
) -> None:
    config = replace(
        CONFIG,
        adapter=AdapterConfig(rank=rank),
        cache=CacheConfig(window_tokens=blocks * evict, evict_tokens=evict),
        model=replace(CONFIG.model, dtype=dtype),
    )
    cache = arm_cache(config, Arm(adapter="lora", cache="larger"))
    # Three layers of the embedded reasoner, each with two key heads of 32, keys and values.
    token_bytes = 3 * 2 * 32 * 2 * getattr(torch, dtype).itemsize
    state_bytes = 3 * rank**2 * 4
    more_bytes = (cache.window_tokens - blocks * evict) * token_bytes
    assert state_bytes <= more_bytes < state_bytes + blocks * token_bytes
    assert cache.window_tokens == blocks * cache.evict_tokens, "the same fraction leaves at once"
    assert state_tokens(config) == math.ceil(state_bytes / token_bytes)


@pytest.fixture(scope="module")
def scored() -> dict[str, tuple[Evaluation, list[Rollout]]]:
    """Every arm before any training on the embedded reasoner: two problems."""
    results = {}
    for name in ARMS:
        config = arm_config(CONFIG, name)
        evaluation, completions = evaluate_session(open_session(config), config, name="chained")
        results[name] = evaluation, [one.rollout for one in completions]
    return results


def test_every_arm_is_scored_and_before_training_it_is_the_base_under_the_same_cache(
    scored: dict[str, tuple[Evaluation, list[Rollout]]],
) -> None:
    for name, arm in ARMS.items():
        evaluation, rollouts = scored[name]
        assert (evaluation.evictions == 0) == (arm.cache == "full")
        if name in LARGER:
            continue
        base = "base_full" if arm.cache == "full" else "base_window"
        assert [one.completion_ids for one in rollouts] == [one.completion_ids for one in scored[base][1]]
    full, window = ([one.completion_ids for one in scored[base][1]] for base in ("base_full", "base_window"))
    assert full != window


def test_caches_of_arms_without_a_state_hold_at_least_the_bytes_of_cache_and_state_of_pte(
    scored: dict[str, tuple[Evaluation, list[Rollout]]],
) -> None:
    state = expanded_first_state(open_session(CONFIG).policy, CONFIG.eval.problems or 0)
    assert state is not None
    for name in LARGER:
        assert scored[name][0].peak_cache_bytes >= scored["pte"][0].peak_cache_bytes + state.nbytes
