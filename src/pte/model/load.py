"""Loading a Transformers causal LM and its tokenizer, and saying what is not supported before any work.

Decides: which architectures run under the bounded cache (`SUPPORTED`), with dtype and device explicit, the base
frozen and in evaluation mode. Remote code runs only when the caller asks for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from pte.method.adapter import LINEAR_MAPS
from pte.method.cache import CacheShape
from pte.method.float8 import FLOAT8, MULTIPLE_OF, Float8Linear, float8_refusal

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

SUPPORTED = ("qwen2", "qwen3", "llama", "mistral")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def check_supported(config: PreTrainedConfig) -> None:
    """Refuses, by name, a model that the bounded cache cannot run exactly.

    Raises:
        ValueError: An encoder-decoder, an unknown architecture, sliding-window or linear-attention layers, or rotary
            embeddings whose angles depend on the sequence length.
    """
    name = config.model_type
    remedy = f"use a model of type {', '.join(SUPPORTED)}"
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"model type {name!r} is an encoder-decoder, and only decoders are supported; {remedy}")
    layer_types = set(getattr(config, "layer_types", None) or ())
    if "linear_attention" in layer_types:
        raise ValueError(f"model type {name!r} has linear-attention layers, which have no keys to evict; {remedy}")
    if name not in SUPPORTED:
        raise ValueError(f"model type {name!r} is not supported: no test shows that its cache is exact; {remedy}")
    if layer_types - {"full_attention"} or (name == "mistral" and config.sliding_window is not None):
        raise ValueError(
            f"model type {name!r} with sliding-window layers (sliding_window={config.sliding_window}) is not "
            f"supported: its own window would evict beside ours; {remedy} without sliding_window"
        )
    rope_type = config.rope_parameters["rope_type"]
    if rope_type not in ROPE_TYPES:
        raise ValueError(
            f"rotary embedding of type {rope_type!r} is not supported: its angles depend on the sequence length, so "
            f"stored keys would not fit later queries; use one of {', '.join(ROPE_TYPES)}"
        )


def check_positions(
    config: PreTrainedConfig,
    *,
    prompt_tokens: int,
    completion_tokens: int,
    allow_beyond_trained_positions: bool,
) -> None:
    """Refuses sequences longer than the positions that the base was trained on.

    Raises:
        ValueError: Prompt plus completion is longer, and the caller has not allowed it by name.
    """
    trained = config.max_position_embeddings
    if prompt_tokens + completion_tokens > trained and not allow_beyond_trained_positions:
        raise ValueError(
            f"prompt plus completion must stay within the model's {trained} trained positions, got {prompt_tokens} + "
            f"{completion_tokens} tokens; lower max_new_tokens to {max(trained - prompt_tokens, 0)} or set "
            f"allow_beyond_trained_positions"
        )


def load_base(
    path: str | Path, *, dtype: torch.dtype, device: torch.device | str, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A frozen causal LM in evaluation mode.

    Args:
        path: Directory with a Transformers checkpoint, or a hub name.
        dtype: Of the weights; float8_e4m3fn for linear maps in float8 (`round_to_float8`) and all else in bfloat16.
        device: Where the weights lie.
        trust_remote_code: Run code that the checkpoint brings along.

    Raises:
        ValueError: The model is not supported (`check_supported`), or the device does not compute in float8.
        OSError: No checkpoint there.
    """
    if dtype == FLOAT8 and (reason := float8_refusal(torch.device(device))) is not None:
        raise ValueError(reason)
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    check_supported(config)
    base = AutoModelForCausalLM.from_pretrained(
        path,
        config=config,
        dtype=torch.bfloat16 if dtype == FLOAT8 else dtype,
        trust_remote_code=trust_remote_code,
        use_safetensors=True,
    )
    freeze(base)
    if dtype == FLOAT8:
        round_to_float8(base, device)
    base.to(device)  # type: ignore[arg-type]
    return base


def round_to_float8(base: PreTrainedModel, device: torch.device | str) -> None:
    """Makes the linear maps of all layers float8, one after the other, so that no device ever holds two copies.

    What it computes is another model than before, near it; policies of it keep keys and values in float8 as well.

    Args:
        base: Frozen, without an adapter.
        device: Where the maps are rounded, and lie from then on.

    Raises:
        ValueError: The device cannot multiply float8, or not with maps of these sizes; the maps are not plain ones.
    """
    target = torch.device(device)
    if (reason := float8_refusal(target)) is not None:
        raise ValueError(reason)
    for linear in linear_maps(base):
        if not isinstance(linear, nn.Linear):
            raise ValueError(
                f"float8 is made of plain torch.nn.Linear, got {type(linear).__name__}; round a base once, and before "
                f"an adapter is attached"
            )
        sizes = (linear.in_features, linear.out_features)
        if target.type == "cuda" and any(size % MULTIPLE_OF for size in sizes):
            raise ValueError(
                f"dtype float8 needs linear maps whose sizes are multiples of {MULTIPLE_OF} on a GPU, got "
                f"{sizes[0]} x {sizes[1]}; use dtype bfloat16"
            )
    for layer in base.get_decoder().layers:
        for block, names in ((layer.self_attn, LINEAR_MAPS[:4]), (layer.mlp, LINEAR_MAPS[4:])):
            for name in names:
                setattr(block, name, Float8Linear(getattr(block, name).to(target)))


def load_cache_shape(path: str | Path, *, trust_remote_code: bool = False) -> CacheShape:
    """What one token costs in a checkpoint's cache, from its configuration alone.

    Args:
        path: Directory with a Transformers checkpoint, or a hub name.
        trust_remote_code: Run code that the checkpoint brings along.

    Raises:
        ValueError: The model is not supported (`check_supported`).
        OSError: No checkpoint there.
    """
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    check_supported(config)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return CacheShape(layers=config.num_hidden_layers, kv_heads=config.num_key_value_heads, head_dim=head_dim)


def freeze(base: PreTrainedModel) -> PreTrainedModel:
    """The same model, checked, frozen and in evaluation mode."""
    check_supported(base.config)
    for linear in linear_maps(base):
        if type(linear) is not nn.Linear:
            raise ValueError(
                f"the base's linear maps must be plain torch.nn.Linear, got {type(linear).__name__}; load the model "
                f"without quantisation and without another adapter"
            )
    base.requires_grad_(False)
    return base.eval()


def dtype_named(name: str) -> torch.dtype:
    """The dtype that `load_base` takes, from its name in a configuration."""
    dtype = FLOAT8 if name == "float8" else getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def linear_maps(base: PreTrainedModel) -> list[nn.Module]:
    """Linear maps of all layers."""
    return [
        module
        for layer in base.get_decoder().layers
        for block, names in ((layer.self_attn, LINEAR_MAPS[:4]), (layer.mlp, LINEAR_MAPS[4:]))
        for module in (getattr(block, name) for name in names)
    ]


def end_token_ids(base: PreTrainedModel) -> tuple[int, ...]:
    """End tokens that the checkpoint's generation settings name; instruction-tuned models often have several."""
    named = None if base.generation_config is None else base.generation_config.eos_token_id
    if named is None:
        return ()
    return tuple(named) if isinstance(named, list) else (int(named),)


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer beside a checkpoint.

    Raises:
        ValueError: It has no end token, without which no rollout could stop.
    """
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer must have an end token, got none in {str(path)!r}; set eos_token in tokenizer_config.json"
        )
    return tokenizer
