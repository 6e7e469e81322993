"""Suites: problem sets that make one table together, each with its own way of scoring.

Decides: which sets a suite has, how often their problems are sampled, which number of a set is its score, and the
average over the sets. The files lie in a directory that the user names; they are read in place.
Does not know: policies, how a set is scored (`evaluate.py`).

Paper: its tables, six sets and their average; "AIME is scored pass@16". The name of the sixth set is not in our
sources; Minerva Math agrees with the averages.
Deviation: the temperature of the sampled sets is ours: the experiment's, or the rollouts' where that one is greedy.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pte.config import ExperimentConfig
    from pte.tasks.evaluate import Evaluation


@dataclass(frozen=True)
class SuiteSet:
    """One set of a suite.

    Args:
        title: In the table.
        file: JSONL file in the suite's directory; its stem is the name of the set.
        problems: How many the published set has.
        samples: Completions of each problem that make the score, which is pass@samples; None for the accuracy of the
            experiment's own samples.
    """

    title: str
    file: str
    problems: int
    samples: int | None = None

    @property
    def name(self) -> str:
        """As a task calls the set."""
        return Path(self.file).stem

    @property
    def metric(self) -> str:
        """What the score is."""
        return "accuracy" if self.samples is None else f"pass@{self.samples}"

    def score(self, evaluation: Evaluation) -> float:
        """The one number of the set, a fraction."""
        return evaluation.accuracy if self.samples is None else evaluation.pass_at[self.samples]


SUITES: dict[str, tuple[SuiteSet, ...]] = {
    "math6": (
        SuiteSet("MATH-500", "math500.jsonl", problems=500),
        SuiteSet("OlympiadBench", "olympiadbench.jsonl", problems=675),
        SuiteSet("AMC23", "amc23.jsonl", problems=40),
        SuiteSet("AIME24", "aime24.jsonl", problems=30, samples=16),
        SuiteSet("AIME25", "aime25.jsonl", problems=30, samples=16),
        SuiteSet("Minerva Math", "minerva_math.jsonl", problems=272),
    )
}


def suite_experiment(config: ExperimentConfig, name: str, *, directory: str | Path) -> ExperimentConfig:
    """The experiment with a suite's files as its evaluation sets, scored by math-verify, and nothing to train on.

    Args:
        config: Model, adapter, cache, prompts and lengths stay as they are.
        name: Of the suite.
        directory: Holds its files.

    Raises:
        FileNotFoundError: Files are missing.
    """
    paths = [Path(directory) / one.file for one in SUITES[name]]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"the directory of suite {name!r} must hold {', '.join(path.name for path in paths)}, got {directory} "
            f"without {', '.join(missing)}; docs/reproduce.md says what they are"
        )
    task = replace(
        config.task,
        kind="jsonl",
        mixture=(),
        train_path=None,
        traces_path=None,
        eval_paths=tuple(str(path) for path in paths),
        reward="math",
    )
    return replace(config, task=task)


def set_experiments(config: ExperimentConfig, name: str) -> dict[str, ExperimentConfig]:
    """How each set of a suite is scored, by the name of the set.

    Args:
        config: Of the suite (`suite_experiment`).
        name: Of the suite.
    """
    experiments = {}
    for one in SUITES[name]:
        settings = config.eval
        if one.samples is not None:
            drawn = sampling_temperature(config)
            settings = replace(settings, samples_per_problem=one.samples, temperature=drawn, pass_at=(1, one.samples))
        experiments[one.name] = replace(config, eval=settings)
    return experiments


def sampling_temperature(config: ExperimentConfig) -> float:
    """The temperature at which an evaluation draws several completions of a problem, above 0."""
    return config.eval.temperature or config.rollout.temperature


def suite_scores(name: str, evaluations: Mapping[str, Evaluation]) -> dict[str, float]:
    """The score of every set that is done, by title; the last entry is their average once all are.

    Args:
        name: Of the suite.
        evaluations: By the name of the set.
    """
    done = {one.title: one.score(evaluations[one.name]) for one in SUITES[name] if one.name in evaluations}
    whole = len(done) == len(SUITES[name])
    return done | ({"average": statistics.fmean(done.values())} if whole else {})


def incomplete_sets(name: str, evaluations: Mapping[str, Evaluation]) -> list[str]:
    """What to tell the user about sets that were scored on another number of problems than they have.

    Args:
        name: Of the suite.
        evaluations: By the name of the set.
    """
    return [
        f"{one.title} was scored on {evaluations[one.name].problems} problems, the set has {one.problems}: the score "
        f"is not comparable"
        for one in SUITES[name]
        if evaluations[one.name].problems != one.problems
    ]
