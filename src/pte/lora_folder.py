"""A LoRA adapter that PEFT saved, as the start of ours.

Decides: what a LoRA adapter may hold to be copied: A, B and one scale on linear maps of decoder layers. With them an
adapter of kind `lora` (S = I) is the same function. Kinds with a state take over A, B and the scale alone; their first
state is that of a fresh encoder and not the identity, so their function is another one from the start.
Does not know: PEFT, models.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from pte.checkpoint_files import AdapterMetadata, Option, check_adapter_fits
from pte.method.adapter import LINEAR_MAPS
from pte.peft_folder import (
    check_tensors_fit,
    load_any_adapter,
    read_config,
    read_weights,
    required_field,
    saved_budget,
)

if TYPE_CHECKING:
    from torch import Tensor

    from pte.config_rules import FieldValue
    from pte.method.adapter import ThoughtAdapter

LORA_KEY = re.compile(
    r"base_model\.model\.model\.layers\.(?P<layer>\d+)\.(?:self_attn|mlp)\.(?P<name>\w+)\.lora_(?P<side>[AB])\.weight"
)
PLAIN_LORA: dict[str, object] = {
    "bias": "none",
    "fan_in_fan_out": False,
    "use_dora": False,
    "lora_bias": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "alora_invocation_tokens": None,
    "layer_replication": None,
    "use_qalora": False,
    "use_bdlora": None,
    "arrow_config": None,
    "kasa_config": None,
    "monteclora_config": None,
}
"""What a LoRA configuration must say, where it says anything, for its adapter to be A and B with one scale.

PEFT's variants are among them: they bear LoRA's tensor names and compute something else. VeLoRA computes the same.
"""
INTACT_BASE = (True, False, "gaussian", "eva", "orthogonal")
"""Initialisations of LoRA that leave the base's weights as they were."""


@dataclass(frozen=True)
class LoraOptions:
    """What a LoRA adapter has in common with ours.

    Args:
        rank: Of A and B.
        scale: alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA.
        targets: Adapted linear maps of every adapted layer, in the order of a layer.
        layers: Indices of the adapted layers, ascending.
    """

    rank: int
    scale: float
    targets: tuple[str, ...]
    layers: tuple[int, ...]


@dataclass(frozen=True)
class LoraAdapter:
    """A LoRA adapter under our names.

    Args:
        options: What it is.
        base_name: Directory or hub name of the base it was trained on.
        tensors: A (`up`) and B (`down`) of every adapted map, by our parameter names, on the CPU.
    """

    options: LoraOptions
    base_name: str
    tensors: dict[str, Tensor]


def load_lora(path: str | Path) -> LoraAdapter:
    """A LoRA adapter of PEFT, under our names.

    Args:
        path: What PEFT's `save_pretrained` wrote.

    Raises:
        FileNotFoundError: It holds no weights.
        ValueError: It is no LoRA adapter, has more than A, B and one scale on linear maps of decoder layers, or does
            not say its rank or alpha.
    """
    config = read_config(Path(path))
    _check_plain_lora(config, path)
    rank = cast(int, required_field(config, "r", path=path))
    alpha = cast(float, required_field(config, "lora_alpha", path=path))
    tensors: dict[str, Tensor] = {}
    maps: dict[int, set[str]] = {}
    for key, tensor in read_weights(Path(path)).items():
        match = LORA_KEY.fullmatch(key)
        if match is None or match["name"] not in LINEAR_MAPS:
            raise ValueError(
                f"a LoRA adapter must adapt linear maps of decoder layers alone, got {key!r} in {path}; train it with "
                f"target_modules among {', '.join(LINEAR_MAPS)}"
            )
        side = "down" if match["side"] == "A" else "up"
        tensors[f"layers.{match['layer']}.{match['name']}.{side}"] = tensor.to(torch.float32)
        maps.setdefault(int(match["layer"]), set()).add(match["name"])
    if len({frozenset(names) for names in maps.values()}) != 1:
        raise ValueError(
            f"a LoRA adapter must adapt the same maps in each of its layers, got {path}, which does not; train it with "
            f"target_modules by name and layers_to_transform"
        )
    options = LoraOptions(
        rank=rank,
        scale=alpha / (rank**0.5 if config.get("use_rslora") else rank),
        targets=tuple(name for name in LINEAR_MAPS if name in next(iter(maps.values()))),
        layers=tuple(sorted(maps)),
    )
    return LoraAdapter(options, base_name=str(config.get("base_model_name_or_path") or ""), tensors=tensors)


@torch.no_grad()
def start_from_lora(adapter: ThoughtAdapter, path: str | Path) -> None:
    """Copies A and B of a LoRA adapter of PEFT into ours.

    An adapter of kind `lora` then computes what PEFT's LoRA computes. One with a state keeps its own encoder: A, B and
    the scale are equal, the function is not, because S is not the identity.

    Args:
        adapter: Of the same rank, scale, targets and layers.
        path: What PEFT's `save_pretrained` wrote.

    Raises:
        FileNotFoundError, ValueError: There is no plain LoRA adapter (`load_lora`), or it has other options or sizes.
    """
    lora = load_lora(path)
    metadata = AdapterMetadata(
        options={
            "rank": lora.options.rank,
            "scale": lora.options.scale,
            "targets": list(lora.options.targets),
            "layers": list(lora.options.layers),
        },
        base_name=lora.base_name,
        base_fingerprint=None,
    )
    options: dict[str, Option] = {
        "rank": adapter.rank,
        "scale": adapter.scale,
        "targets": [name for name in LINEAR_MAPS if name in adapter.targets],
        "layers": sorted(adapter.adapted_layers),
    }
    check_adapter_fits(metadata, base_name="", base_fingerprint="", options=options)
    pairs = {name: tensor for name, tensor in adapter.state_dict().items() if name.startswith("layers.")}
    check_tensors_fit(lora.tensors, expected=pairs, base_name=lora.base_name)
    for name, tensor in lora.tensors.items():
        pairs[name].copy_(tensor)


def _check_plain_lora(config: Mapping[str, object], path: str | Path) -> None:
    """Refuses a LoRA adapter that A, B and one scale do not describe."""
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path} must hold a LoRA adapter of PEFT, got peft_type {config.get('peft_type')!r}")
    for name, plain in PLAIN_LORA.items():
        if config.get(name, plain) not in (plain, None):
            raise ValueError(
                f"{name} of a LoRA adapter must be {plain!r} to be A and B with one scale, got {config[name]!r} in "
                f"{path}; train it without"
            )
    if config.get("init_lora_weights", True) not in INTACT_BASE:
        raise ValueError(
            f"init_lora_weights of a LoRA adapter must leave the base as it is, got {config['init_lora_weights']!r} in "
            f"{path}; convert it to plain LoRA with PEFT's path_initial_model_for_weight_conversion"
        )


def saved_options(path: str | Path) -> Mapping[str, Option]:
    """The options of a saved adapter of any kind, as an experiment's section `adapter` names them.

    Args:
        path: What `adapter.checkpoint` may name.

    Raises:
        FileNotFoundError, ValueError: There is no adapter, or none that can be read.
    """
    if not is_lora_folder(path):
        return load_any_adapter(path)[1].options
    lora = load_lora(path).options
    options: dict[str, Option] = {"kind": "lora", **asdict(lora)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}


def saved_fields(path: str | Path) -> dict[str, FieldValue]:
    """What a saved adapter says of an experiment, by dotted name: its options and, in a PEFT folder, its budget.

    Args:
        path: What `adapter.checkpoint` may name.

    Raises:
        FileNotFoundError, ValueError: There is no adapter, or none that can be read.
    """
    found: dict[str, FieldValue] = {}
    for name, option in saved_options(path).items():
        found[f"adapter.{name}"] = tuple(option) if isinstance(option, list) else option
    return found | {f"cache.{name}": value for name, value in saved_budget(path).items()}


def is_lora_folder(path: str | Path) -> bool:
    """True for a directory that holds a LoRA adapter of PEFT."""
    return read_config(Path(path)).get("peft_type") == "LORA"
