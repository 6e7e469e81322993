"""The cost of an arm: parts sum to the whole, memory is exact where it is counted, arms differ where they should."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch

from pte.bench.memory import probe_available
from pte.compare import arm_config
from pte.config import ExperimentConfig
from pte.evidence.cost import breakdown, clocked_step, measure_cost, memory_over_tokens
from pte.evidence.memory_process import config_of, read_memory
from pte.evidence.step import CostStep
from pte.timing import SPANS
from short_runs import short_config

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
    parts = breakdown(clock)
    assert all(nanoseconds >= 0 for nanoseconds in clock.nanoseconds.values())
    assert sum(clock.nanoseconds.values()) == clock.total_nanoseconds
    names = [f"{name}_seconds" for name in (*SPANS, "other")]
    assert sum(round(parts[name] * 1e9) for name in names) == clock.total_nanoseconds
    assert all(parts[name] > 0 for name in names)
    # The state's work happens in both halves of a step.
    assert {("decode", "fold"), ("decode", "read"), ("forward", "fold"), ("backward", "read")} <= set(clock.nanoseconds)


def test_plain_lora_spends_no_time_on_a_state() -> None:
    parts = breakdown(clocked_step(CostStep(tiny_config("lora_full")), TOKENS, 0))
    assert parts["fold_seconds"] == parts["read_seconds"] == parts["state_fraction"] == 0
    assert parts["decode_seconds"] > 0 and parts["backward_seconds"] > 0


@needs_probe
def test_an_arm_reports_all_of_its_cost_and_the_base_has_no_update() -> None:
    pte, base = (measure_cost(tiny_config(arm), repeats=1) for arm in ("pte", "base_window"))
    assert all(value > 0 for value in pte.values())
    assert pte.keys() - base.keys() == {"update_tokens_per_second", "update_flops_per_token", "update_state_fraction"}
    assert base["forward_seconds"] == base["backward_seconds"] == base["optimizer_seconds"] == 0
    assert base["cache_bytes"] == pte["cache_bytes"]
    assert base["rollout_flops_per_token"] < pte["rollout_flops_per_token"] < pte["update_flops_per_token"]


def test_a_step_s_completions_have_one_length_and_all_of_them_a_gradient() -> None:
    step = CostStep(tiny_config("pte", train__prompts_per_step=2))
    scored = step.score(step.sample(TOKENS, 0), 0)
    assert [len(one.rollout.completion_ids) for one in scored] == [TOKENS] * 8
    assert {one.rollout.finish_reason for one in scored} == {"length"}
    assert [one.advantage for one in scored] == [1.0, -1.0] * 4


def test_cache_bytes_rise_under_the_full_cache_and_are_flat_under_the_window() -> None:
    lengths = (16, 40)
    readings = {
        arm: [read_memory(tiny_config(arm), tokens) for tokens in lengths]
        for arm in ("lora_full", "lora_window", "pte")
    }
    prompt = len(CostStep(tiny_config("pte")).session.task.longest_prompt())
    # The last token never enters the cache.
    rising = [SEQUENCES * (prompt + tokens - 1) * TOKEN_BYTES for tokens in lengths]
    flat = [SEQUENCES * (prompt + 8) * TOKEN_BYTES] * 2
    assert [reading["cache_bytes"] for reading in readings["lora_full"]] == rising
    for arm, state in (("lora_window", 0), ("pte", SEQUENCES * 3 * RANK**2 * 4)):
        assert [reading["cache_bytes"] for reading in readings[arm]] == flat
        assert [reading["state_bytes"] for reading in readings[arm]] == [state] * 2


@needs_probe
def test_a_fresh_process_reads_the_same_cache_and_both_peaks() -> None:
    (reading,) = memory_over_tokens(tiny_config("pte"), [TOKENS])
    here = read_memory(tiny_config("pte"), TOKENS)
    assert (
        reading.keys()
        == here.keys()
        == {
            "tokens",
            "cache_bytes",
            "state_bytes",
            "rollout_peak_bytes",
            "update_peak_bytes",
        }
    )
    assert all(reading[name] == here[name] for name in ("tokens", "cache_bytes", "state_bytes"))
    assert reading["update_peak_bytes"] > 0


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
