"""The files of a checkpoint: how tensors and plain values become bytes on the disk, and how bad bytes are refused.

Decides: the formats (safetensors and JSON, never pickle), the metadata of an adapter, the digest that betrays changed
bytes, and what fits what (`check_adapter_fits`). Does not know: directories of steps, renames, pruning
(`checkpoint.py`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TypeAlias, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

FORMAT_VERSION = 1
ADAPTER_FILE = "adapter.safetensors"
ADAPTER_CONFIG_FILE = "adapter_config.json"
STATE_TENSORS_FILE = "training.safetensors"
STATE_VALUES_FILE = "training.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
PICKLE_STARTS = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
PICKLE_REMEDY = "a pickle can run any code, so convert it with the program that wrote it"
VOLATILE_KEYS = ("_name_or_path", "dtype", "torch_dtype", "transformers_version", "use_cache")

Option: TypeAlias = str | int | float | list[str] | list[int]
Json: TypeAlias = bool | int | float | str | list["Json"] | dict[str, "Json"] | None
StateTree: TypeAlias = (
    Tensor
    | bool
    | int
    | float
    | str
    | dict[str, "StateTree"]
    | dict[int, "StateTree"]
    | list["StateTree"]
    | tuple["StateTree", ...]
    | None
)


def installed_versions() -> dict[str, str]:
    """Versions of pte, torch and transformers."""
    return {name: version(name) for name in ("pte", "torch", "transformers")}


@dataclass(frozen=True)
class AdapterMetadata:
    """What an adapter is and what it fits.

    Args:
        options: Options that rebuild the adapter, as plain JSON values.
        base_name: Directory or hub name of the base it was trained on.
        base_fingerprint: `fingerprint_of_base` of that base; None where its writer did not know it: sizes decide then.
        format_version: Of the files.
        versions: Of the packages that wrote them.
    """

    options: Mapping[str, Option]
    base_name: str
    base_fingerprint: str | None
    format_version: int = FORMAT_VERSION
    versions: Mapping[str, str] = field(default_factory=installed_versions)


def fingerprint_of_base(config: Mapping[str, Json], tensors: Mapping[str, Tensor]) -> str:
    """A sha256 over a base's configuration and some of its tensors.

    Tensors count as bfloat16, so that a base has one fingerprint whether it is loaded in float32 or bfloat16; what a
    configuration says about files and versions does not count.

    Args:
        config: The base's configuration as plain JSON values.
        tensors: A few of its tensors by name, enough to tell it from its relatives.
    """
    kept = {key: value for key, value in config.items() if key not in VOLATILE_KEYS}
    description = json.dumps(kept, sort_keys=True, default=str)
    return _digest({name: tensor.detach().to(torch.bfloat16) for name, tensor in tensors.items()}, description)


def check_adapter_fits(
    metadata: AdapterMetadata, *, base_name: str, base_fingerprint: str, options: Mapping[str, Option] | None = None
) -> None:
    """Refuses an adapter that was trained on another base or made with other options.

    Args:
        metadata: Of the adapter.
        base_name: Of the base it is to be put on; for the message, a base may move.
        base_fingerprint: Of that base; decides.
        options: Those that must agree, for example {"rank": 32}; None for none.

    Raises:
        ValueError: The base is another one, or an option differs.
    """
    if metadata.base_fingerprint is not None and metadata.base_fingerprint != base_fingerprint:
        raise ValueError(
            f"the adapter must be trained on the loaded base {base_name!r} (fingerprint {base_fingerprint[:12]}), got "
            f"one for {metadata.base_name!r} ({metadata.base_fingerprint[:12]}); load that base"
        )
    for name, value in (options or {}).items():
        saved = metadata.options.get(name)
        if saved != value:
            raise ValueError(
                f"adapter.{name} must be that of the adapter that is loaded ({saved!r}), got {value!r}; "
                f"set adapter.{name} to {saved!r} or start without adapter.checkpoint"
            )


def write_adapter_files(directory: Path, tensors: Mapping[str, Tensor], *, metadata: AdapterMetadata) -> None:
    """Writes and flushes adapter.safetensors and adapter_config.json."""
    description = json.dumps(asdict(metadata), indent=2, sort_keys=True)
    _write_tensors(directory / ADAPTER_FILE, tensors, kind="adapter", description=description)
    write_synced(directory / ADAPTER_CONFIG_FILE, description.encode())


def load_adapter_file(path: Path) -> tuple[dict[str, Tensor], AdapterMetadata]:
    """Reads an adapter from its file or from the directory that holds it; see `checkpoint.load_adapter`."""
    if path.is_dir():
        offered = [file.name for file in sorted(path.iterdir()) if file.suffix in PICKLE_SUFFIXES]
        if not (path / ADAPTER_FILE).is_file() and offered:
            raise ValueError(f"only safetensors are read, got {offered[0]!r} in {str(path)!r}; {PICKLE_REMEDY}")
        path = path / ADAPTER_FILE
    tensors, description = _read_tensors(path, kind="adapter")
    content = json.loads(description)
    if content["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{path} must have format version {FORMAT_VERSION}, got {content['format_version']!r}; "
            f"read it with pte {content['versions']['pte']}"
        )
    return tensors, AdapterMetadata(**content)


def write_state_files(directory: Path, state: Mapping[str, StateTree]) -> None:
    """Writes and flushes training.safetensors and training.json; the first holds the digest of the second."""
    tensors: dict[str, Tensor] = {}
    values = {name: _encode(value, tensors=tensors, where=name) for name, value in state.items()}
    content = json.dumps({"format_version": FORMAT_VERSION, "state": values}, indent=1).encode()
    digest = hashlib.sha256(content).hexdigest()
    _write_tensors(directory / STATE_TENSORS_FILE, tensors, kind="training", description=digest)
    write_synced(directory / STATE_VALUES_FILE, content)


def load_state_files(directory: Path) -> dict[str, StateTree]:
    """Reads what `write_state_files` wrote; see `checkpoint.load_training_state`."""
    tensors, digest = _read_tensors(directory / STATE_TENSORS_FILE, kind="training")
    path = directory / STATE_VALUES_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: the training state cannot be read; resume from another checkpoint")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != digest:
        raise ValueError(
            f"{path} is corrupt, truncated or not of the same save as {STATE_TENSORS_FILE}; "
            f"resume from another checkpoint"
        )
    parsed = json.loads(content)
    if parsed["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{path} must have format version {FORMAT_VERSION}, got {parsed['format_version']!r}; "
            f"resume with the version of pte that wrote it"
        )
    return {name: _decode(value, tensors=tensors) for name, value in parsed["state"].items()}


def write_synced(path: Path, content: bytes) -> None:
    """Writes a file and flushes it to the disk.

    Raises:
        OSError: The disk is full or cannot be written.
    """
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Flushes a directory's entries to the disk, so that a rename in it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor], *, kind: str, description: str) -> None:
    """One safetensors file; its header says what it is and holds the digest of everything else."""
    copies = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    header = {"pte": kind, "description": description, "digest": _digest(copies, description)}
    write_synced(path, save(copies, metadata=header))


def _read_tensors(path: Path, *, kind: str) -> tuple[dict[str, Tensor], str]:
    """Tensors and description of a file that `_write_tensors` wrote."""
    if path.suffix in PICKLE_SUFFIXES:
        raise ValueError(f"only safetensors are read, got {str(path)!r}; {PICKLE_REMEDY}")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: there is nothing to load; check the path")
    with open(path, "rb") as file:
        if file.read(2) in PICKLE_STARTS:
            raise ValueError(f"only safetensors are read, got a pickle in {str(path)!r}; {PICKLE_REMEDY}")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is corrupt or truncated ({error}); use another checkpoint") from error
    if header.get("pte") != kind:
        raise ValueError(f"{path} must be {kind} tensors written by pte, got other safetensors; use a pte checkpoint")
    description = header.get("description", "")
    if header.get("digest") != _digest(tensors, description):
        raise ValueError(f"{path} is corrupt: it does not have the digest it was saved with; use another checkpoint")
    return tensors, description


def _digest(tensors: Mapping[str, Tensor], description: str) -> str:
    digest = hashlib.sha256(description.encode())
    for name in sorted(tensors):
        tensor = tensors[name].cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _encode(value: StateTree, *, tensors: dict[str, Tensor], where: str) -> Json:
    """Plain JSON; a tensor, a tuple and a dict with other keys than plain strings become a dict with one marked key."""
    if isinstance(value, Tensor):
        name = f"{len(tensors):05d}"
        tensors[name] = value
        return {"<tensor>": name}
    if isinstance(value, dict):
        items: list[tuple[str | int, Json]] = []
        for key, item in value.items():
            if type(key) not in (str, int):
                raise TypeError(f"{where} must have keys of str or int, got {key!r}; use a number or a name")
            items.append((key, _encode(item, tensors=tensors, where=f"{where}[{key!r}]")))
        if all(isinstance(key, str) and not key.startswith("<") for key, _ in items):
            return {str(key): item for key, item in items}
        return {"<items>": [[key, item] for key, item in items]}
    if isinstance(value, list | tuple):
        entries = [_encode(item, tensors=tensors, where=f"{where}[{index}]") for index, item in enumerate(value)]
        return {"<tuple>": entries} if isinstance(value, tuple) else entries
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(
        f"{where} must be a tensor or a plain value, got {type(value).__name__}; save what it is made of instead"
    )


def _decode(value: Json, *, tensors: Mapping[str, Tensor]) -> StateTree:
    if isinstance(value, list):
        return [_decode(item, tensors=tensors) for item in value]
    if not isinstance(value, dict):
        return value
    match value:
        case {"<tensor>": str(name)}:
            return tensors[name]
        case {"<tuple>": list(entries)}:
            return tuple(_decode(item, tensors=tensors) for item in entries)
        case {"<items>": list(items)}:
            return dict(_decode_item(item, tensors=tensors) for item in items)
    return {key: _decode(item, tensors=tensors) for key, item in value.items()}


def _decode_item(item: Json, *, tensors: Mapping[str, Tensor]) -> tuple[str, StateTree]:
    """One [key, value] pair; the key may be an integer, which the annotation leaves out."""
    assert isinstance(item, list)
    key, value = item
    return cast(str, key), _decode(value, tensors=tensors)
