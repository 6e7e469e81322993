"""The worst case first: longest prompt, longest completion, one update, so that a run that cannot fit fails at once.

Decides: what the worst case is, what it is held against (`pte.plan`), and what to lower when it does not fit. Nothing
is written, nothing is kept.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from pte.learn.distill import DistillStage
from pte.learn.grpo import GrpoStage
from pte.learn.stage import peak_memory_bytes
from pte.learn.trainer import build_stages
from pte.method.cache import analytic_bytes
from pte.plan.arms import planned_policy, planned_work
from pte.plan.memory import ADAMW_MOMENTS
from pte.plan.model_sizes import ModelSizes
from pte.plan.process_memory import device_growth_bytes
from pte.plan.rollout_memory import rollout_memory
from pte.plan.update_memory import update_memory
from pte.ranks import ALONE, Ranks
from pte.rollout.generate import RolloutEngine
from pte.rollout.record import Rollout, RolloutRequest, collate_rollouts
from pte.session import check_problems, open_session

if TYPE_CHECKING:
    from pte.config import ExperimentConfig
    from pte.model.policy import BoundedPolicy


def dry_run(config: ExperimentConfig, *, ranks: Ranks = ALONE, shard_base: bool = False) -> str:
    """Runs the worst case of every stage once and says what it took.

    Args:
        config: What would run.
        ranks: Processes that would share it; each runs the worst case of its share.
        shard_base: The base's layers lie in shards on them.

    Raises:
        ValueError: The configuration does not fit, as for a real run.
        RuntimeError: Out of memory; the message says what to lower.
    """
    config.check_trainable()
    session = open_session(config, ranks=ranks, shard_base=shard_base)
    policy, limit = session.policy, config.rollout.max_new_tokens
    check_problems(session, config)
    longest = session.task.longest_prompt()
    groups = -(-config.train.prompts_per_step // ranks.size)
    sequences = min(config.rollout.slots, groups * config.train.group_size)
    lines = [
        f"worst case: prompt {len(longest)} tokens (the longest of the training problems), completion "
        f"{limit} tokens, {sequences} sequences at once"
    ]
    started, remedy = time.perf_counter(), ""
    try:
        engine = RolloutEngine(
            policy,
            slots=sequences,
            max_new_tokens=limit,
            temperature=config.rollout.temperature,
            # No draw can give it: the longest completion, looked at as in training.
            stop_token_ids=(policy.vocab,),
            allow_beyond_trained_positions=config.model.allow_beyond_trained_positions,
        )
        rollouts: list[Rollout] = []
        requests = [RolloutRequest(longest, seed) for seed in range(sequences)]
        # What libraries load at first is not the rollout's. Their forward would leave all layers of shards whole.
        if policy.sharded is None:
            with torch.no_grad():
                policy.base(torch.tensor([longest], device=policy.device))
        grown = device_growth_bytes(policy.device, lambda: rollouts.extend(engine.run(requests)))
        lines.append(
            f"rollout: {time.perf_counter() - started:.1f} s ({engine.path}), "
            f"cache {engine.peak_cache_bytes / 2**20:.1f} MiB, "
            f"process or device peak {peak_memory_bytes(policy.device) / 2**20:.0f} MiB; "
            f"{against(planned_rollout(policy, config, longest, sequences=sequences), grown)}"
        )
        for stage in build_stages(session, config):
            started = time.perf_counter()
            if isinstance(stage, DistillStage) and stage.source == "teacher":
                lines.append(teacher_rollout(stage, longest))
            remedy = recomputation(stage)
            grown = device_growth_bytes(policy.device, partial(one_update, stage, rollouts))
            seconds = time.perf_counter() - started
            lines.append(
                f"{stage.name}: one update on {stage.micro_batch_size} sequences {seconds:.1f} s, "
                f"process or device peak {peak_memory_bytes(policy.device) / 2**20:.0f} MiB; "
                f"{against(planned_update(stage, policy, config, longest), grown)}"
            )
    except torch.OutOfMemoryError as error:
        raise RuntimeError(
            f"the worst case does not fit: {str(error).splitlines()[0]}; done so far: {'; '.join(lines)}; "
            f"{remedy}lower rollout.slots, train.micro_batch_size, cache.window_tokens or rollout.max_new_tokens, in "
            f"this order"
        ) from error
    expected = analytic_bytes(
        policy.cache_shape,
        batch=sequences,
        prompt_slots=len(longest),
        window_slots=policy.schedule.kept_tokens(limit),
        dtype=policy.cache_dtype,
    )
    lines.append(
        f"the cache is {sequences} x (prompt + {policy.schedule.kept_tokens(limit)} kept tokens) = "
        f"{expected / 2**20:.1f} MiB whatever the completion's length; to lower the peak: rollout.slots, "
        f"train.micro_batch_size, cache.window_tokens"
    )
    return "\n".join(lines)


def planned_rollout(policy: BoundedPolicy, config: ExperimentConfig, prompt: tuple[int, ...], *, sequences: int) -> int:
    """Bytes that the rollout of the worst case needs by the formulas, beyond what lies there before it.

    Args:
        policy: What is sampled from.
        config: Of the run.
        prompt: Which all sequences share.
        sequences: Of this process, all at once.
    """
    planned = planned_policy(config, ModelSizes.of(policy.base.config), cuda=policy.device.type == "cuda")
    work = replace(planned_work(config, prompt_tokens=len(prompt)), sequences=sequences, group_size=sequences)
    phase = rollout_memory(planned, work)
    fused = planned.fused_numbers * policy.dtype.itemsize
    return phase.device_bytes + (fused if planned.cuda else phase.host_bytes)


def planned_update(
    stage: object, policy: BoundedPolicy, config: ExperimentConfig, prompt: tuple[int, ...]
) -> int | None:
    """The same of a stage's update; None in a gradient mode that cannot be planned.

    The optimizer's first step makes its moments, when the walk's memory is free again.
    """
    assert isinstance(stage, DistillStage | GrpoStage)
    options = config.distill if isinstance(stage, DistillStage) else config.train
    if options.gradient_mode == "exact" and not policy.schedule.is_full:
        return None
    planned = planned_policy(config, ModelSizes.of(policy.base.config), cuda=policy.device.type == "cuda")
    work = replace(
        planned_work(config, prompt_tokens=len(prompt)),
        sequences=stage.micro_batch_size,
        micro_batch=stage.micro_batch_size,
        gradient_mode=options.gradient_mode,
        horizon=options.horizon,
        gradient_checkpointing=options.gradient_checkpointing,
        reference=planned_work(config, prompt_tokens=1).reference if isinstance(stage, GrpoStage) else None,
    )
    walk = update_memory(planned, work).device_bytes
    return max(walk, (1 + ADAMW_MOMENTS) * planned.adapter_bytes)


def recomputation(stage: object) -> str:
    """The first remedy of a stage whose update does not fit; nothing where its layers are computed again already."""
    assert isinstance(stage, DistillStage | GrpoStage)
    if stage.replay.gradient_checkpointing or stage.replay.policy.schedule.is_full:
        return ""
    return f"set {'distill' if isinstance(stage, DistillStage) else 'train'}.gradient_checkpointing, or "


def against(planned: int | None, measured: int | None) -> str:
    """What was planned beside what was measured, both beyond what was there before."""
    ours = "not planned in this gradient mode" if planned is None else f"planned {planned / 2**20:.1f} MiB"
    theirs = "not measured here" if measured is None else f"measured {measured / 2**20:.1f} MiB"
    ratio = f" ({planned / measured:.2f})" if planned and measured else ""
    return f"beyond what was there before: {ours}, {theirs}{ratio}"


def teacher_rollout(stage: DistillStage, prompt: tuple[int, ...]) -> str:
    """The teacher's longest rollouts: its cache is not bounded."""
    started, teacher = time.perf_counter(), stage.teacher
    teacher.stop_token_ids = frozenset((teacher.policy.vocab,))
    teacher.run([RolloutRequest(prompt, seed) for seed in range(stage.batch_size)])
    return (
        f"teacher: {time.perf_counter() - started:.1f} s, full cache {teacher.peak_cache_bytes / 2**20:.1f} MiB, "
        f"process or device peak {peak_memory_bytes(stage.policy.device) / 2**20:.0f} MiB"
    )


def one_update(stage: object, rollouts: list[Rollout]) -> None:
    """A replay of a stage's largest micro-batch, its backward, its reference and an optimizer step."""
    assert isinstance(stage, DistillStage | GrpoStage)
    chosen = [rollouts[index % len(rollouts)] for index in range(stage.micro_batch_size)]
    batch = collate_rollouts(chosen, device=stage.replay.policy.device)
    if isinstance(stage, DistillStage):
        batch = replace(batch, evicted_tokens=None)  # what it imitates has no record: the replay chooses
    output = stage.replay(batch)
    if isinstance(stage, GrpoStage) and stage.reference is not None:
        with torch.no_grad():
            stage.reference(batch)
    output.policy_logprobs.mean().backward()
    stage.optimizer.step()
