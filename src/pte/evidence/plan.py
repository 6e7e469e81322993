"""What an evidence run measures: tasks, arms, seeds and questions, as a list of parts per preset.

Decides: every experiment of the evidence, in the order in which parts run: seed by seed, so that a run that has not
ended yet has all arms of its first seeds. All arms of a comparison get equal steps, batches and learning rates. What a
part does is in `parts.py`, how bases are made in `bases.py`.

Window 8 and blocks of 2 throughout: the paper's quarter, at the length of these traces.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pte.arms import arm_config
from pte.config import (
    AdapterConfig,
    CacheConfig,
    DistillConfig,
    EvalConfig,
    ExperimentConfig,
    ModelConfig,
    RolloutConfig,
    RunConfig,
    TaskConfig,
    TrainConfig,
)
from pte.evidence.measurements import Label, StageName
from pte.evidence.parts import Reading, ScoredPart, TrainedPart

PresetName = Literal["quick", "full"]
PRESETS: tuple[PresetName, ...] = ("quick", "full")
WINDOW = CacheConfig(window_tokens=8, evict_tokens=2)
MAIN_ARMS = ("lora_full", "lora_window", "lora_window_larger", "pte_paper", "pte_read", "pte_delta")
OTHER_ARMS = ("global_only", "lora_random")
CONTROLS = ("pte_zeroed", "pte_shuffled")
SLOTS = 256
Part = ScoredPart | TrainedPart


@dataclass(frozen=True)
class Level:
    """One task at one length.

    Args:
        task: Name in the tables.
        windows: Length of a right trace in windows, rounded.
        config: The PTE experiment; arms, seeds and names are filled in.
        base: Name of the base in `bases.py`, or None for the shipped one.
    """

    task: str
    windows: int
    config: ExperimentConfig
    base: str | None = None

    @property
    def name(self) -> str:
        """For file names."""
        return f"{self.task}-{self.windows}w"

    @property
    def setting(self) -> dict[str, float | str]:
        """For labels."""
        return {"windows": self.windows}


def level(
    task: str,
    windows: int,
    shape: TaskConfig,
    *,
    trace_tokens: int,
    steps: int,
    base: Path | None = None,
    temperature: float = 0.0,
) -> Level:
    """A level with the evidence's own settings of cache, optimisation and evaluation.

    Args:
        task: Name in the tables.
        windows: Length of a right trace in windows.
        shape: Of the problems.
        trace_tokens: Tokens of a right trace.
        steps: Of the warm start.
        base: Folder of the base; None for the shipped one.
        temperature: Of the evaluation.
    """
    config = ExperimentConfig(
        model=ModelConfig(path="embedded" if base is None else str(base)),
        adapter=AdapterConfig(rank=32, global_tokens=32, update_rule="delta"),
        cache=WINDOW,
        rollout=RolloutConfig(slots=SLOTS, max_new_tokens=trace_tokens + 8),
        task=shape,
        distill=DistillConfig(steps=steps, batch_size=16, learning_rate=3e-3, decay="linear"),
        train=TrainConfig(steps=0, checkpoint_every=50, log_completions=False),
        eval=EvalConfig(problems=512, max_new_tokens=trace_tokens + 8, temperature=temperature),
    )
    return Level(task, windows, config, base=None if base is None else base.name)


def chained_level(statements: int, *, steps: int = 200) -> Level:
    """Chained assignments on the shipped base; ten tokens a statement, four for the answer."""
    tokens = 10 * statements + 4
    shape = TaskConfig(kind="chained", num_statements=statements, num_names=statements + 4)
    return level("chained", round(tokens / WINDOW.window_tokens), shape, trace_tokens=tokens, steps=steps)


CHAINED = (chained_level(3), chained_level(6), chained_level(12))


def plan(preset: PresetName, directory: Path) -> list[Part]:
    """The parts of a preset, in the order in which they start.

    Args:
        preset: `quick` or `full`.
        directory: Of the run; bases are made in it.
    """
    levels = [*CHAINED]
    if preset == "quick":
        levels = [CHAINED[1]]
        return [*base_parts(levels), *arm_parts(levels, MAIN_ARMS, seed=0)]
    parts: list[Part] = [*base_parts(levels)]
    for seed in range(3):
        parts += arm_parts(levels, (*MAIN_ARMS, *OTHER_ARMS), seed=seed)
    return parts


def base_parts(levels: list[Level]) -> Iterator[ScoredPart]:
    """The bases alone, under the full cache and under the window."""
    for one in levels:
        readings = tuple(
            Reading(Label("arms", one.task, arm, setting=one.setting), arm_config(one.config, arm))
            for arm in ("base_full", "base_window")
        )
        yield ScoredPart(f"arms-{one.name}-base", readings, after=one.base)


def arm_parts(levels: list[Level], arms: tuple[str, ...], *, seed: int) -> Iterator[TrainedPart]:
    """Every arm of every level, warm start only; the controls are scored with the arm that they are controls of."""
    for one in levels:
        config = replace(one.config, run=RunConfig(seed=seed))
        for arm in arms:
            scored = (arm, *CONTROLS) if arm == "pte_delta" else (arm,)
            yield TrainedPart(
                name=f"arms-{one.name}-{arm}-seed{seed}",
                config=arm_config(config, arm),
                readings=tuple(
                    Reading(
                        label(one, scored_arm, stage="warm_start", seed=seed),
                        arm_config(config, scored_arm),
                    )
                    for scored_arm in scored
                ),
                cost=replace(label(one, arm, stage="warm_start", seed=seed), question="cost"),
                after=one.base,
            )


def label(one: Level, arm: str, *, stage: StageName, seed: int) -> Label:
    """The label of an arm's score on a level."""
    return Label("arms", one.task, arm, stage=stage, seed=seed, setting=one.setting)
