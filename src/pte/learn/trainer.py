"""A run: warm start, then GRPO, with a log line and a possible checkpoint after every step.

Decides: what is built from a configuration (`build_run`), the one counter of steps that both stages share, what is
written when, and how a run goes on after it was killed: everything random is a function of the seed and the step, so
adapter, optimizer and a few counters are all that a checkpoint needs. Of several ranks the first alone reads and writes
files; a checkpoint does not know how many there were.
Does not know: what a step does (`distill`, `grpo`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pte.checkpoint import Checkpoint, latest_checkpoint, load_checkpoint, save_checkpoint
from pte.learn.distill import DistillStage
from pte.learn.grpo import GrpoStage
from pte.learn.journal import Journal, check_trackers, open_trackers
from pte.learn.loss import PolicyObjective
from pte.learn.optimizer import AdapterOptimizer, TrainingStopped
from pte.learn.stage import Stage, StepResult
from pte.method.float8 import FLOAT8
from pte.method.schedule import EvictionSchedule
from pte.ranks import ALONE, RankLost, Ranks, ToldToEnd
from pte.rollout.generate import RolloutEngine
from pte.rollout.replay import Replay
from pte.run_record import check_resumed_config, open_run_directory, save_record
from pte.session import Session, check_problems, open_session

if TYPE_CHECKING:
    from pte.config import DistillConfig, ExperimentConfig, TrainConfig
    from pte.model.policy import BoundedPolicy

CHECKPOINTS = "checkpoints"
MAX_GAP = {torch.float32: 1e-3, torch.float64: 1e-3, torch.bfloat16: 1.0, torch.float16: 1.0, FLOAT8: 2.0}
"""Nats. Rounding alone makes 1e-5 in float32, 1e-4 on a sharply trained base, tenths in half precision, up to a half in
float8 (docs/precision.md); another policy than the one that sampled shows tenths in the mean."""


@dataclass
class Run:
    """Everything a run needs, built before any work.

    Args:
        config: Resolved.
        session: Base, adapter, task.
        stages: In order.
        directory: Where the run is recorded.
        done_steps: Steps that the checkpoint held; 0 for a new run.
    """

    config: ExperimentConfig
    session: Session
    stages: list[Stage]
    directory: Path
    done_steps: int = 0

    @property
    def total_steps(self) -> int:
        """Of all stages."""
        return sum(stage.steps for stage in self.stages)


def build_stages(session: Session, config: ExperimentConfig) -> list[Stage]:
    """The stages with more than 0 steps, warm start first."""
    policy = session.policy
    assert policy.adapter is not None
    stages: list[Stage] = []
    if config.distill.steps:
        stages.append(
            DistillStage(
                policy,
                session.task,
                replay=make_replay(policy, config.distill),
                optimizer=make_optimizer(
                    policy, config.distill, weight_decay=0.0, updates_per_step=1, ranks=session.ranks
                ),
                steps=config.distill.steps,
                batch_size=config.distill.batch_size,
                micro_batch_size=config.distill.micro_batch_size,
                source=config.distill.source,
                temperature=config.rollout.temperature,
                max_new_tokens=config.rollout.max_new_tokens,
                slots=config.rollout.slots,
                seed=config.run.seed,
                allow_beyond_trained_positions=config.model.allow_beyond_trained_positions,
                ranks=session.ranks,
            )
        )
    if config.train.steps:
        stages.append(build_grpo(session, config))
    return stages


def build_grpo(session: Session, config: ExperimentConfig) -> GrpoStage:
    """The reinforcement stage."""
    policy, train = session.policy, config.train
    reference = None
    if train.kl_beta > 0:
        base = policy.without_adapter()
        reference = Replay(base if train.reference == "bounded" else base.with_cache(EvictionSchedule(None)))
    return GrpoStage(
        session.task,
        RolloutEngine(
            policy,
            slots=config.rollout.slots,
            max_new_tokens=config.rollout.max_new_tokens,
            temperature=config.rollout.temperature,
            stop_token_ids=session.task.stop_token_ids,
            allow_beyond_trained_positions=config.model.allow_beyond_trained_positions,
        ),
        replay=make_replay(policy, train),
        reference=reference,
        optimizer=make_optimizer(
            policy,
            train,
            weight_decay=train.weight_decay,
            updates_per_step=train.minibatches_per_step,
            ranks=session.ranks,
        ),
        objective=PolicyObjective(
            kind=train.loss,
            clip_low=train.clip_low,
            clip_high=train.clip_high,
            kl_beta=train.kl_beta,
            max_completion_tokens=config.rollout.max_new_tokens,
        ),
        steps=train.steps,
        prompts_per_step=train.prompts_per_step,
        group_size=train.group_size,
        minibatches_per_step=train.minibatches_per_step,
        micro_batch_size=train.micro_batch_size,
        dynamic_sampling=train.dynamic_sampling,
        max_resample_rounds=train.max_resample_rounds,
        max_logprob_gap=train.max_logprob_gap or MAX_GAP[policy.cache_dtype],
        seed=config.run.seed,
        log_completions=train.log_completions,
        ranks=session.ranks,
    )


def make_replay(policy: BoundedPolicy, stage: DistillConfig | TrainConfig) -> Replay:
    """The replay in a stage's gradient mode."""
    horizon = stage.horizon if stage.gradient_mode == "horizon" else None
    return Replay(
        policy,
        gradient_mode=stage.gradient_mode,
        horizon=horizon,
        gradient_checkpointing=stage.gradient_checkpointing,
    )


def make_optimizer(
    policy: BoundedPolicy,
    stage: DistillConfig | TrainConfig,
    *,
    weight_decay: float,
    updates_per_step: int,
    ranks: Ranks,
) -> AdapterOptimizer:
    """A stage's optimizer."""
    assert policy.adapter is not None
    return AdapterOptimizer(
        policy.adapter,
        learning_rate=stage.learning_rate,
        warmup_steps=stage.warmup_steps,
        total_steps=stage.steps * updates_per_step,
        decay=stage.decay,
        weight_decay=weight_decay,
        max_grad_norm=stage.max_grad_norm,
        ranks=ranks,
    )


def open_run(config: ExperimentConfig, *, ranks: Ranks = ALONE, shard_base: bool = False) -> Run:
    """Builds a run, or the one that is resumed, up to its last checkpoint.

    Args:
        config: What it is.
        ranks: Processes that share it; however many there were before.
        shard_base: The base's layers lie in shards on them.

    Raises:
        FileExistsError, FileNotFoundError: The run directory is taken, or there is none to resume.
        ValueError: The configuration, the model, the data or the checkpoint do not fit.
    """
    config.check_trainable()
    session = open_session(config, ranks=ranks, shard_base=shard_base)
    stages = build_stages(session, config)
    if not stages:
        raise ValueError("a run must have steps, got 0 in distill and in train; set distill.steps or train.steps")
    check_problems(session, config)
    check_trackers(config.run.log_with)
    directory = Path(config.run.output_dir) / config.run.name

    def prepare() -> None:
        open_run_directory(directory, resume=config.run.resume)
        if config.run.resume:
            check_resumed_config(directory, config)
        else:
            save_record(directory, config)

    ranks.from_first(prepare)
    run = Run(config=config, session=session, stages=stages, directory=directory)
    if config.run.resume:
        restore(run)
    return run


def restore(run: Run) -> None:
    """Puts adapter, optimizer and counters back to the last checkpoint, if one was written."""

    def read() -> Checkpoint | None:
        path = latest_checkpoint(run.directory / CHECKPOINTS)
        return None if path is None else load_checkpoint(path)

    checkpoint = run.session.ranks.from_first(read)
    if checkpoint is None:
        return
    run.session.load_adapter_tensors(checkpoint.adapter, checkpoint.metadata)
    run.done_steps = checkpoint.step
    for stage in run.stages:
        state = checkpoint.training_state.get(stage.name)
        if isinstance(state, dict):
            stage.load_state(state)  # type: ignore[arg-type]


def save(run: Run, step: int) -> Path:
    """Writes a checkpoint after `step` steps, of an adapter that all ranks agree on.

    Raises:
        TrainingStopped: They do not.
    """
    adapter = run.session.policy.adapter
    assert adapter is not None
    sums = run.session.ranks.gather(sum(parameter.double().sum().item() for parameter in adapter.parameters()))
    if len(set(map(str, sums))) > 1:
        raise TrainingStopped(
            f"the adapters of all ranks must be the same, got sums {sums}; look for a rank whose processor or "
            f"libraries differ, and resume from the last checkpoint"
        )
    return run.session.ranks.from_first(
        lambda: save_checkpoint(
            run.directory / CHECKPOINTS,
            step,
            adapter=run.session.adapter_tensors(),
            metadata=run.session.metadata(),
            training_state={stage.name: stage.state() for stage in run.stages},
            keep=run.config.train.keep_checkpoints,
        )
    )


def train(
    run: Run,
    *,
    on_step: Callable[[str, int, StepResult], None] | None = None,
) -> Path:
    """Runs what is left of a run.

    Args:
        run: From `open_run`.
        on_step: Called after each step with the stage's name, the steps done, and the result.

    Returns:
        The last checkpoint.

    Raises:
        TrainingStopped: Gap, loss or gradient are not sound; the message names the last good checkpoint.
        RankLost: Another rank is gone, or this one was told to end; the message names the last good checkpoint.
    """
    ranks = run.session.ranks
    checkpoint, where = ranks.from_first(lambda: latest_checkpoint(run.directory / CHECKPOINTS)), "at the start"
    try:
        journal = Journal(run.directory, done_steps=run.done_steps, ranks=ranks)
        first = 0
        with open_trackers(run.config.run, run.directory, ranks=ranks) as track:
            for stage in run.stages:
                for index in range(max(0, run.done_steps - first), stage.steps):
                    step = first + index + 1
                    where = f"step {step} ({stage.name})"
                    result = stage.step(index)
                    journal.append(stage.name, step, result)
                    track({f"{stage.name}/{key}": value for key, value in result.metrics.items()}, step)
                    if step % run.config.train.checkpoint_every == 0 or index + 1 == stage.steps:
                        checkpoint = save(run, step)
                    if on_step is not None:
                        on_step(stage.name, step, result)
                first += stage.steps
        return checkpoint or save(run, run.done_steps)
    except (TrainingStopped, RankLost, ToldToEnd) as stop:
        raise ended(stop, where, checkpoint=checkpoint) from stop


def ended(stop: BaseException, where: str, *, checkpoint: Path | None) -> TrainingStopped | RankLost:
    """What ended a run, with the place, the last good checkpoint and, where a rank is gone, how to go on."""
    last = "none was written yet" if checkpoint is None else str(checkpoint)
    if isinstance(stop, TrainingStopped):
        return TrainingStopped(f"{where}: {stop}; the last good checkpoint: {last}")
    return RankLost(
        f"{where}: {stop}; the last good checkpoint: {last}; start the same command again with --run.resume"
    )
