"""A thought adapter in a folder as PEFT writes it, read and written without PEFT.

Decides: how the options and tensors of our own checkpoints are named in `adapter_config.json` and
`adapter_model.safetensors` and back, so that either kind of folder can be an experiment's `adapter.checkpoint`.
Does not know: PEFT, models, how files are flushed. LoRA adapters are `lora_folder.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, cast

from safetensors import SafetensorError
from safetensors.torch import load_file, save

from pte.checkpoint import load_adapter, save_adapter
from pte.checkpoint_files import ADAPTER_CONFIG_FILE, AdapterMetadata, Option, write_synced
from pte.config_policy import CacheConfig

if TYPE_CHECKING:
    from torch import Tensor

PEFT_TYPE = "PTE"
TASK_TYPE = "CAUSAL_LM"
WEIGHTS_FILE = "adapter_model.safetensors"
KEY_PREFIX = "base_model.pte_adapters."
"""Before the adapter's own parameter names in a folder; PEFT puts the adapter's name behind it in a model."""
OPTION_FIELDS = ("kind", "scale", "update_rule", "key_space")
RENAMED_FIELDS = {"rank": "r", "targets": "target_modules"}
BUDGET_FIELDS = {
    "policy": "eviction",
    "window_tokens": "window_tokens",
    "evict_tokens": "evict_tokens",
    "sink_tokens": "sink_tokens",
    "recent_tokens": "recent_tokens",
}
"""Names in a folder of an experiment's section `cache`."""


def is_peft_folder(path: str | Path) -> bool:
    """True for a directory that PEFT's `save_pretrained` could have written."""
    return "peft_type" in read_config(Path(path))


def load_any_adapter(path: str | Path) -> tuple[dict[str, Tensor], AdapterMetadata]:
    """A thought adapter's tensors, on the CPU, and what it is and fits, from our own files or from a PEFT folder.

    Raises:
        FileNotFoundError, ValueError: As `load_adapter` and `load_peft_folder`.
    """
    return load_peft_folder(path) if is_peft_folder(path) else load_adapter(path)


def load_peft_folder(path: str | Path) -> tuple[dict[str, Tensor], AdapterMetadata]:
    """A thought adapter that PEFT or `save_peft_folder` wrote.

    Args:
        path: The directory.

    Raises:
        FileNotFoundError: It holds no weights.
        ValueError: It is an adapter of another method, does not say one of its options, its weights are corrupt or a
            pickle, or more than an adapter.
    """
    config = read_config(Path(path))
    if config.get("peft_type") != PEFT_TYPE:
        raise ValueError(
            f"{path} must hold an adapter of peft_type {PEFT_TYPE!r}, got {config.get('peft_type')!r}; a LoRA adapter "
            f"can be a start (start_from_lora), others cannot"
        )
    tensors = read_weights(Path(path))
    for key in tensors:
        if not key.startswith(KEY_PREFIX):
            raise ValueError(
                f"{path} must hold the adapter's tensors alone, got {key!r}; save it with save_embedding_layers=False, "
                f"on a base whose vocabulary is the saved one"
            )
    options = {name: required_field(config, name, path=path) for name in OPTION_FIELDS}
    options |= {ours: required_field(config, theirs, path=path) for ours, theirs in RENAMED_FIELDS.items()}
    options["global_tokens"] = 0 if config["kind"] == "lora" else required_field(config, "global_tokens", path=path)
    if config.get("layers"):
        options["layers"] = config["layers"]
    metadata = AdapterMetadata(
        options=cast("Mapping[str, Option]", options),
        base_name=str(config.get("base_model_name_or_path") or ""),
        base_fingerprint=cast("str | None", config.get("base_fingerprint")),
    )
    return {key.removeprefix(KEY_PREFIX): tensor for key, tensor in tensors.items()}, metadata


def saved_budget(path: str | Path) -> dict[str, str | int | None]:
    """The budget that a thought adapter of a PEFT folder was trained with, as an experiment's section `cache` names it.

    Args:
        path: Any saved adapter.

    Returns:
        Nothing for an adapter of another kind: only our PEFT folders hold their budget.

    Raises:
        ValueError: The folder is ours and lacks a part of the budget.
    """
    config = read_config(Path(path))
    if config.get("peft_type") != PEFT_TYPE:
        return {}
    return {
        ours: cast("str | int | None", required_field(config, theirs, path=path))
        for ours, theirs in BUDGET_FIELDS.items()
    }


def save_peft_folder(
    directory: str | Path, tensors: Mapping[str, Tensor], *, metadata: AdapterMetadata, cache: CacheConfig
) -> None:
    """Writes a thought adapter as PEFT's `save_pretrained` would.

    Args:
        directory: Made if needed.
        tensors: The adapter's tensors by parameter name.
        metadata: What the adapter is and fits.
        cache: The budget it was trained under.

    Raises:
        OSError: The disk is full or cannot be written.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    options = dict(metadata.options)
    config = {
        "peft_type": PEFT_TYPE,
        "task_type": TASK_TYPE,
        "base_model_name_or_path": metadata.base_name,
        "base_fingerprint": metadata.base_fingerprint,
        "inference_mode": True,
        **{RENAMED_FIELDS.get(name, name): value for name, value in options.items()},
        **{BUDGET_FIELDS[name]: value for name, value in asdict(cache).items()},
    }
    named = {f"{KEY_PREFIX}{name}": tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_synced(directory / WEIGHTS_FILE, save(named, metadata={"format": "pt"}))
    write_synced(directory / ADAPTER_CONFIG_FILE, json.dumps(config, indent=2, sort_keys=True).encode())


def convert_to_peft(path: str | Path, directory: str | Path, *, cache: CacheConfig) -> None:
    """Writes a saved adapter of a run as a folder that PEFT reads.

    Args:
        path: Of the adapter, as `load_adapter` takes it.
        directory: Of the folder.
        cache: The budget of the run; an adapter does not hold it.

    Raises:
        FileNotFoundError, ValueError: There is no adapter, or it cannot be read.
    """
    tensors, metadata = load_adapter(path)
    save_peft_folder(directory, tensors, metadata=metadata, cache=cache)


def convert_from_peft(path: str | Path, directory: str | Path) -> None:
    """Writes a thought adapter of a PEFT folder as a run would save it; the budget stays behind.

    Args:
        path: Of the folder.
        directory: Of the adapter.

    Raises:
        FileNotFoundError, ValueError: There is no such adapter, or it cannot be read.
    """
    tensors, metadata = load_peft_folder(path)
    save_adapter(directory, tensors, metadata=metadata)


def check_tensors_fit(saved: Mapping[str, Tensor], *, expected: Mapping[str, Tensor], base_name: str) -> None:
    """Refuses tensors that are not those of an adapter, one for one.

    Args:
        saved: What was read, by parameter name.
        expected: The adapter's own.
        base_name: Of the base that the saved adapter was trained on.

    Raises:
        ValueError: A tensor is missing, one is too many, or one was made for a base of other sizes.
    """
    remedy = f"load the base that it was trained on{f' ({base_name!r})' if base_name else ''}"
    for name in sorted({*saved, *expected}):
        if name not in saved or name not in expected:
            wrong = "misses" if name not in saved else "has, too many,"
            raise ValueError(
                f"a saved adapter must hold every tensor of the adapter that is loaded and no other, got one that "
                f"{wrong} {name!r}; {remedy}, with the options that it was saved with"
            )
        if saved[name].shape != expected[name].shape:
            raise ValueError(
                f"a saved adapter must be made for the base's sizes, got {name!r} of {tuple(saved[name].shape)} for "
                f"{tuple(expected[name].shape)}; {remedy}"
            )


def read_config(path: Path) -> dict[str, object]:
    """`adapter_config.json` of a directory; nothing where there is none.

    Raises:
        ValueError: It is no JSON, or no object.
    """
    file = path / ADAPTER_CONFIG_FILE
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is corrupt or truncated ({error}); use another copy") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} must hold a JSON object, got {config!r:.40}; use another copy")
    return config


def required_field(config: Mapping[str, object], name: str, *, path: str | Path) -> object:
    """What `adapter_config.json` says of an option that cannot be guessed.

    Args:
        config: Its content.
        name: Of the option.
        path: Of the folder, for the error.

    Raises:
        ValueError: It says nothing.
    """
    if name not in config:
        raise ValueError(
            f"{ADAPTER_CONFIG_FILE} of an adapter of peft_type {config.get('peft_type')} must say {name!r}, got none "
            f"in {path}; add the value that it was trained with, or save the adapter again"
        )
    return config[name]


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a PEFT folder, on the CPU.

    Raises:
        FileNotFoundError: There are none in safetensors.
        ValueError: The file is corrupt.
    """
    file = path / WEIGHTS_FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is missing: only safetensors are read; save the adapter with safe_serialization=True"
        )
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is corrupt or truncated ({error}); use another copy") from error
