"""What a run writes down besides its checkpoints: its configuration, where it ran, its metrics line by line.

Decides: when a run directory may be used (`open_run_directory`), what `record.json` holds, and that a resumed run's
log is the log of an uninterrupted one: lines after the checkpoint and a half-written last line are dropped.
Does not know: what a configuration or a metric means.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

from pte.checkpoint_files import Json, installed_versions, sync_directory, write_synced

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

RECORD_FILE = "record.json"
MAY_CHANGE = (
    "run.name",
    "run.output_dir",
    "run.resume",
    "run.log_with",
    "eval",
    "model.device",
    "train.steps",
    "train.checkpoint_every",
    "train.keep_checkpoints",
)


def open_run_directory(path: str | Path, *, resume: bool) -> Path:
    """The directory of a new run, made here, or of the run that is resumed.

    Args:
        path: Of the run.
        resume: Go on with the run that is there.

    Raises:
        FileExistsError: There is a run, or anything else, and `resume` is False.
        FileNotFoundError: There is no run to resume.
    """
    path = Path(path)
    if resume:
        if not (path / RECORD_FILE).is_file():
            raise FileNotFoundError(
                f"run directory must hold a run to resume, got {str(path)!r} without {RECORD_FILE}; "
                f"start without --run.resume"
            )
        return path
    if path.is_dir():
        # What a run that was killed before its record was whole has left behind.
        for leftover in path.glob(".unfinished-*"):
            leftover.unlink()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(
            f"run directory must be new, got {str(path)!r}; go on with that run by --run.resume, or set another "
            f"--run.name"
        )
    path.mkdir(parents=True, exist_ok=True)
    return path


def save_record(directory: str | Path, config: DataclassInstance) -> dict[str, Json]:
    """Writes record.json: the resolved configuration with commit, versions and hardware; returns its content.

    Args:
        directory: Of the run.
        config: Nested dataclasses of plain values.

    Raises:
        OSError: The disk is full or cannot be written.
    """
    record: dict[str, Json] = {
        "config": _plain(config),
        "commit": commit(),
        "versions": {"python": platform.python_version(), **installed_versions()},
        "hardware": hardware(),
    }
    replace_synced(Path(directory) / RECORD_FILE, json.dumps(record, indent=2).encode())
    return record


def check_resumed_config(directory: str | Path, config: DataclassInstance) -> None:
    """Refuses to resume a run under another configuration; its length, evaluation and bookkeeping may change.

    Args:
        directory: Of the run.
        config: The configuration of now.

    Raises:
        ValueError: A field differs from the run's record that would make another experiment of it.
    """
    before = json.loads((Path(directory) / RECORD_FILE).read_text(encoding="utf-8"))["config"]
    now = _plain(config)
    assert isinstance(now, dict)
    for section, values in now.items():
        assert isinstance(values, dict)
        for key, value in values.items():
            name = f"{section}.{key}"
            saved = before.get(section, {}).get(key)
            if saved != value and section not in MAY_CHANGE and name not in MAY_CHANGE:
                raise ValueError(
                    f"{name} must be that of the run that is resumed ({saved!r}), got {value!r}; "
                    f"set it back or start a new run under another run.name"
                )


def commit() -> str | None:
    """The commit of the checkout that pte runs from, with `-dirty` for local changes; None outside a checkout."""
    here = Path(__file__).parent
    try:
        _git(here, "ls-files", "--error-unmatch", Path(__file__).name)
        changed = _git(here, "status", "--porcelain", "--untracked-files=no")
        return _git(here, "rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def hardware() -> dict[str, Json]:
    """The machine: processor, cores this process may use, memory, accelerators."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    devices = range(torch.cuda.device_count())
    return {
        "cpu": _cpu_name(),
        "cores": cores,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": [torch.cuda.get_device_name(index) for index in devices],
        "gpu_memory_bytes": [torch.cuda.get_device_properties(index).total_memory for index in devices],
    }


class MetricsLog:
    """A JSONL file of rows that belong to steps: metrics (one row a step) or completions (many).

    Opening it drops every row after `done_steps` and a half-written last line, so that a resumed run goes on where its
    checkpoint is. Numbers that are not finite are written as null: JSON has no NaN.

    Args:
        path: Of the file; made at the first row.
        done_steps: Steps that the checkpoint holds; 0 for a new run.

    Raises:
        ValueError: A line other than the last is no JSON object with a step.
    """

    def __init__(self, path: str | Path, *, done_steps: int = 0) -> None:
        self.path = Path(path)
        if self.path.exists():
            kept = _lines_up_to(done_steps, path=self.path)
            replace_synced(self.path, b"".join(kept))

    def append(self, step: int, rows: Sequence[Mapping[str, Json]]) -> None:
        """Writes the rows of a step and flushes them to the disk.

        Args:
            step: Steps done, this one included; becomes the first key of each row.
            rows: Plain values by name.

        Raises:
            ValueError: A row has a step of its own.
            OSError: The disk is full or cannot be written.
        """
        lines = []
        for row in rows:
            if "step" in row:
                raise ValueError(f"a row must leave the step to the log, got 'step' in {list(row)}; drop it")
            lines.append(json.dumps({"step": step, **_finite(dict(row))}, allow_nan=False) + "\n")
        with open(self.path, "ab", buffering=0) as file:
            before = file.tell()
            try:
                _write_all(file, "".join(lines).encode())
                os.fsync(file.fileno())
            except OSError:
                file.truncate(before)
                raise


def replace_synced(path: Path, content: bytes) -> None:
    """Writes a file so that readers find the old content or the new one whole.

    Raises:
        OSError: The disk is full or cannot be written; the old content is untouched.
    """
    unfinished = path.with_name(f".unfinished-{path.name}")
    try:
        write_synced(unfinished, content)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    sync_directory(path.parent)


def _lines_up_to(done_steps: int, *, path: Path) -> list[bytes]:
    lines = path.read_bytes().splitlines(keepends=True)
    kept = []
    for number, line in enumerate(lines, start=1):
        try:
            step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}:{number} must be a JSON object with a step; remove the line") from error
        if step <= done_steps:
            kept.append(line.rstrip(b"\n") + b"\n")
    return kept


def _write_all(file: FileIO, content: bytes) -> None:
    """Writes every byte: an unbuffered write may take only some of them when the disk fills up."""
    while content:
        content = content[file.write(content) :]


def _finite(row: dict[str, Json]) -> dict[str, Json]:
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}


def _plain(config: DataclassInstance) -> Json:
    plain: Json = json.loads(json.dumps(asdict(config)))
    return plain


def _git(directory: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(directory), *arguments], capture_output=True, check=True, text=True, timeout=10
    ).stdout.strip()


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def check_output(path: str | None) -> None:
    """Refuses, before any work, a file that could not be written after it.

    Raises:
        FileNotFoundError: Its directory is missing.
        IsADirectoryError: It is a directory.
    """
    if path is not None and Path(path).is_dir():
        raise IsADirectoryError(f"an output file must not be a directory, got {path!r}; name a file in it")
    if path is not None and not Path(path).parent.is_dir():
        raise FileNotFoundError(f"the directory of an output file must exist, got {path!r}; make it first")
