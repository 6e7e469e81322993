"""The worst case first: longest prompt, longest completion, one update, so that a run that cannot fit fails at once.

Decides: what the worst case is, and what to lower when it does not fit. Nothing is written, nothing is kept.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from pte.learn.distill import DistillStage
from pte.learn.grpo import GrpoStage
from pte.learn.stage import peak_memory_bytes
from pte.learn.trainer import build_stages
from pte.method.cache import analytic_bytes
from pte.ranks import ALONE, Ranks
from pte.rollout.generate import RolloutEngine
from pte.rollout.record import Rollout, RolloutRequest, collate_rollouts
from pte.session import check_problems, open_session

if TYPE_CHECKING:
    from pte.config import ExperimentConfig


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
    started = time.perf_counter()
    try:
        engine = RolloutEngine(
            policy,
            slots=sequences,
            max_new_tokens=limit,
            temperature=config.rollout.temperature,
            stop_token_ids=(),
            allow_beyond_trained_positions=config.model.allow_beyond_trained_positions,
        )
        rollouts = engine.run([RolloutRequest(longest, seed) for seed in range(sequences)])
        lines.append(
            f"rollout: {time.perf_counter() - started:.1f} s ({engine.path}), "
            f"cache {engine.peak_cache_bytes / 2**20:.1f} MiB, "
            f"process or device peak {peak_memory_bytes(policy.device) / 2**20:.0f} MiB"
        )
        for stage in build_stages(session, config):
            started = time.perf_counter()
            if isinstance(stage, DistillStage) and stage.source == "teacher":
                lines.append(teacher_rollout(stage, longest))
            one_update(stage, rollouts)
            seconds = time.perf_counter() - started
            lines.append(
                f"{stage.name}: one update on {stage.micro_batch_size} sequences {seconds:.1f} s, "
                f"process or device peak {peak_memory_bytes(policy.device) / 2**20:.0f} MiB"
            )
    except torch.OutOfMemoryError as error:
        raise RuntimeError(
            f"the worst case does not fit: {str(error).splitlines()[0]}; done so far: {'; '.join(lines)}; lower "
            f"rollout.slots, train.micro_batch_size, cache.window_tokens or rollout.max_new_tokens, in this order"
        ) from error
    expected = analytic_bytes(
        policy.cache_shape,
        batch=sequences,
        prompt_slots=len(longest),
        window_slots=policy.schedule.kept_tokens(limit),
        dtype=policy.dtype,
    )
    lines.append(
        f"the cache is {sequences} x (prompt + {policy.schedule.kept_tokens(limit)} kept tokens) = "
        f"{expected / 2**20:.1f} MiB whatever the completion's length; to lower the peak: rollout.slots, "
        f"train.micro_batch_size, cache.window_tokens"
    )
    return "\n".join(lines)


def teacher_rollout(stage: DistillStage, prompt: tuple[int, ...]) -> str:
    """The teacher's longest rollouts: its cache is not bounded."""
    started, teacher = time.perf_counter(), stage.teacher
    teacher.stop_token_ids = frozenset()
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
