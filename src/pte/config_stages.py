"""The stages of a run: rollouts, warm start, GRPO, evaluation, one frozen dataclass each.

Decides: their fields, defaults and rules; part of `config.py`, which see. The numbers that the paper gives are its
hyper-parameters: rank 32, learning rate 1e-5, maximal gradient norm 1.0. The numbers without a source are plain
starting points, not findings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pte.config_rules import check_types, require, require_above_zero, require_at_least

GradientMode = Literal["chain", "exact", "horizon"]
Decay = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class RolloutConfig:
    """Sampling in training. Evaluation has its own temperature and length."""

    temperature: float = 1.0
    """Of the sampling distribution, which is also the distribution that is scored."""
    max_new_tokens: int = 1024
    """Completion tokens at most; longer completions are cut off."""
    slots: int = 64
    """Sequences decoded at once; a finished one makes room for the next."""

    def __post_init__(self) -> None:
        check_types(self)
        require_above_zero(
            "temperature",
            value=self.temperature,
            remedy="use 1.0 (greedy rollouts leave nothing to learn from; eval.temperature may be 0)",
        )
        require_at_least(1, "max_new_tokens", value=self.max_new_tokens, remedy="use for example 1024")
        require_at_least(1, "slots", value=self.slots, remedy="use for example 64")


@dataclass(frozen=True)
class DistillConfig:
    """The warm start: the bounded policy learns from the full cache, on right traces or the base's own rollouts."""

    steps: int = 500
    """Optimizer steps; 0 for no warm start."""
    batch_size: int = 16
    """Traces in an optimizer step."""
    source: Literal["traces", "teacher"] = "traces"
    """`traces`: the task's right traces; `teacher`: rollouts of the base with its full cache."""
    learning_rate: float = 1e-3
    """After the warm-up."""
    warmup_steps: int = 20
    """Steps over which the learning rate rises from 0."""
    decay: Decay = "constant"
    """What the learning rate does after the warm-up."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    micro_batch_size: int = 16
    """Sequences in one replay; smaller needs less memory."""
    gradient_mode: GradientMode = "chain"
    """`chain`: through all states; `exact`: through older keys and values too; `horizon`: the last evictions."""
    horizon: int = 1
    """Evictions that the gradient passes through, with gradient_mode `horizon`."""
    gradient_checkpointing: bool = False
    """Compute each layer again in the backward pass, for updates that do not fit: less memory, one more forward."""

    def __post_init__(self) -> None:
        check_types(self)
        _check_optimisation(self)
        require_at_least(1, "batch_size", value=self.batch_size, remedy="use for example 16")


@dataclass(frozen=True)
class TrainConfig:
    """GRPO on rollouts of the bounded policy."""

    steps: int = 100
    """Batches of rollouts; 0 for no GRPO stage."""
    prompts_per_step: int = 8
    """Prompts in a batch of rollouts."""
    group_size: int = 8
    """Completions of each prompt; advantages are taken within the group."""
    minibatches_per_step: int = 1
    """Optimizer steps on each batch of rollouts; divides prompts_per_step * group_size."""
    micro_batch_size: int = 8
    """Sequences in one replay; smaller needs less memory."""
    loss: Literal["grpo", "dr_grpo", "dapo", "gspo"] = "grpo"
    """How token losses are weighed and clipped."""
    clip_low: float = 0.2
    """The ratio's lower clip is 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio's upper clip is 1 + clip_high."""
    kl_beta: float = 0.0
    """Weight of the KL divergence to the frozen base; 0 skips the reference."""
    reference: Literal["full", "bounded"] = "full"
    """Cache of the frozen base in the KL term."""
    learning_rate: float = 1e-5
    """After the warm-up. The paper uses 1e-5."""
    warmup_steps: int = 0
    """Optimizer steps over which the learning rate rises from 0."""
    decay: Decay = "constant"
    """What the learning rate does after the warm-up."""
    weight_decay: float = 0.0
    """Of AdamW."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm. The paper uses 1.0."""
    gradient_mode: GradientMode = "chain"
    """`chain`: through all states; `exact`: through older keys and values too; `horizon`: the last evictions."""
    horizon: int = 1
    """Evictions that the gradient passes through, with gradient_mode `horizon`."""
    gradient_checkpointing: bool = False
    """Compute each layer again in the backward pass, for updates that do not fit: less memory, one more forward."""
    dynamic_sampling: bool = False
    """Replace groups that are all right or all wrong by groups of further prompts."""
    max_resample_rounds: int = 3
    """Rounds of further prompts at most, with dynamic_sampling."""
    max_logprob_gap: float | None = None
    """The run stops when rollout and replay differ by more nats on a token; unset for the dtype's own threshold."""
    checkpoint_every: int = 50
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept."""
    log_completions: bool = True
    """Write every completion to completions.jsonl."""

    def __post_init__(self) -> None:
        check_types(self)
        _check_optimisation(self)
        for name in ("prompts_per_step", "minibatches_per_step", "checkpoint_every", "keep_checkpoints"):
            require_at_least(1, name, value=getattr(self, name), remedy="use 1 or more")
        require_at_least(
            2,
            "group_size",
            value=self.group_size,
            remedy="use for example 8 (a group of one has no advantage)",
        )
        completions = self.prompts_per_step * self.group_size
        require(
            completions % self.minibatches_per_step == 0,
            "minibatches_per_step",
            rule=f"divide prompts_per_step * group_size ({completions})",
            value=self.minibatches_per_step,
            remedy="use 1 or another divisor",
        )
        require(
            0 < self.clip_low <= 1,
            "clip_low",
            rule="be above 0, at most 1",
            value=self.clip_low,
            remedy="use 0.2",
        )
        require_above_zero("clip_high", value=self.clip_high, remedy="use 0.2, or 0.28 with dapo")
        require_at_least(0, "kl_beta", value=self.kl_beta, remedy="use 0 for no KL term")
        require_at_least(0, "weight_decay", value=self.weight_decay, remedy="use 0.0")
        require_at_least(0, "max_resample_rounds", value=self.max_resample_rounds, remedy="use for example 3")
        require_above_zero("max_logprob_gap", value=self.max_logprob_gap, remedy="leave it out for the dtype's own")


@dataclass(frozen=True)
class EvalConfig:
    """Scoring on held-out problems."""

    problems: int | None = 512
    """Problems at most, the first ones of each set; unset for all (generated ones have no end and need a number)."""
    samples_per_problem: int = 1
    """Completions of each problem: avg@k and pass@k."""
    temperature: float = 0.0
    """Of the sampling distribution; 0 is greedy."""
    max_new_tokens: int = 1024
    """Completion tokens at most."""
    pass_at: tuple[int, ...] = (1,)
    """Each k of pass@k, at most samples_per_problem."""
    state_control: Literal["own", "zeroed", "shuffled"] = "own"
    """As a control: all states zero, or each sequence reading its neighbour's state."""

    def __post_init__(self) -> None:
        check_types(self)
        require_at_least(1, "problems", value=self.problems, remedy="use for example 512")
        require_at_least(1, "samples_per_problem", value=self.samples_per_problem, remedy="use for example 16")
        require_at_least(0, "temperature", value=self.temperature, remedy="use 0 for greedy decoding")
        require_at_least(1, "max_new_tokens", value=self.max_new_tokens, remedy="use for example 1024")
        require(
            self.temperature > 0 or self.samples_per_problem == 1,
            "samples_per_problem",
            rule="be 1 at temperature 0 (greedy samples are all the same)",
            value=self.samples_per_problem,
            remedy="use temperature 1.0",
        )
        require(
            bool(self.pass_at) and all(1 <= k <= self.samples_per_problem for k in self.pass_at),
            "pass_at",
            rule=f"hold numbers from 1 to samples_per_problem ({self.samples_per_problem})",
            value=self.pass_at,
            remedy="raise samples_per_problem or lower pass_at",
        )


def _check_optimisation(stage: DistillConfig | TrainConfig) -> None:
    """The rules that both stages share."""
    require_at_least(0, "steps", value=stage.steps, remedy="use 0 to skip the stage")
    require_at_least(1, "micro_batch_size", value=stage.micro_batch_size, remedy="use for example 8")
    require_above_zero("learning_rate", value=stage.learning_rate, remedy="use for example 1e-5")
    require_at_least(0, "warmup_steps", value=stage.warmup_steps, remedy="use 0 for no warm-up")
    require_above_zero("max_grad_norm", value=stage.max_grad_norm, remedy="use 1.0")
    require_at_least(1, "horizon", value=stage.horizon, remedy="use for example 4")
