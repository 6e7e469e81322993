"""Checkpoints: the adapter and the state of training, never the base, never a pickle.

Decides: that a reader finds the old checkpoint or the new one whole, whenever the writer dies: everything goes into a
hidden sibling directory, is flushed to the disk, renamed to `step-<n>`, and only then named in the file `latest`.
Does not know: models, optimizers, configurations; it gets tensors and plain values.

A checkpoint holds adapter.safetensors (whose header carries the metadata, so that this one file can be moved about),
adapter_config.json (the same metadata for people), training.safetensors and training.json.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pte.checkpoint_files import (
    AdapterMetadata,
    StateTree,
    load_adapter_file,
    load_state_files,
    sync_directory,
    write_adapter_files,
    write_state_files,
    write_synced,
)

if TYPE_CHECKING:
    from torch import Tensor

LATEST = "latest"
HIDDEN = ".unfinished-"
STEP_NAME = re.compile(r"step-(\d{6,})(-again)?")


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on.

    Args:
        step: Steps that were done.
        adapter: Tensors by parameter name, on the CPU.
        metadata: What the adapter is and fits.
        training_state: By name, nested dicts, lists and tuples of tensors (on the CPU) and plain values, as saved.
    """

    step: int
    adapter: dict[str, Tensor]
    metadata: AdapterMetadata
    training_state: dict[str, StateTree]


def save_adapter(directory: str | Path, tensors: Mapping[str, Tensor], *, metadata: AdapterMetadata) -> None:
    """Writes an adapter alone; an adapter that is there is replaced in one rename.

    Args:
        directory: Made if needed.
        tensors: Adapter tensors by parameter name.
        metadata: What the adapter is and fits.

    Raises:
        OSError: The disk is full or cannot be written; what was there is untouched.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with _hidden_directory(directory, last_good="what was there before") as hidden:
        write_adapter_files(hidden, tensors, metadata=metadata)
        for file in sorted(hidden.iterdir()):
            os.replace(file, directory / file.name)
        sync_directory(directory)


def load_adapter(path: str | Path) -> tuple[dict[str, Tensor], AdapterMetadata]:
    """An adapter's tensors, on the CPU, and what it is and fits.

    Args:
        path: An adapter file, a directory with one, or a run whose last checkpoint is meant.

    Raises:
        FileNotFoundError: There is no adapter.
        ValueError: The file is corrupt, truncated, a pickle, of another format version or no adapter of pte.
    """
    path = Path(path)
    for candidate in (path, path / "checkpoints"):
        if (candidate / LATEST).is_file():
            path = latest_checkpoint(candidate) or path
    return load_adapter_file(path)


def save_checkpoint(
    directory: str | Path,
    step: int,
    *,
    adapter: Mapping[str, Tensor],
    metadata: AdapterMetadata,
    training_state: Mapping[str, StateTree],
    keep: int = 2,
) -> Path:
    """Writes a checkpoint, makes it the latest, and drops all but the newest.

    Args:
        directory: Of all checkpoints of a run; made if needed.
        step: Steps that are done.
        adapter: Adapter tensors by parameter name.
        metadata: What the adapter is and fits.
        training_state: Optimizer, sampler, counters by name: nested dicts, lists and tuples of tensors and values.
        keep: Checkpoints that stay, this one included.

    Returns:
        The checkpoint's directory.

    Raises:
        ValueError: `keep` is below 1 or `step` below 0.
        TypeError: The training state holds something that is neither tensor nor plain value.
        OSError: The disk is full or cannot be written; the last good checkpoint is untouched.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1 checkpoint, got {keep}; use 2")
    if step < 0:
        raise ValueError(f"step must be at least 0, got {step}; use the number of steps done")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    _drop_leftovers(directory)
    before = latest_checkpoint(directory)
    target = directory / f"step-{step:06d}"
    if target == before:
        target = directory / f"step-{step:06d}-again"
    with _hidden_directory(directory, last_good="none yet" if before is None else str(before)) as hidden:
        write_adapter_files(hidden, adapter, metadata=metadata)
        write_state_files(hidden, training_state)
        sync_directory(hidden)
        _remove(target)
        os.rename(hidden, target)
        sync_directory(directory)
        try:
            _point_latest_to(target)
        except BaseException:
            if latest_checkpoint(directory) != target:
                _remove(target)
            raise
    _prune(directory, latest=target, keep=keep)
    return target


def latest_checkpoint(directory: str | Path) -> Path | None:
    """The directory of the last whole checkpoint, or None when none was written yet.

    Args:
        directory: Of all checkpoints of a run.

    Raises:
        ValueError: `latest` names no checkpoint in this directory.
    """
    pointer = Path(directory) / LATEST
    if not pointer.is_file():
        return None
    name = pointer.read_text(encoding="utf-8").strip()
    if STEP_NAME.fullmatch(name) is None or not (pointer.parent / name).is_dir():
        raise ValueError(
            f"{pointer} must name a checkpoint beside it, got {name!r}; write the name of a step directory into it"
        )
    return pointer.parent / name


def list_checkpoints(directory: str | Path) -> list[Path]:
    """Directories of the whole checkpoints, the oldest step first.

    Args:
        directory: Of all checkpoints of a run.
    """
    found = [path for path in Path(directory).glob("step-*") if STEP_NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: (_step_of(path), path.name))


def load_checkpoint(path: str | Path) -> Checkpoint:
    """A checkpoint from its own directory.

    Args:
        path: For example what `latest_checkpoint` returned.

    Raises:
        FileNotFoundError: A file of the checkpoint is missing.
        ValueError: A file is corrupt, truncated, a pickle or of another format version, or `path` is no checkpoint.
    """
    path = Path(path)
    if STEP_NAME.fullmatch(path.name) is None:
        raise ValueError(f"path must be a step directory, got {str(path)!r}; use latest_checkpoint(directory)")
    adapter, metadata = load_adapter_file(path)
    return Checkpoint(step=_step_of(path), adapter=adapter, metadata=metadata, training_state=load_state_files(path))


def save_training_state(directory: str | Path, state: Mapping[str, StateTree]) -> None:
    """Writes training.safetensors and training.json, flushed; atomic only as part of `save_checkpoint`.

    Args:
        directory: Made if needed.
        state: By name, nested dicts, lists and tuples of tensors and plain values.

    Raises:
        TypeError: The state holds something else.
        OSError: The disk is full or cannot be written.
    """
    Path(directory).mkdir(parents=True, exist_ok=True)
    write_state_files(Path(directory), state)


def load_training_state(directory: str | Path) -> dict[str, StateTree]:
    """The state that was saved, bit for bit, tensors on the CPU.

    Args:
        directory: What `save_training_state` or `save_checkpoint` wrote into.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is corrupt or truncated, or the two do not belong together.
    """
    return load_state_files(Path(directory))


@contextmanager
def _hidden_directory(parent: Path, *, last_good: str) -> Iterator[Path]:
    """A directory that readers do not see and that is gone afterwards, whatever happened."""
    hidden = parent / f"{HIDDEN}{os.getpid()}"
    _remove(hidden)
    try:
        hidden.mkdir()
        yield hidden
    except OSError as error:
        raise OSError(
            error.errno,
            f"could not save a checkpoint ({error.strerror or error}); the last good checkpoint is {last_good}; "
            f"free space and start again with resume",
            str(parent),
        ) from error
    finally:
        _remove(hidden)


def _point_latest_to(target: Path) -> None:
    pointer = target.parent / f"{HIDDEN}{LATEST}"
    try:
        write_synced(pointer, f"{target.name}\n".encode())
        os.replace(pointer, target.parent / LATEST)
    finally:
        pointer.unlink(missing_ok=True)
    sync_directory(target.parent)


def _prune(directory: Path, *, latest: Path, keep: int) -> None:
    """Drops all but the newest; a resumed run's later steps of before the resume are dropped too."""
    others = [path for path in list_checkpoints(directory) if path != latest]
    older = [path for path in others if _step_of(path) <= _step_of(latest)]
    kept = set(older[len(older) - (keep - 1) :]) if keep > 1 else set()
    for path in others:
        if path not in kept:
            _remove(path)


def _drop_leftovers(directory: Path) -> None:
    """Removes what a killed writer left behind."""
    for path in directory.glob(f"{HIDDEN}*"):
        _remove(path)


def _remove(path: Path) -> None:
    """Removes a file or directory; a directory disappears from readers at once, by a rename."""
    if path.is_dir():
        doomed = path if path.name.startswith(HIDDEN) else path.with_name(f"{HIDDEN}{path.name}")
        if doomed != path:
            shutil.rmtree(doomed, ignore_errors=True)
            os.rename(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _step_of(path: Path) -> int:
    match = STEP_NAME.fullmatch(path.name)
    assert match is not None
    return int(match.group(1))
