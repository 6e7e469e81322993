"""What a TRL script may ask of `PTEGRPOTrainer`, and what it is told where it may not.

Decides: the arguments that would make the policy that learns another one than the policy that sampled, or that would
be passed over. Each is refused by its name in TRL, with the remedy, before a model is loaded or anything is trained.
What is not named here works as in TRL. Does not know: how completions are made and scored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING

import torch
from accelerate import DistributedType
from peft import PeftModel
from transformers import ProcessorMixin

from pte.integrations.peft_config import PTEConfig
from pte.integrations.peft_tuner import PTEModel
from pte.peft_folder import PEFT_TYPE
from pte.rollout.sampling import check_temperature

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from peft import PeftConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl import GRPOConfig

    from pte.method.adapter import ThoughtAdapter

TRL_VERSIONS = "1.16."

FULL_DISTRIBUTION = "be {allowed}: the scored distribution must be the sampled one"
ONE_POLICY = "be {allowed}: completions come from the bounded cache of pte.RolloutEngine"

REFUSED: Mapping[str, tuple[tuple[object, ...], str, str]] = {
    "use_vllm": ((False,), ONE_POLICY, "leave it out"),
    "use_transformers_continuous_batching": ((False,), ONE_POLICY, "leave it out: slots are refilled as they are free"),
    "use_transformers_paged": ((False,), ONE_POLICY, "leave it out"),
    "cache_implementation": ((None,), ONE_POLICY, "leave it out"),
    "generation_kwargs": ((None, {}), ONE_POLICY, "set temperature and max_completion_length"),
    "top_p": ((1.0,), FULL_DISTRIBUTION, "set temperature alone"),
    "top_k": ((0, None), FULL_DISTRIBUTION, "set temperature alone"),
    "min_p": ((None, 0.0), FULL_DISTRIBUTION, "set temperature alone"),
    "repetition_penalty": ((1.0,), FULL_DISTRIBUTION, "set temperature alone"),
    "sync_ref_model": (
        (False,),
        "be {allowed}: an adapter that depends on the sequence cannot be merged into a reference",
        "leave it out",
    ),
    "entropy_coef": ((0.0,), "be {allowed}: the replay gives entropies without a gradient", "leave it out"),
    "use_adaptive_entropy": ((False,), "be {allowed}: the replay gives entropies without a gradient", "leave it out"),
    "use_liger_kernel": ((False,), "be {allowed}: the replay runs the base's own layers", "leave it out"),
    "torch_compile": ((False,), "be {allowed}: the replay does not call the model's forward", "leave it out"),
    "neftune_noise_alpha": (
        (None,),
        "be {allowed}: noise on the embeddings makes two policies of rollout and replay",
        "leave it out",
    ),
    "cast_lm_head_to_fp32": (
        (False,),
        "be {allowed}: it changes the base; log-probs are computed in float32 from the head's logits",
        "leave it out, or load the base in float32",
    ),
    "fp16": ((False,), "be {allowed}: gradients of states overflow in half precision", "set bf16=True"),
    **dict.fromkeys(
        ("bf16_full_eval", "fp16_full_eval"),
        ((False,), "be {allowed}: it casts the base and the adapter, which is trained in float32", "leave it out"),
    ),
    "fsdp": ((None, "", []), "be {allowed}: one process trains", "leave it out"),
    "deepspeed": ((None,), "be {allowed}: one process trains", "leave it out"),
}
"""Argument of `GRPOConfig`: values that are taken, the rule, the remedy."""


def check_trl_version(found: str) -> None:
    """Refuses a TRL that the trainer was never tried with.

    Raises:
        ImportError: It is another version.
    """
    if not found.startswith(TRL_VERSIONS):
        raise ImportError(
            f"PTEGRPOTrainer needs trl {TRL_VERSIONS}*, got {found}; in the checkout of pte run pip install -e '.[trl]'"
        )


def check_arguments(args: GRPOConfig) -> None:
    """Refuses what the bounded policy cannot do.

    Raises:
        ValueError: An argument of `REFUSED` has another value, nothing can be drawn at the temperature, completions
            have no end, a dtype has a name that TRL passes over, or a launcher or DeepSpeed is at work.
    """
    for name, (allowed, rule, remedy) in REFUSED.items():
        value = getattr(args, name)
        if value not in allowed:
            raise ValueError(f"{name} must {rule.format(allowed=repr(allowed[0]))}, got {value!r}; {remedy}")
    if args.temperature == 0:
        raise ValueError(
            "temperature must be above 0: a group of equal completions has no advantages, got 0; use for example 1.0"
        )
    check_temperature(args.temperature)
    if args.max_completion_length is None:
        raise ValueError("max_completion_length must be a number of tokens, got None; use for example 1024")
    loading = args.model_init_kwargs or {}
    if "torch_dtype" in loading:
        assert not isinstance(loading, str), "TRL parses what a command line gave it"
        raise ValueError(
            f"model_init_kwargs must name the dtype as 'dtype', because TRL passes over 'torch_dtype', got "
            f"{loading['torch_dtype']!r}; write model_init_kwargs={{'dtype': ...}}"
        )
    launched = args.distributed_state.distributed_type
    if launched != DistributedType.NO or args.deepspeed_plugin is not None:
        raise ValueError(
            f"PTEGRPOTrainer runs in one process without a launcher, got {launched.value} with {args.world_size}: the "
            f"replay is not the forward that wrappers average and gather for; start the script with python, with one "
            f"GPU visible"
        )


def check_adapter(model: str | PreTrainedModel | PeftModel, peft_config: PeftConfig | None, *, beta: float) -> None:
    """Refuses a model that would not have a thought adapter to train.

    Args:
        model: As the script gives it.
        peft_config: Likewise.
        beta: Weight of the KL term, for which TRL copies the adapter `default`.

    Raises:
        ValueError: No thought adapter, one from both sides, a frozen one, or one that TRL's reference would not be of.
    """
    if isinstance(model, PeftModel):
        if not isinstance(model.base_model, PTEModel):
            raise ValueError(
                f"the model's adapter must be of peft_type {PEFT_TYPE}, got {type(model.base_model).__name__}; pass "
                f"the base and peft_config=PTEConfig(), or use TRL's GRPOTrainer"
            )
        if peft_config is not None:
            raise ValueError(
                "peft_config must be left out with a model that has an adapter, got both; pass the base with "
                "peft_config, or the PeftModel alone"
            )
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError(
                "the model's adapter must be trainable, got a frozen one; load it with "
                "PeftModel.from_pretrained(base, folder, is_trainable=True)"
            )
        if beta != 0 and model.active_adapter != "default":
            raise ValueError(
                f"with beta above 0 the adapter that is trained must be named 'default', which TRL copies as "
                f"reference, got {model.active_adapter!r}; load it under that name"
            )
    elif not isinstance(peft_config, PTEConfig):
        given = "none" if peft_config is None else type(peft_config).__name__
        raise ValueError(
            f"PTEGRPOTrainer needs an adapter of peft_type {PEFT_TYPE} with its budget, got {given}; pass "
            f"peft_config=PTEConfig(window_tokens=1024, evict_tokens=256), or a PeftModel with such an adapter"
        )


def check_left_out(**given: object) -> None:
    """Refuses arguments of TRL's constructor that stand for more than one completion to one prompt of text.

    Raises:
        ValueError: One of them is set.
    """
    for name, value in given.items():
        if value is not None and value != []:
            raise ValueError(
                f"{name} must be left out of PTEGRPOTrainer, got {value!r}: one completion to one prompt of text by "
                f"an unquantised base is what it samples and replays; use TRL's GRPOTrainer for it"
            )


def check_text(
    train_dataset: Dataset | IterableDataset | None, processing_class: PreTrainedTokenizerBase | ProcessorMixin | None
) -> None:
    """Refuses prompts that are more than text.

    Raises:
        ValueError: The data have images, or what processes them does.
    """
    columns = set(getattr(train_dataset, "column_names", None) or ()) & {"image", "images"}
    if columns or isinstance(processing_class, ProcessorMixin):
        given = f"column {columns.pop()!r}" if columns else type(processing_class).__name__
        raise ValueError(f"prompts must be text, got {given}; leave images out, or use TRL's GRPOTrainer for them")


def check_base(base: PreTrainedModel, adapter: ThoughtAdapter | None, *, bf16: bool) -> None:
    """Refuses a base on which TRL's arguments would not be what they say.

    Args:
        base: As it was loaded and placed.
        adapter: That is trained.
        bf16: TRL's argument.

    Raises:
        ValueError: bf16 is asked of weights that are not, the base is spread over devices, or nothing is active.
    """
    if adapter is None:
        raise ValueError("the adapter that is trained must be enabled, got a disabled one; leave disable_adapter()")
    if bf16 and base.dtype != torch.bfloat16:
        raise ValueError(
            f"bf16=True (TRL's default) computes in bfloat16, and rollout and replay compute in the base's own dtype, "
            f"got a base in {base.dtype}; load it with dtype=torch.bfloat16, or set bf16=False"
        )
    devices = sorted({str(parameter.device) for parameter in base.parameters()})
    if len(devices) > 1:
        raise ValueError(
            f"the base must lie on one device, got {', '.join(devices)}; set model_init_kwargs={{'device_map': None}}, "
            f"or make one GPU visible"
        )


def check_room(prompt_ids: Sequence[Sequence[int]], *, max_completion_length: int, trained: int) -> None:
    """Refuses prompts that leave too little room for their completions.

    Args:
        prompt_ids: Of a batch.
        max_completion_length: TRL's argument.
        trained: Positions that the base was trained on.

    Raises:
        ValueError: The longest prompt with its completion would go beyond them.
    """
    longest = max(map(len, prompt_ids))
    if longest + max_completion_length > trained:
        raise ValueError(
            f"prompt plus max_completion_length must stay within the base's {trained} trained positions, got {longest} "
            f"+ {max_completion_length} tokens; set max_completion_length={max(trained - longest, 1)} or less, or "
            f"leave longer prompts out of the dataset"
        )


check_trl_version(version("trl"))
