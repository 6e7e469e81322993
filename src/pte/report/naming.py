"""Which runs are one arm, and what it is called.

Decides: training runs whose recorded configurations differ in nothing but the section `run` (seed, name, place) are
seeds of one arm; others are arms of their own, with names that tell them apart. Comparisons of several configurations
are told apart likewise. A run without a recorded configuration is alone.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path

from pte.report.runs import RecordedRun

SEED = re.compile(r"[-_.+ ]*seed[-_.+ ]*\d+$", re.IGNORECASE)


def with_names(runs: Sequence[RecordedRun]) -> list[RecordedRun]:
    """The same runs: arms of training runs have the names of their configurations, comparisons what tells them apart.

    Args:
        runs: In the order in which they were given, which names follow.
    """
    trained = names_of([run for run in runs if run.kind == "train"])
    compared = names_of([run for run in runs if run.kind == "compare"])
    found = []
    for run in runs:
        if run.kind == "train":
            name = trained[configuration_of(run)]
            run = replace(run, arms=tuple(replace(arm, name=name) for arm in run.arms))
        elif run.kind == "compare" and len(compared) > 1:
            run = replace(run, told_apart=compared[configuration_of(run)])
        found.append(run)
    return found


def names_of_lines(runs: Sequence[RecordedRun]) -> dict[str, str]:
    """A name for each training run, each another: of its arm, with the seed where runs of other seeds are shown too.

    Args:
        runs: With names.

    Returns:
        By path.
    """
    arms = [(run, arm) for run in runs if run.kind == "train" for arm in run.arms]
    count = Counter(arm.name for _, arm in arms)
    names: dict[str, str] = {}
    for run, arm in arms:
        name = arm.name if count[arm.name] == 1 else f"{arm.name}, seed {arm.seed}"
        names[run.path] = name if name not in names.values() else f"{name}, {run.path}"
    return names


def configuration_of(run: RecordedRun) -> str:
    """What the seeds of one arm share: the recorded configuration but for its section `run`; else the directory."""
    config = run.record.get("config")
    if not isinstance(config, Mapping):
        return str(Path(run.path).resolve())
    return json.dumps({key: value for key, value in config.items() if key != "run"}, sort_keys=True)


def names_of(runs: Sequence[RecordedRun]) -> dict[str, str]:
    """A name for each configuration, each another: of the directory, with more of its path where names are equal."""
    paths: dict[str, list[Path]] = {}
    for run in runs:
        paths.setdefault(configuration_of(run), []).append(Path(run.path).resolve())
    names = {key: common_name(group) for key, group in paths.items()}
    deepest = max((len(group[0].parts) for group in paths.values()), default=0)
    for depth in range(1, deepest + 1):
        taken = list(names.values())
        for key, group in paths.items():
            if taken.count(names[key]) > 1:
                names[key] = "/".join(group[0].parts[-depth:])
    return names


def common_name(paths: Sequence[Path]) -> str:
    """The name of directories without their seeds, of the one above where nothing else is in it; or what they share."""
    names = list(dict.fromkeys(SEED.sub("", path.name) or path.parent.name or path.name for path in paths))
    if len(names) == 1:
        return names[0]
    shared = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return (
        re.sub(r"[-_.+ ]+$", "", "".join(letters[0] for letters in shared)) or f"{names[0]} and {len(names) - 1} more"
    )
