"""What a run writes and reports step by step: metrics.jsonl, completions.jsonl, trackers.

Decides: that of several ranks the first alone writes. Does not know: what a step does, checkpoints (`trainer`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from pte.run_record import MetricsLog

if TYPE_CHECKING:
    from pathlib import Path

    from pte.config import RunConfig
    from pte.learn.stage import StepResult
    from pte.ranks import Ranks


class Journal:
    """What a run writes step by step: metrics and completions; nothing on any rank but the first.

    Args:
        directory: Of the run.
        done_steps: Steps that its checkpoint holds; lines after them are dropped.
        ranks: Processes of the run.
    """

    def __init__(self, directory: Path, *, done_steps: int, ranks: Ranks) -> None:
        self.writes = ranks.first
        if self.writes:
            self.metrics = MetricsLog(directory / "metrics.jsonl", done_steps=done_steps)
            self.completions = MetricsLog(directory / "completions.jsonl", done_steps=done_steps)

    def append(self, stage: str, step: int, result: StepResult) -> None:
        """Writes what a step left behind."""
        if self.writes:
            self.metrics.append(step, [{"stage": stage, **result.metrics}])
            if result.completions:
                self.completions.append(step, result.completions)


def check_trackers(names: Sequence[str]) -> None:
    """Refuses trackers that are not installed; accelerate would leave them out.

    Raises:
        ValueError: A package is missing.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"run.log_with must name installed trackers, got {name!r}; pip install {name}")


class open_trackers:
    """TensorBoard, W&B or trackio through accelerate; nothing when none is asked for.

    Args:
        config: Names the trackers and the run.
        directory: Of the run.
        ranks: Processes of the run; the first alone tracks.
    """

    def __init__(self, config: RunConfig, directory: Path, *, ranks: Ranks) -> None:
        self.config = config
        self.directory = directory
        self.ranks = ranks
        self.accelerator = None

    def __enter__(self) -> Callable[[Mapping[str, float], int], None]:
        """A function that logs metrics of a step."""
        log_with = self.config.log_with
        if not log_with or not self.ranks.first:
            return lambda metrics, step: None
        from accelerate import Accelerator

        accelerator = Accelerator(log_with=list(log_with), project_dir=str(self.directory), cpu=True)
        accelerator.init_trackers(self.config.name)
        self.accelerator = accelerator
        return lambda metrics, step: accelerator.log(dict(metrics), step=step)

    def __exit__(self, *_: object) -> None:
        """Closes the trackers; accelerate's own way out would close the connections of the ranks, too."""
        if self.accelerator is not None:
            for tracker in self.accelerator.trackers:
                tracker.finish()
