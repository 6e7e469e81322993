"""Sizes of a base from its configuration alone: no weights are read, and none are made.

Decides: where a configuration comes from (a directory, a hub name, or a built-in shape by name, which works offline)
and what the arithmetic of the other files is made of. The model is built on torch's meta device, which holds no
numbers, so that its parameters are counted by the library's own code and not by a formula beside it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pte.method.adapter import LINEAR_MAPS
from pte.method.cache import CacheShape
from pte.model.load import check_supported
from pte.model.policy import layer_sizes
from pte.plan.shapes import SHAPES, model_config
from pte.tasks.chained import embedded_model_dir

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

BUILT_IN = {
    "qwen2.5-3b": "3b",
    "qwen2.5-7b": "7b",
    "llama-3.1-8b": "8b",
    "r1-distill-llama-8b": "8b",
}
"""Names of the shapes that need no configuration file."""
TRAINED_POSITIONS = {"3b": 32_768, "7b": 32_768, "8b": 131_072}
"""Of these shapes' instruction-tuned models, as their config.json says; a benchmark's shapes allow more."""


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a decoder.

    Args:
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the MLP.
        layers: Decoder layers.
        heads: Query heads.
        kv_heads: Key and value heads.
        head_dim: Numbers of one head.
        vocab: Token ids.
        parameters: All of them; tied embeddings count once.
        head_norms: Queries and keys are normalised, a head at a time.
        max_positions: Positions that the base was trained on.
    """

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    parameters: int
    head_norms: bool
    max_positions: int

    @classmethod
    def of(cls, config: PreTrainedConfig) -> ModelSizes:
        """Sizes of the model that a configuration describes.

        Raises:
            ValueError: The model is not supported (`check_supported`).
        """
        check_supported(config)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        attention = model.get_decoder().layers[0].self_attn
        found = layer_sizes(model)
        (_, query_width), (_, mlp_width) = found.maps["q_proj"], found.maps["gate_proj"]
        return cls(
            hidden_size=found.hidden_size,
            intermediate_size=mlp_width,
            layers=found.layers,
            heads=query_width // attention.head_dim,
            kv_heads=found.kv_dim // attention.head_dim,
            head_dim=attention.head_dim,
            vocab=config.vocab_size,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            head_norms=hasattr(attention, "q_norm"),
            max_positions=config.max_position_embeddings,
        )

    @property
    def query_dim(self) -> int:
        """Numbers of one token's queries in one layer."""
        return self.heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        """Numbers of one token's keys in one layer."""
        return self.kv_heads * self.head_dim

    @property
    def cache_shape(self) -> CacheShape:
        """What one token costs in the cache."""
        return CacheShape(layers=self.layers, kv_heads=self.kv_heads, head_dim=self.head_dim)

    @property
    def maps(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of each linear map of a layer."""
        hidden, query, kv, mlp = self.hidden_size, self.query_dim, self.kv_dim, self.intermediate_size
        inputs = (hidden, hidden, hidden, query, hidden, hidden, mlp)
        outputs = (query, kv, kv, hidden, mlp, mlp, hidden)
        return dict(zip(LINEAR_MAPS, zip(inputs, outputs, strict=True), strict=True))


def model_sizes(path: str, *, trust_remote_code: bool = False) -> ModelSizes:
    """Sizes of a base.

    Args:
        path: Directory with a config.json, hub name, `embedded`, or one of `BUILT_IN`.
        trust_remote_code: Run code that the checkpoint brings along.

    Raises:
        ValueError: The model is not supported.
        FileNotFoundError: There is no configuration.
    """
    if path.lower() in BUILT_IN:
        name = BUILT_IN[path.lower()]
        return replace(ModelSizes.of(model_config(SHAPES[name])), max_positions=TRAINED_POSITIONS[name])
    where = str(embedded_model_dir()) if path == "embedded" else path
    remedy = f"check the path, or offline use one of {', '.join(BUILT_IN)}"
    rule = "model.path must name a directory with a config.json, or a model on the hub"
    if Path(where).is_dir() and not (Path(where) / "config.json").is_file():
        raise FileNotFoundError(f"{rule}, got {path!r}, which has none; {remedy}")
    try:
        config = AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code)
    except OSError as error:
        raise FileNotFoundError(f"{rule}, got {path!r} ({str(error).splitlines()[0]}); {remedy}") from error
    return ModelSizes.of(config)
