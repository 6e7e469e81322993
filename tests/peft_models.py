"""PEFT models of tiny random bases whose thought adapters are far from zero."""

from __future__ import annotations

import torch
from peft import PeftModel, get_peft_model

from pte.integrations.peft import PTEConfig
from pte.method.adapter import ThoughtAdapter
from pte.method.thought import GLOBAL_TOKEN_SIZE
from tiny import VOCAB, tiny_base

SMALL = {"r": 4, "global_tokens": 3, "window_tokens": 8, "evict_tokens": 4}


def peft_model(architecture="qwen2", *, base=None, dtype=torch.float64, seed=0, **options) -> PeftModel:
    """A model whose adapter changes it visibly; parameters in the base's dtype for exact tests."""
    base = tiny_base(architecture, dtype=dtype) if base is None else base
    torch.manual_seed(seed)
    model = get_peft_model(base, PTEConfig(**{**SMALL, **options}))
    shake(thought_adapter(model), seed=seed).to(dtype)
    return model


def add_adapter(model: PeftModel, name: str, *, seed: int, **options: object) -> ThoughtAdapter:
    """A second adapter, as different from zero as the first."""
    model.add_adapter(name, PTEConfig(**{**SMALL, **options}))
    return shake(thought_adapter(model, name), seed=seed).to(next(thought_adapter(model).parameters()).dtype)


def thought_adapter(model: PeftModel, name: str = "default") -> ThoughtAdapter:
    adapter = model.base_model.pte_adapters[name]
    assert isinstance(adapter, ThoughtAdapter)
    return adapter


def shake(adapter: ThoughtAdapter, *, seed: int) -> ThoughtAdapter:
    """Random A of size 0.3 and global tokens of size 1."""
    generator = torch.Generator().manual_seed(seed + 1)
    for name, parameter in adapter.named_parameters():
        if name.endswith(".up"):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
        elif name.endswith("global_tokens"):
            parameter.data = parameter.data / GLOBAL_TOKEN_SIZE
    return adapter


def token_ids(rows: int = 2, tokens: int = 9, *, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def logits_of(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens, use_cache=False).logits
