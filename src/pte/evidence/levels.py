"""The tasks of the evidence and their lengths, with the settings that all arms of a level share.

Decides: shapes of problems, bases, budgets of optimisation and evaluation. Does not know arms and questions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from pte.config import (
    AdapterConfig,
    CacheConfig,
    DistillConfig,
    EvalConfig,
    ExperimentConfig,
    ModelConfig,
    RolloutConfig,
    TaskConfig,
    TrainConfig,
)
from pte.tasks.bases import NEAR_AGE, STREAM_AGE
from pte.tasks.families import FAMILIES

WINDOW = CacheConfig(window_tokens=8, evict_tokens=2)
SLOTS = 256
ROOM_TOKENS = 8
"""Tokens that a completion may be longer than a right trace."""
BASES = "bases"
BASE_PREFIX = "base-"
"""Of the names of parts that make bases."""
LOOKED_AT = 16
"""Problems whose traces say how long a completion may be."""
STREAM_PROBLEMS = 128
STREAM_TOKENS_PER_FACT = 2
"""One for the fact, and a query of two for every other fact."""


@dataclass(frozen=True)
class Level:
    """One task at one length.

    Args:
        name: For file names.
        task: Name in the tables.
        windows: Length of a right trace in windows, rounded.
        config: The PTE experiment; arms, seeds and names are filled in.
        base: Name of the part that makes the base, or None for the shipped one.
        compared: Whether all arms are compared on it.
    """

    name: str
    task: str
    windows: int
    config: ExperimentConfig
    base: str | None = None
    compared: bool = True

    @property
    def setting(self) -> dict[str, float | str]:
        """For labels."""
        return {"windows": self.windows}

    def with_facts(self, num_facts: int) -> ExperimentConfig:
        """A recall experiment with another number of facts."""
        queries = min(num_facts, self.config.task.num_queries)
        shape = replace(self.config.task, num_facts=num_facts, num_queries=queries)
        return with_shape(self.config, shape)

    def stream(self, *, windows: int) -> ExperimentConfig:
        """A stream experiment at another length."""
        assert self.config.task.max_age is not None
        return with_shape(self.config, stream_shape(windows, max_age=self.config.task.max_age))


def level(
    name: str,
    shape: TaskConfig,
    *,
    steps: int,
    learning_rate: float = 3e-3,
    batch_size: int = 16,
    base: Path | None = None,
    compared: bool = True,
) -> Level:
    """A level with the evidence's own settings of cache, optimisation and evaluation.

    Args:
        name: Of the level.
        shape: Of the problems.
        steps: Of the warm start.
        learning_rate: Of the warm start.
        batch_size: Of the warm start.
        base: Folder of the base; None for the shipped one.
        compared: Whether all arms are compared on it.
    """
    config = ExperimentConfig(
        model=ModelConfig(path="embedded" if base is None else str(base)),
        adapter=AdapterConfig(rank=32, global_tokens=32, update_rule="delta"),
        cache=WINDOW,
        distill=DistillConfig(
            steps=steps,
            batch_size=batch_size,
            micro_batch_size=batch_size,
            learning_rate=learning_rate,
            decay="linear",
        ),
        train=TrainConfig(steps=0, checkpoint_every=50, log_completions=False),
        eval=EvalConfig(problems=512, temperature=max(FAMILIES[name].temperature for name in shape.families)),
    )
    return Level(
        name=name,
        task=shape.kind,
        windows=round(trace_tokens(shape) / WINDOW.window_tokens),
        config=with_shape(config, shape),
        base=None if base is None else BASE_PREFIX + base.name,
        compared=compared,
    )


def trace_tokens(shape: TaskConfig) -> int:
    """Tokens of the longest of some right traces."""
    lengths = []
    for family in (FAMILIES[name] for name in shape.families):
        options = {name: getattr(shape, name) for name in family.shape_fields}
        problems = family.generate(LOOKED_AT, seed=0, split="train", **options)
        lengths += [len(problem.trace.split()) for problem in problems]
    return max(lengths)


def with_shape(config: ExperimentConfig, shape: TaskConfig) -> ExperimentConfig:
    """The same experiment on problems of another shape."""
    most = trace_tokens(shape) + ROOM_TOKENS
    return replace(
        config,
        task=shape,
        rollout=RolloutConfig(slots=SLOTS, max_new_tokens=most),
        eval=replace(config.eval, max_new_tokens=most),
    )


def chained_level(statements: int, *, steps: int = 200) -> Level:
    """Chained assignments on the shipped base."""
    shape = TaskConfig(kind="chained", num_statements=statements, num_names=statements + 4)
    windows = round(trace_tokens(shape) / WINDOW.window_tokens)
    return level(f"chained-{windows}w", shape, steps=steps)


def stream_shape(windows: int, *, max_age: int) -> TaskConfig:
    """Facts with a query after every other one; keys are written again after 128 facts."""
    facts = windows * WINDOW.window_tokens // STREAM_TOKENS_PER_FACT
    return TaskConfig(kind="recall", num_facts=facts, num_queries=facts // 2, max_age=max_age)


def recall_level(name: str, shape: TaskConfig, *, base: Path) -> Level:
    """Recall, whose traces are mostly values that nobody can foresee: more steps, larger batches."""
    return level(name, shape, steps=400, learning_rate=6e-3, batch_size=32, base=base)


def stream_level(name: str, windows: int, *, max_age: int, base: Path) -> Level:
    """Streams; a completion has many queries, so that fewer of them are scored."""
    one = recall_level(name, stream_shape(windows, max_age=max_age), base=base)
    config = replace(one.config, eval=replace(one.config.eval, problems=STREAM_PROBLEMS))
    return replace(one, config=config, compared=False)


def with_grpo(level: Level) -> ExperimentConfig:
    """A short warm start and GRPO."""
    train = replace(
        level.config.train,
        steps=120,
        prompts_per_step=32,
        group_size=4,
        micro_batch_size=128,
        loss="dapo",
        learning_rate=3e-4,
        warmup_steps=5,
    )
    return replace(level.config, train=train)


def levels_of(directory: Path) -> dict[str, Level]:
    """All levels by name.

    Args:
        directory: Of the run, which holds the bases.
    """
    bases = directory / BASES
    recall = TaskConfig(kind="recall", num_facts=16, num_queries=8)
    permutation = TaskConfig(kind="permutation")
    multiplication = TaskConfig(kind="multiplication")
    mixture = TaskConfig(kind="mixture", mixture=("permutation", "multiplication"))
    rl = replace(chained_level(4, steps=25), name="chained-rl", compared=False)
    found = [
        chained_level(3),
        chained_level(6),
        chained_level(12),
        replace(rl, config=with_grpo(rl)),
        recall_level("recall-16", recall, base=bases / "recall"),
        stream_level("recall-stream", 16, max_age=STREAM_AGE, base=bases / "recall"),
        stream_level("recall-length", 8, max_age=NEAR_AGE, base=bases / "recall"),
        level("permutation", permutation, steps=200, base=bases / "permutation"),
        level("multiplication", multiplication, steps=600, base=bases / "multiplication"),
        *(
            level(f"puzzles-{shape.kind}", shape, steps=200, base=bases / "puzzles", compared=False)
            for shape in (permutation, multiplication, mixture)
        ),
    ]
    return {one.name: one for one in found}
