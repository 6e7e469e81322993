"""Both sides in the sizes of `--preset cpu`: a base of its own for each, float32.

Decides: nothing; it puts the sizes of a preset into the arms.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pte.bench.arms import OurRollout, OurStep, attach_trained
from pte.bench.plain import PlainGenerate, PlainLoraStep
from pte.bench.workload import random_ids
from pte.method.schedule import EvictionSchedule
from pte.model.policy import BoundedPolicy
from pte.plan.roofline import DecodeWork
from pte.plan.shapes import random_base

if TYPE_CHECKING:
    from pte.bench.presets import Preset
    from pte.rollout.replay import GradientMode


def thought_policy(preset: Preset) -> BoundedPolicy:
    """PTE on a random base."""
    base = random_base(preset.shape)
    adapter = attach_trained(base, "thought", rank=preset.rank, global_tokens=preset.global_tokens)
    return BoundedPolicy(base, adapter, EvictionSchedule(preset.window_tokens, preset.evict_tokens))


def prompts(preset: Preset) -> list[tuple[int, ...]]:
    """One prompt for each sequence."""
    return random_ids(preset.shape.vocab, batch=preset.batch, tokens=preset.prompt_tokens)


def our_rollout(preset: Preset) -> OurRollout:
    """The bounded rollout."""
    return OurRollout(thought_policy(preset), prompts(preset))


def our_step(preset: Preset, mode: GradientMode) -> OurStep:
    """The whole step, replayed in one batch."""
    return OurStep(thought_policy(preset), prompts(preset), mode=mode, horizon=preset.horizon, micro_batch=preset.batch)


def plain_generate(preset: Preset) -> PlainGenerate:
    """`generate` on the base alone."""
    return PlainGenerate(random_base(preset.shape), prompts(preset))


def plain_step(preset: Preset) -> PlainLoraStep:
    """`generate` and plain LoRA GRPO, without gradient checkpointing."""
    return PlainLoraStep(
        random_base(preset.shape),
        prompts(preset),
        rank=preset.rank,
        micro_batch=preset.batch,
        gradient_checkpointing=False,
    )


def evicted_bytes(preset: Preset, tokens: int) -> int:
    """Bytes of the keys and values that leave the cache over completions of `tokens` tokens."""
    schedule = EvictionSchedule(preset.window_tokens, preset.evict_tokens)
    work = DecodeWork.of(preset.shape, torch.float32)
    return preset.batch * schedule.num_evictions(tokens) * preset.evict_tokens * work.kv_token_bytes
