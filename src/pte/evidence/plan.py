"""What an evidence run measures: tasks, arms, seeds and questions, as a list of parts per preset.

Decides: every experiment of the evidence, in the order in which parts run. Three seeds where arms and rules compete
(tasks 1 to 3, GRPO after a warm start, forgetting), the first seed alone for all other questions.
All arms of a comparison get equal steps, batches and learning rates.
What a part does is in `parts.py`, how a policy is scored in `readings.py`, which base is made how in `bases.py`.

Windows are 8 tokens and blocks 2 throughout, the paper's quarter, unless a question varies them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from pte.config import CacheConfig, ExperimentConfig, RunConfig
from pte.config_stages import GradientMode
from pte.evidence.levels import BASE_PREFIX, Level, levels_of
from pte.evidence.measurements import Label, StageName
from pte.evidence.parts import BasePart, CostPart, Part, ScoredPart, TrainedPart
from pte.evidence.readings import Reading

PresetName = Literal["quick", "full"]
PRESETS: tuple[PresetName, ...] = ("quick", "full")
SEEDS = {"quick": (0,), "full": (0, 1, 2)}
MAIN_ARMS = ("lora_full", "lora_window", "lora_window_larger", "pte_paper", "pte_read", "pte_delta")
OTHER_ARMS = ("global_only", "lora_random", "lora_h2o", "lora_rkv")
CONTROLS = ("pte_zeroed", "pte_shuffled")
RULES = ("pte_paper", "pte_read", "pte_delta")
CAPACITY_FACTS = (4, 8, 16, 32, 64, 128)
LENGTH_ARMS = ("lora_full", "lora_window", "pte_paper", "pte_read", "pte_delta")
FORGETTING_WINDOWS = 32
"""Room for many queries whose values left 64 evictions ago."""
WINDOWS_BEYOND_TRAINING = (0, 4, 16, 32, 64)
RL_ARMS = ("pte_delta", "lora_window", "lora_full")
COST_ARMS = ("base_full", "lora_full", "lora_window", "lora_h2o", "pte_paper", "pte_read", "pte_delta")
MEMORY_TOKENS = (64, 128, 256, 512)


def plan(preset: PresetName, directory: Path) -> list[Part]:
    """The parts of a preset, in the order in which they start.

    Args:
        preset: `quick` or `full`.
        directory: Of the run; bases are made in it.
    """
    levels = levels_of(directory)
    if preset == "quick":
        chosen = [levels["chained-8w"], levels["recall-16"]]
        quick: list[Part] = []
        for one in chosen:
            quick += [*base_parts(one), *arm_parts(one, MAIN_ARMS, seed=0)]
        return [*needed_bases(quick), *quick]
    compared = [level for level in levels.values() if level.compared]
    parts: list[Part] = [part for level in compared for part in base_parts(level)]
    for seed in SEEDS[preset]:
        for level in compared:
            if seed == 0 or level.name != "multiplication":
                parts += arm_parts(level, (*MAIN_ARMS, *OTHER_ARMS), seed=seed)
        parts += rl_parts(levels["chained-rl"], seed=seed)
        parts += forgetting_parts(levels["recall-stream"], seed=seed)
    parts += capacity_parts(levels["recall-16"])
    parts += length_parts(levels["recall-length"])
    parts += ablation_parts(levels["chained-8w"])
    parts += transfer_parts(levels)
    parts += cost_parts(levels["chained-8w"])
    return [*needed_bases(parts), *parts]


def needed_bases(parts: Sequence[Part]) -> list[BasePart]:
    """The bases that parts wait for."""
    names = dict.fromkeys(part.after for part in parts if part.after is not None)
    return [BasePart(name=name, base=name.removeprefix(BASE_PREFIX)) for name in names]


def label(level: Level, arm: str, *, stage: StageName, seed: int, question: str = "arms") -> Label:
    """The label of an arm's score on a level."""
    return Label(question, level.task, arm, stage=stage, seed=seed, setting=level.setting)


def seeded(config: ExperimentConfig, seed: int) -> ExperimentConfig:
    """The same with another seed of adapter, problems and samples."""
    return replace(config, run=RunConfig(seed=seed))


def base_parts(level: Level) -> Iterator[ScoredPart]:
    """The base alone, under the full cache and under the window."""
    readings = tuple(
        Reading(label(level, arm, stage="none", seed=0), level.config) for arm in ("base_full", "base_window")
    )
    yield ScoredPart(f"arms-{level.name}-base", readings, after=level.base)


def arm_parts(level: Level, arms: Sequence[str], *, seed: int) -> Iterator[TrainedPart]:
    """Arms of a level, warm start alone; controls are scored with the arm that they are controls of."""
    config = seeded(level.config, seed)
    for arm in arms:
        readings = [
            Reading(label(level, scored, stage="warm_start", seed=seed), config)
            for scored in ((arm, *CONTROLS) if arm == "pte_delta" else (arm,))
        ]
        if arm in RULES and level.name == "chained-8w":
            size = Label("rules", level.task, arm, stage="warm_start", seed=seed)
            readings.append(Reading(size, config, kind="state_size"))
        yield TrainedPart(
            name=f"arms-{level.name}-{arm}-seed{seed}",
            config=config,
            arm=arm,
            readings=tuple(readings),
            cost=label(level, arm, stage="warm_start", seed=seed, question="training"),
            shown=seed == 0 and level.name == "chained-8w" and arm in ("pte_paper", "pte_delta"),
            after=level.base,
        )


def rl_parts(level: Level, *, seed: int) -> Iterator[TrainedPart]:
    """GRPO after a short warm start, at the first seed also GRPO alone; every score on samples and greedy."""
    stages: tuple[StageName, ...] = ("both",) if seed else ("both", "grpo")
    for arm in RL_ARMS:
        for stage in stages:
            config = seeded(level.config, seed)
            if stage == "grpo":
                config = replace(config, distill=replace(config.distill, steps=0))
            between = () if stage == "grpo" else rl_readings(level, arm, config, stage="warm_start")
            yield TrainedPart(
                name=f"rl-{level.name}-{arm}-{stage}-seed{seed}",
                config=config,
                arm=arm,
                readings=rl_readings(level, arm, config, stage=stage),
                between=between,
                curve=label(level, arm, stage=stage, seed=seed, question="rl"),
                after=level.base,
            )


def rl_readings(level: Level, arm: str, config: ExperimentConfig, *, stage: StageName) -> tuple[Reading, ...]:
    """Greedy accuracy, and the expected reward on samples, which is what GRPO raises."""
    sampled = replace(config.eval, temperature=1.0, samples_per_problem=4, problems=256)
    return tuple(
        Reading(
            Label("stages", level.task, arm, stage=stage, seed=config.run.seed, setting={"sampling": name}),
            replace(config, eval=scores),
        )
        for name, scores in (("greedy", config.eval), ("temperature 1", sampled))
    )


def capacity_parts(level: Level) -> Iterator[TrainedPart | ScoredPart]:
    """Recall of 4 to 128 facts by states of rank 8 to 64 and by the base with its full cache."""
    readings = tuple(
        Reading(Label("capacity", level.task, "base_full", setting={"facts": facts}), level.with_facts(facts))
        for facts in CAPACITY_FACTS
    )
    yield ScoredPart("capacity-base", readings, after=level.base)
    for facts in CAPACITY_FACTS:
        for rank in (8, 32, 64):
            config = level.with_facts(facts)
            config = replace(config, adapter=replace(config.adapter, rank=rank))
            about = Label("capacity", level.task, "pte_delta", "warm_start", setting={"facts": facts, "rank": rank})
            yield TrainedPart(
                name=f"capacity-{facts}facts-rank{rank}-pte_delta-seed0",
                config=config,
                arm="pte_delta",
                readings=(Reading(about, config),),
                after=level.base,
            )


def forgetting_parts(level: Level, *, seed: int) -> Iterator[TrainedPart]:
    """Streams that ask for far more facts than a state holds: accuracy by how many evictions ago a value left."""
    longer = level.stream(windows=FORGETTING_WINDOWS)
    for arm in RULES:
        about = Label("forgetting", level.task, arm, "warm_start", seed)
        yield TrainedPart(
            name=f"forgetting-{arm}-seed{seed}",
            config=seeded(level.config, seed),
            arm=arm,
            readings=(Reading(about, seeded(longer, seed), kind="age"),),
            after=level.base,
        )


def length_parts(level: Level) -> Iterator[TrainedPart]:
    """Streams that ask for facts that a state can hold, far beyond the length of the training."""
    for arm in LENGTH_ARMS:
        readings = []
        for beyond in WINDOWS_BEYOND_TRAINING:
            windows = level.windows + beyond
            setting: dict[str, float | str] = {"windows": windows, "trained_windows": level.windows}
            about = Label("length", level.task, arm, "warm_start", setting=setting)
            readings.append(Reading(about, level.stream(windows=windows)))
        yield TrainedPart(
            name=f"length-{arm}-seed0",
            config=level.config,
            arm=arm,
            readings=tuple(readings),
            after=level.base,
        )


def ablation_parts(level: Level) -> Iterator[TrainedPart]:
    """One factor at a time, in a training short enough to leave room; the first part is what all others vary."""
    config = replace(level.config, distill=replace(level.config.distill, steps=60))
    yield ablation(level, config, factor="reference", value="reference")
    for factor, values in ADAPTER_FACTORS.items():
        for value, change in values.items():
            adapter = replace(config.adapter, **change)  # type: ignore[arg-type]
            yield ablation(level, replace(config, adapter=adapter), factor=factor, value=value)
    for value, mode, horizon in GRADIENT_MODES:
        distill = replace(config.distill, gradient_mode=mode, horizon=horizon)
        yield ablation(level, replace(config, distill=distill), factor="gradient_mode", value=value)
    for evict in (1, 2, 5, 10):
        cache = CacheConfig(window_tokens=20, evict_tokens=evict)
        yield ablation(level, replace(config, cache=cache), factor="evicted of 20 tokens", value=f"{5 * evict} %")


ALL_MAPS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTER_FACTORS: dict[str, dict[str, dict[str, object]]] = {
    "global_tokens": {str(count): {"global_tokens": count} for count in (0, 8, 64)},
    "rank": {str(rank): {"rank": rank} for rank in (8, 16, 64)},
    "adapted maps": {
        "q, v": {"targets": ("q_proj", "v_proj")},
        "q, o, up, down": {"targets": ("q_proj", "o_proj", "up_proj", "down_proj")},
        "attention": {"targets": ALL_MAPS[:4]},
        "mlp": {"targets": ALL_MAPS[4:]},
    },
    "adapted layers": {"first": {"layers": (0,)}, "middle": {"layers": (1,)}, "last": {"layers": (2,)}},
    "keys": {"after rotary": {"key_space": "post_rotary"}},
    "start of B": {"random": {"down_start": "random"}},
}
GRADIENT_MODES: tuple[tuple[str, GradientMode, int], ...] = (
    ("exact", "exact", 1),
    ("horizon 1", "horizon", 1),
    ("horizon 4", "horizon", 4),
    ("horizon 16", "horizon", 16),
)


def ablation(level: Level, config: ExperimentConfig, *, factor: str, value: str) -> TrainedPart:
    """One variant."""
    about = Label("ablation", level.task, "pte_delta", "warm_start", setting={"factor": factor, "value": value})
    name = f"ablation-{factor}-{value}".replace(" ", "_").replace(",", "").replace("%", "percent")
    return TrainedPart(
        name=f"{name}-seed0",
        config=config,
        arm="pte_delta",
        readings=(Reading(about, config),),
        cost=about,
        after=level.base,
    )


def transfer_parts(levels: dict[str, Level]) -> Iterator[TrainedPart]:
    """Trained on one task or on both in turns, and read on each, all on the base that knows both."""
    single = [levels["puzzles-permutation"], levels["puzzles-multiplication"]]
    for trained in (*single, levels["puzzles-mixture"]):
        readings = []
        for one in single:
            setting: dict[str, float | str] = {"trained_on": trained.task, "read_on": one.task}
            about = Label("transfer", "puzzles", "pte_delta", "warm_start", setting=setting)
            readings.append(Reading(about, one.config))
        yield TrainedPart(
            name=f"transfer-{trained.task}-seed0",
            config=trained.config,
            arm="pte_delta",
            readings=tuple(readings),
            after=trained.base,
        )


def cost_parts(level: Level) -> Iterator[CostPart]:
    """Speed, FLOPs and memory of each arm on completions of 128 tokens; time and memory of each gradient mode."""
    config = replace(
        level.config,
        rollout=replace(level.config.rollout, max_new_tokens=128),
        train=replace(level.config.train, steps=1, prompts_per_step=8, group_size=4, micro_batch_size=32),
    )
    for arm in COST_ARMS:
        about = Label("cost", level.task, arm)
        yield CostPart(f"cost-{arm}", about, config, lengths=MEMORY_TOKENS, after=level.base)
    reference: tuple[str, GradientMode, int] = ("reference", "chain", 1)
    for value, mode, horizon in (reference, *GRADIENT_MODES):
        setting = {"factor": "reference" if value == "reference" else "gradient_mode", "value": value}
        about = Label("ablation", level.task, "pte_delta", "warm_start", setting=setting)
        train = replace(config.train, gradient_mode=mode, horizon=horizon)
        yield CostPart(
            f"cost-mode-{value}".replace(" ", "_"),
            about,
            replace(config, train=train),
            metrics=("peak_memory_bytes", "update_tokens_per_second"),
            after=level.base,
        )
