"""Which models are measured: their shapes, and bases of these shapes with random weights.

Decides: the shapes of Qwen2.5-3B, Qwen2.5-7B and Llama-3.1-8B, written down from their published configurations, and
one that is tiny. Two things are not theirs: positions go up to 131,072, so that long rollouts are not refused, and the
rotary angles are plain, since scaling them changes numbers and no work. Weights are drawn on the device itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from pte.model.load import freeze

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LONG_POSITIONS = 131_072


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder.

    Args:
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the MLP.
        layers: Decoder layers.
        heads: Query heads; their width is hidden_size / heads.
        kv_heads: Key and value heads.
        vocab: Token ids.
        tied: One matrix for embeddings and head.
        max_positions: Positions that the model allows.
        architecture: `qwen2` has biases on q, k and v, `llama` has none.
    """

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool
    max_positions: int
    architecture: Literal["qwen2", "llama"] = "qwen2"

    @property
    def head_dim(self) -> int:
        """Numbers of one head."""
        return self.hidden_size // self.heads

    @property
    def kv_dim(self) -> int:
        """Numbers of one token's keys in one layer."""
        return self.kv_heads * self.head_dim


SHAPES: dict[str, ModelShape] = {
    "tiny": ModelShape(32, 48, layers=2, heads=4, kv_heads=2, vocab=64, tied=False, max_positions=512),
    "3b": ModelShape(
        2048, 11008, layers=36, heads=16, kv_heads=2, vocab=151_936, tied=True, max_positions=LONG_POSITIONS
    ),
    "7b": ModelShape(
        3584, 18944, layers=28, heads=28, kv_heads=4, vocab=152_064, tied=False, max_positions=LONG_POSITIONS
    ),
    "8b": ModelShape(
        4096,
        14336,
        layers=32,
        heads=32,
        kv_heads=8,
        vocab=128_256,
        tied=False,
        max_positions=LONG_POSITIONS,
        architecture="llama",
    ),
}


def shape_named(name: str) -> ModelShape:
    """The shape of that name.

    Raises:
        ValueError: There is none.
    """
    if name not in SHAPES:
        raise ValueError(f"model must be one of {', '.join(SHAPES)}, got {name!r}; use for example '7b'")
    return SHAPES[name]


def model_config(shape: ModelShape) -> Qwen2Config | LlamaConfig:
    """The library's configuration of a shape, without special tokens."""
    kind = Qwen2Config if shape.architecture == "qwen2" else LlamaConfig
    return kind(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.max_positions,
        tie_word_embeddings=shape.tied,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def random_base(
    shape: ModelShape, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """A frozen base, equal for equal shapes, normal weights of deviation 0.02, made where it will lie.

    Args:
        shape: Of the base.
        dtype: Of the weights.
        device: Where the weights are made.
    """
    torch.manual_seed(0)
    with torch.device(device):
        base = AutoModelForCausalLM.from_config(model_config(shape), dtype=dtype, attn_implementation="sdpa")
    return freeze(base)
