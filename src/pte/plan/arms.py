"""Full-cache LoRA, LoRA under the window (LoRA_c) and PTE: what each needs, what fits, and how long a step takes.

Decides: how an experiment becomes the three arms, and how the largest batch and the longest completion are found: by
bisection on the formulas themselves, so that one more does not fit. Times are those of the roofline.
Does not know: tables, flags.

Paper: its tables compare these three.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch

from pte.model.load import dtype_named
from pte.open_policy import eviction_policy
from pte.plan.memory import PhaseMemory, PlannedPolicy, Workload
from pte.plan.rollout_memory import rollout_memory
from pte.plan.roofline import DecodeWork, attended_sum, step_bound_seconds, update_flops
from pte.plan.update_memory import update_memory

if TYPE_CHECKING:
    from pte.config import ExperimentConfig
    from pte.plan.machine import Machine
    from pte.plan.model_sizes import ModelSizes

ArmName = Literal["LoRA", "LoRA_c", "PTE"]
ARM_NAMES: tuple[ArmName, ...] = ("LoRA", "LoRA_c", "PTE")
MOST_SLOTS = 2**20


@dataclass(frozen=True)
class ArmPlan:
    """What an arm needs.

    Args:
        name: Of the arm.
        policy: Its policy.
        rollout: At its peak, beyond what lies there for the whole of a run.
        update: Likewise.
        fits: Both phases fit, and what waits in host memory.
        fits_recomputed: They would with gradient checkpointing.
        weights_fit: What lies there for the whole of a run leaves any room at all.
        largest_slots: Sequences that can be sampled at once; 0 where not even one fits.
        largest_micro_batch: Sequences of a step that can be replayed at once; 0 where not even one fits.
        largest_recomputed: The same with gradient checkpointing.
        longest_completion: With slots and micro-batch as asked, up to the trained positions; 0 where none fits.
        time: At the roofline; None without rates, and where the arm does not fit.
    """

    name: ArmName
    policy: PlannedPolicy
    rollout: PhaseMemory
    update: PhaseMemory
    fits: bool
    fits_recomputed: bool
    weights_fit: bool
    largest_slots: int
    largest_micro_batch: int
    largest_recomputed: int
    longest_completion: int
    time: StepTime | None

    @property
    def resident_bytes(self) -> int:
        """What lies on the device for the whole of a run."""
        return sum(self.policy.resident.values())


@dataclass(frozen=True)
class StepTime:
    """A training step of the worst case at the roofline.

    Args:
        tokens_per_second: Of the rollout, with the slots that were asked for.
        rollout_seconds: Of all completions of a step.
        update_seconds: Of the update on them.
    """

    tokens_per_second: float
    rollout_seconds: float
    update_seconds: float


def planned_policy(config: ExperimentConfig, sizes: ModelSizes, *, cuda: bool) -> PlannedPolicy:
    """The policy of an experiment, unmade.

    Args:
        config: Its adapter is of a kind that has parameters.
        sizes: Of the base.
        cuda: It is to run on a GPU.
    """
    adapter, schedule = config.adapter, config.cache.schedule
    assert adapter.kind != "none"
    float8 = config.model.dtype == "float8"
    segments = 1
    if schedule.window_tokens is not None and schedule.evict_tokens is not None:
        segments = eviction_policy(config.cache).segments_per_stretch(schedule.window_tokens, schedule.evict_tokens)
    return PlannedPolicy(
        sizes=sizes,
        dtype=torch.bfloat16 if float8 else dtype_named(config.model.dtype),
        float8=float8,
        kind=adapter.kind,
        rank=adapter.rank,
        targets=adapter.targets,
        adapted_layers=len(adapter.layers) or sizes.layers,
        global_tokens=adapter.global_tokens,
        schedule=schedule,
        segments_per_stretch=segments,
        cuda=cuda,
    )


def planned_work(config: ExperimentConfig, *, prompt_tokens: int) -> Workload:
    """The worst case of an experiment's GRPO stage."""
    train = config.train
    return Workload(
        prompt_tokens=prompt_tokens,
        completion_tokens=config.rollout.max_new_tokens,
        slots=config.rollout.slots,
        sequences=train.prompts_per_step * train.group_size,
        group_size=train.group_size,
        micro_batch=train.micro_batch_size,
        gradient_mode=train.gradient_mode,
        horizon=train.horizon,
        reference=train.reference if train.kl_beta > 0 else None,
        gradient_checkpointing=train.gradient_checkpointing,
    )


def plan_arms(config: ExperimentConfig, sizes: ModelSizes, machine: Machine, *, prompt_tokens: int) -> list[ArmPlan]:
    """The three arms of an experiment on a machine.

    Args:
        config: Of the PTE arm; the others differ from it in adapter and cache.
        sizes: Of the base.
        machine: What there is.
        prompt_tokens: Of the longest prompt.

    Raises:
        ValueError: The experiment has no window, the prompt is empty, the sequences are longer than the trained
            positions, or its gradient mode cannot be planned.
    """
    if config.cache.schedule.is_full:
        raise ValueError(
            "cache.policy must have a window to plan LoRA_c and PTE, got 'none'; use --cache.policy window"
        )
    if prompt_tokens < 1:
        raise ValueError(f"prompt must be at least 1 token, got {prompt_tokens}; use for example 1024")
    tokens = prompt_tokens + config.rollout.max_new_tokens
    if tokens > sizes.max_positions and not config.model.allow_beyond_trained_positions:
        raise ValueError(
            f"prompt plus completion must stay within the model's {sizes.max_positions} trained positions, got "
            f"{tokens} tokens; lower --prompt or --completion, or set --model.allow-beyond-trained-positions"
        )
    work = planned_work(config, prompt_tokens=prompt_tokens)
    lora = replace(config, adapter=replace(config.adapter, kind="lora"))
    configs: dict[ArmName, ExperimentConfig] = {
        "LoRA": replace(lora, cache=replace(config.cache, policy="none")),
        "LoRA_c": lora,
        "PTE": replace(config, adapter=replace(config.adapter, kind="thought")),
    }
    return [
        arm_plan(name, planned_policy(configs[name], sizes, cuda=machine.cuda), work, machine) for name in ARM_NAMES
    ]


def arm_plan(name: ArmName, policy: PlannedPolicy, work: Workload, machine: Machine) -> ArmPlan:
    """One arm on a machine."""
    recomputed = replace(work, gradient_checkpointing=True)
    sampled = rollout_fits(policy, work, machine)
    fits = sampled and update_fits(policy, work, machine)
    positions = max(policy.sizes.max_positions, work.prompt_tokens + work.completion_tokens)

    def slots_fit(count: int) -> bool:
        return rollout_fits(policy, replace(work, slots=count, sequences=max(count, work.sequences)), machine)

    def completion_fits(tokens: int) -> bool:
        longer = replace(work, completion_tokens=tokens)
        return rollout_fits(policy, longer, machine) and update_fits(policy, longer, machine)

    def largest_batch(asked: Workload) -> int:
        return largest(lambda count: update_fits(policy, replace(asked, micro_batch=count), machine), asked.sequences)

    return ArmPlan(
        name=name,
        policy=policy,
        rollout=rollout_memory(policy, work),
        update=update_memory(policy, work),
        fits=fits,
        fits_recomputed=sampled and update_fits(policy, recomputed, machine),
        weights_fit=machine.taken(resident=sum(policy.resident.values()), phase=0) <= machine.device_bytes,
        largest_slots=largest(slots_fit, MOST_SLOTS),
        largest_micro_batch=largest_batch(work),
        largest_recomputed=largest_batch(recomputed),
        longest_completion=largest(completion_fits, positions - work.prompt_tokens),
        time=step_time(policy, work, machine) if fits else None,
    )


def phase_fits(policy: PlannedPolicy, phase: PhaseMemory, machine: Machine) -> bool:
    """True where a phase has room on the device and, where that is known, beside it."""
    resident = sum(policy.resident.values())
    beside = phase.host_bytes if machine.cuda else 0
    on_device = phase.device_bytes + (0 if machine.cuda else phase.host_bytes)
    return machine.taken(resident=resident, phase=on_device) <= machine.device_bytes and (
        machine.host_bytes is None or beside <= machine.host_bytes
    )


def rollout_fits(policy: PlannedPolicy, work: Workload, machine: Machine) -> bool:
    """True where the rollout fits."""
    return phase_fits(policy, rollout_memory(policy, work), machine)


def update_fits(policy: PlannedPolicy, work: Workload, machine: Machine) -> bool:
    """True where the update fits."""
    return phase_fits(policy, update_memory(policy, work), machine)


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number from 1 to `most` that fits, so that one more does not; 0 where 1 does not.

    Args:
        fits: True for a number up to some bound, false above it.
        most: Nothing larger is asked for.
    """
    if most < 1 or not fits(1):
        return 0
    if fits(most):
        return most
    low, high = 1, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def step_time(policy: PlannedPolicy, work: Workload, machine: Machine) -> StepTime | None:
    """A training step at the roofline, every completion of full length."""
    if machine.rates is None:
        return None
    decode = DecodeWork.of(policy.sizes, policy.dtype, float8=policy.float8)
    entered = max(work.completion_tokens - 1, 1)
    attended = work.prompt_tokens + attended_sum(policy.schedule, range(entered)) / entered
    rows = min(work.slots, work.sequences)
    seconds = step_bound_seconds(decode, machine.rates, batch=rows, attended_tokens=attended)
    flops = update_flops(
        decode,
        policy.schedule,
        sequences=work.sequences,
        prompt_tokens=work.prompt_tokens,
        tokens=work.completion_tokens,
    )
    per_second = rows / seconds
    return StepTime(
        tokens_per_second=per_second,
        rollout_seconds=work.sequences * work.completion_tokens / per_second,
        update_seconds=flops / machine.rates.flops_per_second,
    )
