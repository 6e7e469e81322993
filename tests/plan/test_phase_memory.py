"""What is planned for a phase is what its tensors take, and what the process takes within a tenth."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from live_bytes import LiveBytes
from planned import planned
from pte.bench.arms import OurStep
from pte.bench.cpu_arms import our_step
from pte.bench.memory import isolated_growth_bytes
from pte.bench.presets import CPU
from pte.method.eviction.random import UniformRandom
from pte.plan.memory import Workload
from pte.plan.model_sizes import ModelSizes
from pte.plan.process_memory import probe_available
from pte.plan.rollout_memory import rollout_memory
from pte.plan.update_memory import group_stretches, update_memory
from pte.rollout import gradients
from tiny import VOCAB, tiny_base, tiny_policy

pytestmark = pytest.mark.system

WIDE = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "layers": 3,
}


def both(
    architecture="qwen2",
    *,
    batches=1,
    tokens=150,
    prompt=24,
    mode="chain",
    dtype=torch.float32,
    again=False,
    **options,
):
    """A policy with 2 sequences at once, the plan of it, its work."""
    settings = {"window": 32, "block": 8, "kind": "thought", "rank": 8, "global_tokens": 3, **options}
    wide = WIDE if architecture != "qwen3" else {**WIDE, "head_dim": 16}
    base = tiny_base(architecture, dtype=dtype, **wide)
    policy = tiny_policy(architecture, base=base, dtype=dtype, **settings)
    plan = planned(
        base,
        kind=settings["kind"],
        rank=settings["rank"],
        adapted_layers=3,
        schedule=policy.schedule,
        segments_per_stretch=policy.segments_per_stretch,
    )
    work = Workload(
        prompt_tokens=prompt,
        completion_tokens=tokens,
        slots=2 * batches,
        sequences=2 * batches,
        group_size=1,
        micro_batch=2,
        gradient_mode=mode,
        horizon=4,
        reference=None,
        gradient_checkpointing=again,
    )
    return policy, plan, work


def step_of(policy, work: Workload) -> OurStep:
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(3, VOCAB, (work.sequences, work.prompt_tokens), generator=generator).tolist()
    return OurStep(
        policy,
        [tuple(prompt) for prompt in prompts],
        mode=work.gradient_mode,
        horizon=work.horizon,
        micro_batch=work.micro_batch,
        gradient_checkpointing=work.gradient_checkpointing,
    )


CASES = {
    "PTE": {},
    "PTE, one window of prompt and completion": {"tokens": 20},
    "PTE, horizon": {"mode": "horizon"},
    "PTE, two micro-batches": {"batches": 2, "rank": 48},
    "PTE, bfloat16": {"dtype": torch.bfloat16},
    "PTE, no prompt to speak of": {"prompt": 2},
    "PTE, masks of a wide window": {"prompt": 2, "window": 128, "block": 32, "tokens": 300},
    "PTE, a block at a time": {"eviction": UniformRandom()},
    "PTE, layers again": {"again": True},
    "PTE, layers again, horizon": {"again": True, "mode": "horizon"},
    "PTE, layers again, one window": {"again": True, "tokens": 20},
    "PTE, layers again, two micro-batches": {"again": True, "batches": 2, "rank": 48},
    "PTE, layers again, bfloat16": {"again": True, "dtype": torch.bfloat16},
    "PTE, layers again, wide window": {"again": True, "prompt": 2, "window": 128, "block": 32, "tokens": 300},
    "LoRA_c, layers again": {"again": True, "kind": "lora"},
    "global tokens only": {"kind": "global_only"},
    "qwen3": {"architecture": "qwen3"},
    "llama": {"architecture": "llama"},
    "LoRA_c": {"kind": "lora"},
    "LoRA": {"kind": "lora", "window": None},
    "LoRA, two micro-batches": {"kind": "lora", "window": None, "batches": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_the_planned_peak_is_that_of_the_tensors(case: str) -> None:
    policy, plan, work = both(**CASES[case])
    step = step_of(policy, work)
    with LiveBytes() as sampling:
        rollouts = step.sample(work.completion_tokens, 0)
    with LiveBytes() as updating:
        step.update(rollouts)
    rollout, update = rollout_memory(plan, work), update_memory(plan, work)
    assert rollout.device["slots"] == step.cache_bytes
    assert rollout.device["states"] == 2 * step.state_bytes
    assert rollout.device_bytes == pytest.approx(sampling.peak, rel=0.08)
    assert update.device_bytes == pytest.approx(updating.peak, rel=0.05)


def test_groups_of_stretches_are_those_of_the_replay() -> None:
    for options in ({}, {"rank": 32}, {"eviction": UniformRandom()}, {"window": 16, "block": 4}):
        policy, plan, _ = both(**options)
        assert group_stretches(plan) == gradients.group_stretches(policy)


@pytest.mark.skipif(not probe_available(), reason="no /proc/self/clear_refs or no glibc")
@pytest.mark.parametrize("arm", ["chain", "horizon"])
def test_the_planned_peak_of_a_step_is_within_a_tenth_of_the_process_s(arm: str) -> None:
    preset = replace(
        CPU,
        shape=replace(CPU.shape, hidden_size=256, intermediate_size=1024, vocab=1024),
        warmup_tokens=72,
    )
    tokens = 256
    policy = our_step(preset, arm).policy
    plan = planned(
        policy.base, rank=32, adapted_layers=4, global_tokens=32, schedule=policy.schedule, segments_per_stretch=4
    )
    assert plan.sizes == ModelSizes.of(policy.base.config)
    work = Workload(
        preset.prompt_tokens, tokens, preset.batch, preset.batch, 1, preset.batch, arm, preset.horizon, None, False
    )
    resident = sum(plan.resident.values())
    grown = isolated_growth_bytes(preset, arm, tokens=tokens)
    phases = [update_memory(plan, work), rollout_memory(plan, work)]
    assert max(phase.device_bytes for phase in phases) + resident == pytest.approx(grown + resident, rel=0.1)
