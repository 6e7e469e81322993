"""The cost of an arm: parts sum to the whole, memory is exact where it is counted, arms differ where they should."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch

from pte.compare import arm_config
from pte.config import ExperimentConfig
from pte.evidence.cost import (
    breakdown,
    clocked_step,
    counted_costs,
    measure_cost,
    memory_over_tokens,
    speeds_of_a_step,
)
from pte.evidence.memory_process import config_of
from pte.evidence.step import CostStep
from pte.plan.process_memory import probe_available
from pte.timing import SPANS, StepClock
from short_runs import short_config

pytestmark = pytest.mark.system

TOKENS, SEQUENCES, RANK = 24, 4, 4
# Three layers of 2 x 2 heads of 32 numbers, float32.
TOKEN_BYTES = 3 * 2 * 64 * 4
needs_probe = pytest.mark.skipif(not probe_available(), reason="no /proc/self/clear_refs or no glibc")


def tiny_config(arm: str, **changes: object) -> ExperimentConfig:
    settings = {
        "cache__window_tokens": 8,
        "rollout__max_new_tokens": TOKENS,
        "train__prompts_per_step": 1,
        **changes,
    }
    return arm_config(short_config(**settings), arm)


def test_the_parts_of_a_step_are_exclusive_and_sum_to_it() -> None:
    step = CostStep(tiny_config("pte"))
    clock = clocked_step(step, TOKENS, 0)
    parts = breakdown(clock, path="eager")
    assert all(nanoseconds >= 0 for nanoseconds in clock.nanoseconds.values())
    assert sum(clock.nanoseconds.values()) == clock.total_nanoseconds
    names = [f"{name}_seconds" for name in (*SPANS, "other")]
    assert sum(round(parts[name] * 1e9) for name in names) == clock.total_nanoseconds
    assert all(parts[name] > 0 for name in names)
    # The state's work happens in both halves of a step.
    assert {("decode", "fold"), ("decode", "read"), ("backward", "fold"), ("backward", "read")} <= set(
        clock.nanoseconds
    )


def test_plain_lora_spends_no_time_on_a_state() -> None:
    parts = breakdown(clocked_step(CostStep(tiny_config("lora_full")), TOKENS, 0), path="eager")
    assert parts["fold_seconds"] == parts["read_seconds"] == parts["state_fraction"] == 0
    assert parts["decode_seconds"] > 0 and parts["backward_seconds"] > 0


@pytest.mark.parametrize(
    ("path", "seen"),
    [
        ("eager", True),
        ("eager (the fused decode step does not observe attention)", True),
        ("eager, CUDA graph (the fused decode step computes silu)", False),
        ("fused kernels", False),
        ("fused kernels, CUDA graph", False),
    ],
)
def test_a_rollout_s_share_of_the_state_is_told_only_where_the_clock_sees_its_readings(path: str, seen: bool) -> None:
    # 3 ns of fold and 1 ns of read in 8 ns of a rollout; an update of 8 ns folds for 2.
    spans = {("decode",): 4, ("decode", "fold"): 3, ("decode", "read"): 1, ("backward",): 6, ("backward", "fold"): 2}
    clock = StepClock()
    clock.nanoseconds.update(spans)
    parts = breakdown(clock, path=path)
    assert parts.get("rollout_state_fraction") == (0.5 if seen else None)
    assert (parts["update_state_fraction"], parts["state_fraction"]) == (0.25, 6 / 16)


@needs_probe
def test_the_base_reports_its_rollout_and_no_update() -> None:
    costs = measure_cost(tiny_config("base_window"), repeats=1)
    assert costs.keys() == {
        *(f"{name}_seconds" for name in (*SPANS, "other", "step")),
        *("rollout_tokens_per_second", "rollout_flops_per_token", "state_fraction", "rollout_state_fraction"),
        *("cache_bytes", "state_bytes", "peak_memory_bytes"),
    }
    assert costs["forward_seconds"] == costs["backward_seconds"] == costs["optimizer_seconds"] == 0
    assert costs["state_bytes"] == costs["state_fraction"] == 0 < costs["peak_memory_bytes"]


def test_an_arm_that_learns_reports_its_update_as_well() -> None:
    step = CostStep(tiny_config("pte"))
    flops, speeds = counted_costs(step, TOKENS), speeds_of_a_step(step, TOKENS, 0)
    base = counted_costs(CostStep(tiny_config("base_window")), TOKENS)
    assert base["rollout_flops_per_token"] < flops["rollout_flops_per_token"] < flops["update_flops_per_token"]
    assert speeds.keys() == {"rollout_tokens_per_second", "update_tokens_per_second"}


def test_a_step_s_completions_have_one_length_and_all_of_them_a_gradient() -> None:
    step = CostStep(tiny_config("pte", train__prompts_per_step=2))
    scored = step.score(step.sample(TOKENS, 0), 0)
    assert [len(one.rollout.completion_ids) for one in scored] == [TOKENS] * 8
    assert {one.rollout.finish_reason for one in scored} == {"length"}
    assert [one.advantage for one in scored] == [1.0, -1.0] * 4


def test_cache_bytes_rise_under_the_full_cache_and_are_flat_under_the_window() -> None:
    def held(arm: str) -> list[tuple[int, int]]:
        step = CostStep(tiny_config(arm))
        return [(step.sample(tokens, 0), step.cache_bytes, step.state_bytes)[1:] for tokens in (16, 32, 48)]

    prompt = len(CostStep(tiny_config("pte")).session.task.longest_prompt())
    # The last token never enters the cache.
    assert held("lora_full") == [(SEQUENCES * (prompt + tokens - 1) * TOKEN_BYTES, 0) for tokens in (16, 32, 48)]
    assert held("lora_window") == [(SEQUENCES * (prompt + 8) * TOKEN_BYTES, 0)] * 3
    assert held("pte") == [(SEQUENCES * (prompt + 8) * TOKEN_BYTES, SEQUENCES * 3 * RANK**2 * 4)] * 3


@needs_probe
def test_a_fresh_process_reads_cache_state_and_both_peaks() -> None:
    step = CostStep(tiny_config("pte"))
    step.sample(TOKENS, 0)
    (reading,) = memory_over_tokens(tiny_config("pte"), [TOKENS])
    peaks = {name: reading.pop(name) for name in ("rollout_peak_bytes", "update_peak_bytes")}
    assert reading == {"tokens": TOKENS, "cache_bytes": step.cache_bytes, "state_bytes": step.state_bytes}
    assert all(peak > 0 for peak in peaks.values())


def test_a_configuration_survives_the_way_to_a_process() -> None:
    config = tiny_config("pte", adapter__targets=("q_proj", "v_proj"), train__max_logprob_gap=0.5)
    assert config_of(json.loads(json.dumps(asdict(config)))) == config


def test_refusals_say_what_to_give() -> None:
    config = tiny_config("pte")
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0; use for example 3"):
        measure_cost(config, repeats=0)
    with pytest.raises(ValueError, match="lengths must be at least 1, got 0; use for example 64, 128, 256"):
        memory_over_tokens(config, [64, 0])
    beyond = replace(config, rollout=replace(config.rollout, max_new_tokens=4096))
    with pytest.raises(ValueError, match="trained positions"), torch.no_grad():
        CostStep(beyond).sample(4096, 0)
