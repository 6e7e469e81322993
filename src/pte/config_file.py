"""Experiment files: TOML in, checked values or the equal flags out.

Decides: how a file's sections and keys map to `ExperimentConfig`, what a misspelt one is answered with, and how a file
becomes flags, so that `flags_from_file(path) + flags` through one parser gives the user's flags the last word.
Does not know: the parser, the rules of the fields (`config.py`).
TOML has no null: an optional field that is left out keeps its default.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

from pte.config import ExperimentConfig
from pte.config_rules import FieldValue, fitting_value

SECTIONS: dict[str, type] = get_type_hints(ExperimentConfig)
REFUSED = {
    "top_p": "sampling would follow another distribution than the one that is scored; use temperature",
    "top_k": "sampling would follow another distribution than the one that is scored; use temperature",
}


def read_experiment_file(path: str | Path) -> dict[str, dict[str, FieldValue]]:
    """The values of an experiment file by section and key, with the types of the fields.

    Args:
        path: A TOML file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is no TOML, or names an unknown section, key or choice.
        TypeError: A value is of the wrong type.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"the experiment file must exist, got {str(path)!r}; see the files in configs/")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: the experiment file must be TOML in UTF-8: {error}") from error
    values: dict[str, dict[str, FieldValue]] = {}
    for section, entries in content.items():
        if not isinstance(entries, dict):
            raise ValueError(f"{path}: {section} must stand in a section{_home_of(section)}")
        values[section] = {}
        if section not in SECTIONS:
            raise ValueError(f"{path}: unknown section [{section}]; {_nearest(section, SECTIONS)}")
        for key, value in entries.items():
            annotation = _annotation(section, key, path=path)
            try:
                values[section][key] = fitting_value(key, value, annotation=annotation)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{path}: [{section}] {error}") from error
    return values


def flags_from_file(path: str | Path) -> list[str]:
    """Flags that say what an experiment file says; later flags win over them.

    Args:
        path: A TOML file.

    Raises:
        FileNotFoundError, ValueError, TypeError: As `read_experiment_file`, and a list item that looks like a flag.
    """
    flags = []
    for section, entries in read_experiment_file(path).items():
        for key, value in entries.items():
            flag = f"--{section}.{key.replace('_', '-')}"
            if isinstance(value, bool):
                flags.append(flag if value else f"--{section}.no-{key.replace('_', '-')}")
            elif isinstance(value, tuple):
                if any(str(item).startswith("-") for item in value):
                    raise ValueError(f"{path}: [{section}] {key} must hold no item that starts with '-', got {value!r}")
                flags += [flag, *(str(item) for item in value)]
            else:
                flags.append(f"{flag}={value}")
    return flags


def refuse_flags(flags: Sequence[str]) -> None:
    """Refuses flags for top-p and top-k with the reason, before a parser calls them unknown.

    Args:
        flags: What the user wrote after the command.

    Raises:
        ValueError: A flag names top-p or top-k.
    """
    for flag in flags:
        key = flag.lstrip("-").partition("=")[0].rpartition(".")[2].replace("-", "_")
        if flag.startswith("--") and key in REFUSED:
            raise ValueError(f"{flag.partition('=')[0]} is not offered: {REFUSED[key]}")


def _annotation(section: str, key: str, *, path: Path) -> object:
    """The annotation of a field, or a ValueError that says where else the key belongs."""
    if key in REFUSED:
        raise ValueError(f"{path}: [{section}] {key} is not offered: {REFUSED[key]}")
    annotations = get_type_hints(SECTIONS[section])
    if key not in annotations:
        remedy = _home_of(key).removeprefix("; ") or _nearest(key, annotations)
        raise ValueError(f"{path}: [{section}] has no key {key!r}; {remedy}")
    return annotations[key]


def _home_of(key: str) -> str:
    """Where a key belongs, as the end of a sentence; empty when no section has it."""
    homes = [f"[{name}]" for name, section in SECTIONS.items() if key in {field.name for field in fields(section)}]
    return f"; {key} belongs in {' or '.join(homes)}" if homes else ""


def _nearest(name: str, known: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
