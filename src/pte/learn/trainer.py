"""A run: warm start, then GRPO, with a log line and a possible checkpoint after every step.

Decides: what is built from a configuration (`build_run`), the one counter of steps that both stages share, what is
written when, and how a run goes on after it was killed: everything random is a function of the seed and the step, so
adapter, optimizer and a few counters are all that a checkpoint needs.
Does not know: what a step does (`distill`, `grpo`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pte.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from pte.learn.distill import DistillStage
from pte.learn.grpo import GrpoStage
from pte.learn.loss import PolicyObjective
from pte.learn.optimizer import AdapterOptimizer, TrainingStopped
from pte.learn.stage import Stage, StepResult
from pte.method.schedule import EvictionSchedule
from pte.rollout.generate import RolloutEngine
from pte.rollout.replay import Replay
from pte.run_record import MetricsLog, check_resumed_config, open_run_directory, save_record
from pte.session import Session, check_problems, open_session

if TYPE_CHECKING:
    from pte.config import DistillConfig, ExperimentConfig, TrainConfig
    from pte.model.policy import BoundedPolicy

CHECKPOINTS = "checkpoints"
MAX_GAP = {torch.float32: 1e-3, torch.float64: 1e-3, torch.bfloat16: 1.0, torch.float16: 1.0}
"""Nats. Rounding alone makes 1e-5 in float32, 1e-4 on a sharply trained base, tenths in half precision; another
policy than the one that sampled shows tenths in the mean."""


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
                optimizer=make_optimizer(policy, config.distill, weight_decay=0.0, updates_per_step=1),
                steps=config.distill.steps,
                batch_size=config.distill.batch_size,
                micro_batch_size=config.distill.micro_batch_size,
                source=config.distill.source,
                temperature=config.rollout.temperature,
                max_new_tokens=config.rollout.max_new_tokens,
                slots=config.rollout.slots,
                seed=config.run.seed,
                allow_beyond_trained_positions=config.model.allow_beyond_trained_positions,
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
            policy, train, weight_decay=train.weight_decay, updates_per_step=train.minibatches_per_step
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
        max_logprob_gap=train.max_logprob_gap or MAX_GAP[policy.dtype],
        seed=config.run.seed,
        log_completions=train.log_completions,
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
    policy: BoundedPolicy, stage: DistillConfig | TrainConfig, *, weight_decay: float, updates_per_step: int
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
    )


def open_run(config: ExperimentConfig) -> Run:
    """Builds a run, or the one that is resumed, up to its last checkpoint.

    Raises:
        FileExistsError, FileNotFoundError: The run directory is taken, or there is none to resume.
        ValueError: The configuration, the model, the data or the checkpoint do not fit.
    """
    config.check_trainable()
    session = open_session(config)
    stages = build_stages(session, config)
    if not stages:
        raise ValueError("a run must have steps, got 0 in distill and in train; set distill.steps or train.steps")
    check_problems(session, config)
    check_trackers(config.run.log_with)
    directory = open_run_directory(Path(config.run.output_dir) / config.run.name, resume=config.run.resume)
    run = Run(config=config, session=session, stages=stages, directory=directory)
    if config.run.resume:
        check_resumed_config(directory, config)
        restore(run)
    else:
        save_record(directory, config)
    return run


def check_trackers(names: Sequence[str]) -> None:
    """Refuses trackers that are not installed; accelerate would leave them out.

    Raises:
        ValueError: A package is missing.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"run.log_with must name installed trackers, got {name!r}; pip install {name}")


def restore(run: Run) -> None:
    """Puts adapter, optimizer and counters back to the last checkpoint, if one was written."""
    path = latest_checkpoint(run.directory / CHECKPOINTS)
    if path is None:
        return
    checkpoint = load_checkpoint(path)
    run.session.load_adapter_tensors(checkpoint.adapter, checkpoint.metadata)
    run.done_steps = checkpoint.step
    for stage in run.stages:
        state = checkpoint.training_state.get(stage.name)
        if isinstance(state, dict):
            stage.load_state(state)  # type: ignore[arg-type]


def save(run: Run, step: int) -> Path:
    """Writes a checkpoint after `step` steps."""
    return save_checkpoint(
        run.directory / CHECKPOINTS,
        step,
        adapter=run.session.adapter_tensors(),
        metadata=run.session.metadata(),
        training_state={stage.name: stage.state() for stage in run.stages},
        keep=run.config.train.keep_checkpoints,
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
    """
    metrics = MetricsLog(run.directory / "metrics.jsonl", done_steps=run.done_steps)
    completions = MetricsLog(run.directory / "completions.jsonl", done_steps=run.done_steps)
    checkpoint = latest_checkpoint(run.directory / CHECKPOINTS)
    first = 0
    with open_trackers(run) as track:
        for stage in run.stages:
            for index in range(max(0, run.done_steps - first), stage.steps):
                step = first + index + 1
                try:
                    result = stage.step(index)
                except TrainingStopped as stop:
                    last = "none was written yet" if checkpoint is None else str(checkpoint)
                    raise TrainingStopped(
                        f"step {step} ({stage.name}): {stop}; the last good checkpoint: {last}"
                    ) from stop
                metrics.append(step, [{"stage": stage.name, **result.metrics}])
                if result.completions:
                    completions.append(step, result.completions)
                track({f"{stage.name}/{key}": value for key, value in result.metrics.items()}, step)
                if step % run.config.train.checkpoint_every == 0 or index + 1 == stage.steps:
                    checkpoint = save(run, step)
                if on_step is not None:
                    on_step(stage.name, step, result)
            first += stage.steps
    return checkpoint or save(run, run.done_steps)


class open_trackers:
    """TensorBoard, W&B or trackio through accelerate; nothing when none is asked for.

    Args:
        run: Whose configuration names the trackers.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.accelerator = None

    def __enter__(self) -> Callable[[Mapping[str, float], int], None]:
        """A function that logs metrics of a step."""
        log_with = self.run.config.run.log_with
        if not log_with:
            return lambda metrics, step: None
        from accelerate import Accelerator

        accelerator = Accelerator(log_with=list(log_with), project_dir=str(self.run.directory), cpu=True)
        accelerator.init_trackers(self.run.config.run.name)
        self.accelerator = accelerator
        return lambda metrics, step: accelerator.log(dict(metrics), step=step)

    def __exit__(self, *_: object) -> None:
        """Closes the trackers."""
        if self.accelerator is not None:
            self.accelerator.end_training()
