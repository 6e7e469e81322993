"""TRL's GRPO on the bounded policy: a script changes one import.

Decides: that completions come from `RolloutEngine` and log-probs from `Replay`, both of the policy of the PEFT model's
active adapter under its budget, and that a run stops where the two disagree (law 1). What a replay must know of a
rollout travels in TRL's own batches. Everything else is TRL's: losses, rewards, advantages, logging, checkpoints.
The reference is the frozen base under the full cache, or, for a model that comes with an adapter, TRL's copy of this
adapter under its budget. Does not know: losses, rewards.

Paper: the cache-aware GRPO objective, whose pi_ref has no D.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn import functional
from trl import GRPOConfig, GRPOTrainer

from pte.integrations.peft import policy_of
from pte.integrations.trl_batch import ReplayRecord, replay_batch
from pte.integrations.trl_checks import (
    check_adapter,
    check_arguments,
    check_base,
    check_left_out,
    check_room,
    check_text,
)
from pte.learn.optimizer import TrainingStopped
from pte.learn.trainer import MAX_GAP
from pte.method.schedule import EvictionSchedule
from pte.rollout.generate import RolloutEngine
from pte.rollout.record import RolloutRequest, logprob_gap
from pte.rollout.replay import Replay

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from jaxtyping import Float, Int
    from peft import PeftConfig, PeftModel
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
    from trl.trainer.grpo_trainer import RewardFunc

    from pte.model.policy import BoundedPolicy

__all__ = ["PTEGRPOTrainer"]


class PTEGRPOTrainer(GRPOTrainer):
    """TRL's `GRPOTrainer` for adapters of peft_type PTE; arguments are TRL's, but for the last two.

    Args:
        model: Name or folder of a base, a base, or a PEFT model with a thought adapter. A name is loaded in bfloat16
            where `args.bf16` is set (TRL's default) and `args.model_init_kwargs` name no dtype.
        reward_funcs: As in TRL.
        args: As in TRL; what the bounded policy cannot do is refused by name.
        train_dataset: As in TRL, text only.
        eval_dataset: Likewise.
        processing_class: Tokenizer.
        reward_processing_classes: As in TRL.
        callbacks: As in TRL.
        optimizers: As in TRL.
        quantization_config: Refused.
        peft_config: `PTEConfig` with the budget, for a model without adapter.
        tools: Refused.
        rollout_func: Refused.
        environment_factory: Refused.
        slots: Completions that run at once; None for all of a generation batch.
        max_logprob_gap: Nats by which rollout and replay may differ at any token before the run stops; None for what
            rounding makes in the base's dtype (`pte.learn.trainer.MAX_GAP`).

    Raises:
        ValueError: An argument, a model or an adapter that cannot be trained like this.
    """

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: RewardFunc | list[RewardFunc] | None = None,
        args: GRPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: object | None = None,
        peft_config: PeftConfig | None = None,
        tools: list[Callable[..., object]] | None = None,
        rollout_func: Callable[..., object] | None = None,
        environment_factory: object | None = None,
        *,
        slots: int | None = None,
        max_logprob_gap: float | None = None,
    ) -> None:
        args = loading_arguments(model, args)
        check_arguments(args)
        check_adapter(model, peft_config, beta=args.beta)
        check_left_out(
            quantization_config=quantization_config,
            tools=tools,
            rollout_func=rollout_func,
            environment_factory=environment_factory,
        )
        check_text(train_dataset, processing_class)
        if max_logprob_gap is not None and not max_logprob_gap > 0:
            raise ValueError(f"max_logprob_gap must be above 0 nats, got {max_logprob_gap}; leave it out")
        super().__init__(
            model=model,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            reward_processing_classes=reward_processing_classes,
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
        )
        self.policy = policy_of(self.accelerator.unwrap_model(self.model))
        check_base(self.policy.base, self.policy.adapter, bf16=bool(args.bf16))
        self.max_logprob_gap = max_logprob_gap or MAX_GAP[self.policy.dtype]
        assert args.steps_per_generation is not None and args.max_completion_length is not None
        self.engine = RolloutEngine(
            self.policy,
            slots=args.per_device_train_batch_size * args.steps_per_generation if slots is None else slots,
            max_new_tokens=args.max_completion_length,
            temperature=self.temperature,
            stop_token_ids=self.eos_token_ids,
        )
        self.record: ReplayRecord | None = None
        self.sampling_logprobs: Tensor | None = None

    def _generate_single_turn(
        self,
        prompt_ids: list[list[int]],
        images: list[object] | None,
        multimodal_fields: dict[str, object],
        num_generations: int,
        has_tool_images: bool = False,
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Completions of the bounded policy and the log-probs that they were drawn with.

        A group's prompts stand side by side, so that each is read once. Seeds come from torch's generator, which TRL
        seeds and whose state its checkpoints keep.

        Raises:
            ValueError: There are images, or a prompt leaves too little room for its completion.
        """
        if images is not None:
            raise ValueError("prompts must be text, got images; use TRL's GRPOTrainer for them")
        check_room(
            prompt_ids,
            max_completion_length=self.engine.max_new_tokens,
            trained=self.policy.base.config.max_position_embeddings,
        )
        seeds = torch.randint(2**63 - 1, (len(prompt_ids),), device="cpu").tolist()
        rollouts = self.engine.run(
            [RolloutRequest(tuple(prompt), seed) for prompt, seed in zip(prompt_ids, seeds, strict=True)]
        )
        self.record = ReplayRecord.of_rollouts(rollouts, device=self.accelerator.device)
        self.note("rollout/evictions", statistics.fmean(rollout.evictions for rollout in rollouts))
        self.note("rollout/state_norm", statistics.fmean(rollout.state_norm for rollout in rollouts))
        self.note("rollout/cache_bytes", float(self.engine.peak_cache_bytes))
        completions = [list(rollout.completion_ids) for rollout in rollouts]
        return completions, [rollout.rollout_logprobs.tolist() for rollout in rollouts]

    def _generate_and_score_completions(self, inputs: list[dict[str, object]]) -> dict[str, Tensor]:
        """TRL's batch, with the record that its replays need.

        Where TRL scores the policy that sampled once more, as it does for several updates on a batch, these log-probs
        are held against the recorded ones here.
        """
        try:
            batch = super()._generate_and_score_completions(inputs)
            assert self.record is not None
            if "old_per_token_logps" in batch:
                self.check_gap(batch["old_per_token_logps"], batch["sampling_per_token_logps"], self.record)
            return {**batch, **self.record.columns()}
        finally:
            self.record = None

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> Float[Tensor, ""]:
        """TRL's loss of a mini-batch, whose record its replay follows.

        Where TRL has no log-probs of the policy that sampled, this policy is still the one: its log-probs are held
        against the recorded ones.
        """
        self.record = ReplayRecord.of_columns(inputs)
        self.sampling_logprobs = None if "old_per_token_logps" in inputs else inputs["sampling_per_token_logps"]
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self.record = self.sampling_logprobs = None

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Int[Tensor, "batch tokens"],
        attention_mask: Int[Tensor, "batch tokens"],
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **_of_other_models: object,
    ) -> tuple[Float[Tensor, "batch completion"], Float[Tensor, "batch completion"] | None, None]:
        """Log-probs of the completions by the bounded replay, their entropies where asked for, no auxiliary loss."""
        assert self.record is not None, "TRL scores completions outside of its batches now"
        policy = self.scored_policy(model)
        replay = Replay(policy, gradient_checkpointing=bool(self.args.gradient_checkpointing))
        batch = replay_batch(input_ids, attention_mask[:, :-logits_to_keep], self.record, temperature=self.temperature)
        rows = torch.arange(len(input_ids), device=input_ids.device)
        outputs = [replay(batch.take(part)) for part in rows.split(batch_size or len(rows))]
        padding = (0, logits_to_keep - batch.completion_ids.shape[1])
        logprobs = functional.pad(torch.cat([output.policy_logprobs for output in outputs]), padding)
        if self.sampling_logprobs is not None:
            self.check_gap(logprobs, self.sampling_logprobs, self.record)
        if not compute_entropy:
            return logprobs, None, None
        return logprobs, functional.pad(torch.cat([output.entropies for output in outputs]), padding), None

    def scored_policy(self, model: nn.Module) -> BoundedPolicy:
        """The policy that TRL means by a model: the one that is trained, or the reference.

        While it disables the adapters it means the frozen base, which the paper's pi_ref is, without a budget; while
        it makes its copy of a given adapter active, that copy.
        """
        policy = policy_of(self.accelerator.unwrap_model(model))
        return policy if policy.adapter is not None else policy.with_cache(EvictionSchedule(None))

    def check_gap(
        self,
        policy_logprobs: Float[Tensor, "batch completion"],
        sampling_logprobs: Float[Tensor, "batch completion"],
        record: ReplayRecord,
    ) -> None:
        """Notes how far replay and rollout are apart.

        Raises:
            TrainingStopped: Further than `max_logprob_gap`; nothing was updated with this batch.
        """
        columns = torch.arange(policy_logprobs.shape[1], device=policy_logprobs.device)
        gap = logprob_gap(
            policy_logprobs, sampling_logprobs, completion_mask=columns < record.completion_lengths[:, None]
        )
        for name, value in (("max", gap.max), ("mean", gap.mean), ("kl", gap.kl)):
            self.note(f"sampling/sampling_logp_difference/{name}", value)
        if not gap.max <= self.max_logprob_gap:
            raise TrainingStopped(
                f"rollout and replay must agree within max_logprob_gap ({self.max_logprob_gap:g} nats), got "
                f"{gap.max:.3g} (mean {gap.mean:.3g}): they are not the same policy; raise max_logprob_gap of "
                f"PTEGRPOTrainer only if the dtype explains it"
            )

    def note(self, name: str, value: float) -> None:
        """Adds a value to TRL's metrics, which it averages over its logging steps."""
        assert self.model is not None
        self._metrics["train" if self.model.training else "eval"][name].append(value)


def loading_arguments(model: str | PreTrainedModel | PeftModel, args: GRPOConfig | None) -> GRPOConfig:
    """TRL's arguments, under which a base that is loaded by name gets the dtype that `bf16` asks for.

    TRL loads float32 and casts while it computes. A frozen base computes the same when it lies in bfloat16, in half
    the memory; the adapter's parameters are float32 all the same.

    Args:
        model: As the script gives it.
        args: As the script gives them, left as they are; None for TRL's defaults.
    """
    if args is None:
        name = model if isinstance(model, str) else str(model.config.name_or_path)
        args = GRPOConfig(f"{Path(name).name}-GRPO")
    if not isinstance(model, str) or not args.bf16:
        return args
    args = copy.copy(args)
    given = args.model_init_kwargs or {}
    assert not isinstance(given, str), "TRL parses what a command line gave it"
    args.model_init_kwargs = {"dtype": "bfloat16", **given}
    return args
