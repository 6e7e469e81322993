"""Tiny random models of every supported architecture, and adapters whose update is far from zero."""

from __future__ import annotations

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from pte.method.adapter import ThoughtAdapter
from pte.method.eviction.window import OldestFirst
from pte.method.schedule import EvictionSchedule
from pte.method.thought import GLOBAL_TOKEN_SIZE
from pte.model.load import freeze
from pte.model.policy import BoundedPolicy, attach_adapter, layer_sizes

ARCHITECTURES = ("qwen2", "qwen3", "llama", "mistral")
VOCAB = 29


def tiny_base(architecture="qwen2", *, seed=0, dtype=torch.float64, tied=False, layers=2, **changes):
    """A frozen random model: hidden 16, 4 query heads on 2 key heads of 4 (8 for Qwen3, which frees head_dim)."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": tied,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **changes,
    }
    kinds = {
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
        "mistral": (MistralConfig, MistralForCausalLM),
    }
    config_class, model_class = kinds[architecture]
    if architecture == "qwen3":
        settings["head_dim"] = 8
    if architecture == "mistral":
        settings["sliding_window"] = None
    model = model_class(config_class(**settings))
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "norm.weight", "layernorm.weight")):
            torch.nn.init.normal_(parameter, mean=float("bias" not in name), std=0.3)
    return freeze(model.to(dtype))


def tiny_policy(
    architecture="qwen2",
    *,
    window=8,
    block=4,
    eviction=None,
    kind="thought",
    dtype=torch.float64,
    up_std=0.3,
    seed=0,
    base=None,
    **options,
):
    """A bounded policy whose adapter changes the model visibly; parameters in the base's dtype for exact tests."""
    base = tiny_base(architecture, dtype=dtype) if base is None else base
    adapter = None
    if kind is not None:
        settings = {"rank": 4, "global_tokens": 3, "seed": seed, **options}
        adapter = ThoughtAdapter(layer_sizes(base), kind=kind, **settings)
        generator = torch.Generator().manual_seed(seed + 1)
        for name, parameter in adapter.named_parameters():
            if name.endswith(".up"):
                parameter.data = torch.randn(parameter.shape, generator=generator) * up_std
            elif name.endswith("global_tokens"):
                parameter.data /= GLOBAL_TOKEN_SIZE
        if dtype == torch.float64:
            adapter.double()
        attach_adapter(base, adapter)
    schedule = EvictionSchedule(None) if window is None else EvictionSchedule(window, block)
    return BoundedPolicy(base, adapter, schedule, eviction or OldestFirst())


def random_sequences(count, *, prompt=(3, 7), completion=(9, 30), seed=0):
    """Ragged prompts and completions of random tokens."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(low, high):
        length = int(torch.randint(low, high + 1, (1,), generator=generator))
        return tuple(torch.randint(3, VOCAB, (length,), generator=generator).tolist())

    return [tokens(*prompt) for _ in range(count)], [tokens(*completion) for _ in range(count)]
