"""What a run is: one frozen dataclass per section of an experiment file, checked when it is made.

Decides: the fields, their defaults and the rules that a value must obey before any work. Every refusal gives name,
rule, value and remedy. Does not know: files and flags (`config_file.py`), nor what the fields are used for.
The sections on the policy are in `config_policy.py`, those on what it goes through in `config_stages.py`.
There is no top-p and no top-k: the policy would then sample from another distribution than the one that is scored.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from pte.config_policy import AdapterConfig, CacheConfig, LinearMap, ModelConfig
from pte.config_rules import check_types, require, require_at_least
from pte.config_stages import DistillConfig, EvalConfig, RolloutConfig, TrainConfig
from pte.tasks.families import FAMILIES

GeneratedKind = Literal["chained", "recall", "permutation", "multiplication"]

__all__ = [
    "AdapterConfig",
    "CacheConfig",
    "DistillConfig",
    "EvalConfig",
    "ExperimentConfig",
    "LinearMap",
    "ModelConfig",
    "RolloutConfig",
    "RunConfig",
    "TaskConfig",
    "TrainConfig",
]


@dataclass(frozen=True)
class TaskConfig:
    """Problems with verifiable answers."""

    kind: Literal["chained", "recall", "permutation", "multiplication", "mixture", "jsonl"] = "chained"
    """`chained`: generated chained assignments; `recall`: facts of the policy's own choice, asked for later;
    `permutation`: composition in S5, revealed now and then; `multiplication`: long, with written partial products;
    `mixture`: several of these; `jsonl`: files with lines of id, problem, answer, source."""
    mixture: tuple[GeneratedKind, ...] = ()
    """Mixture: two or more kinds of generated problems, which take turns in training."""
    train_path: str | None = None
    """JSONL file of training problems."""
    eval_paths: tuple[str, ...] = ()
    """JSONL files of problems to evaluate on."""
    prompt_template: Literal["auto", "chat", "plain"] = "auto"
    """JSONL: `chat` is the tokenizer's template, `plain` is "Problem: ... Solution:", `auto` is chat if it can be."""
    boxed_instruction: bool = True
    """JSONL: append "Please reason step by step, and put your final answer within \\boxed{}."."""
    traces_path: str | None = None
    """JSONL: file with lines of id and trace, right completions; training problems without one are left out."""
    reward: str = "exact"
    """`math` (math-verify on the boxed answer), `exact` (the answer itself), or your own as `module:function`."""
    num_statements: int = 13
    """Chained: statements in a prompt; the trace has ten tokens for each, plus four."""
    num_constants: int = 4
    """Chained: variables whose values the prompt gives."""
    modulus: int = 10
    """Chained: sums are taken modulo this."""
    min_distance: int = 1
    """Chained: fewest statements between the last mention of a result and its next use."""
    max_distance: int | None = None
    """Chained: most statements between the two; unset for no bound."""
    num_names: int | None = None
    """Chained: variable names to draw from; unset for all 60."""
    num_facts: int = 16
    """Recall: facts that the policy writes; the trace has a token for each, two for each query, and an end token."""
    num_queries: int = 8
    """Recall: facts that it is asked for."""
    num_keys: int = 128
    """Recall: keys that follow each other; in a stream they are written again and again."""
    max_age: int | None = None
    """Recall: makes a stream of facts with a query about one of the last max_age after every second; unset for all
    queries at the end."""
    num_reveals: int = 4
    """Permutation: how often the trace writes the running permutation, the answer included."""
    steps_per_reveal: int = 6
    """Permutation: steps between two reveals; the trace has two tokens for each, five for a reveal, plus two."""
    moves_per_reveal: int = 3
    """Permutation: how many of these steps apply a generator, the others rest."""
    num_generators: int = 2
    """Permutation: generators to draw from, of swap, turn and flip."""
    left_digits: int = 3
    """Multiplication: digits of the first factor."""
    right_digits: int = 2
    """Multiplication: digits of the second factor; each gets a row of the trace."""

    def __post_init__(self) -> None:
        check_types(self)
        require(
            self.kind != "jsonl" or self.train_path is not None or bool(self.eval_paths),
            "train_path",
            rule="name a file, or eval_paths some, with kind 'jsonl'",
            value=self.train_path,
            remedy="set train_path to train, eval_paths to evaluate",
        )
        require(
            len(set(self.eval_paths)) == len(self.eval_paths),
            "eval_paths",
            rule="name each file once",
            value=self.eval_paths,
            remedy="drop the repetition",
        )
        require(
            re.fullmatch(r"math|exact|[A-Za-z_][\w.]*:[A-Za-z_]\w*", self.reward) is not None,
            "reward",
            rule="be 'math', 'exact' or 'module:function'",
            value=self.reward,
            remedy="use for example 'my_rewards:short_and_right'",
        )
        require(
            self.kind != "mixture" or len(set(self.mixture)) == len(self.mixture) >= 2,
            "mixture",
            rule="name two or more kinds, each once, with kind 'mixture'",
            value=self.mixture,
            remedy="use for example ['chained', 'recall']",
        )
        for name, least in (("num_statements", 1), ("num_constants", 2), ("modulus", 2), ("min_distance", 1)):
            require_at_least(least, name, value=getattr(self, name), remedy=f"use {least} or more")
        variables = self.num_statements + self.num_constants
        require_at_least(variables, "num_names", value=self.num_names, remedy="leave it out for all names")
        require_at_least(self.min_distance, "max_distance", value=self.max_distance, remedy="leave it out for no bound")
        for name, least in (("num_facts", 1), ("num_queries", 1), ("num_keys", 2), ("max_age", 1)):
            require_at_least(least, name, value=getattr(self, name), remedy=f"use {least} or more")
        for name, least in (
            ("num_reveals", 1),
            ("steps_per_reveal", 1),
            ("moves_per_reveal", 1),
            ("num_generators", 2),
        ):
            require_at_least(least, name, value=getattr(self, name), remedy=f"use {least} or more")
        for name in ("left_digits", "right_digits"):
            require_at_least(1, name, value=getattr(self, name), remedy="use 1 or more")

    @property
    def families(self) -> tuple[str, ...]:
        """Names of the families whose problems are generated; empty for files."""
        return self.mixture if self.kind == "mixture" else () if self.kind == "jsonl" else (self.kind,)


@dataclass(frozen=True)
class RunConfig:
    """Where a run is recorded, and its randomness."""

    name: str = "run"
    """Directory of the run, inside output_dir."""
    output_dir: str = "runs"
    """Directory of all runs."""
    seed: int = 0
    """Of everything random: adapter, problems, sampling."""
    resume: bool = False
    """Go on from the last checkpoint of the run with this name."""
    log_with: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Trackers beside metrics.jsonl, each to be installed by you."""

    def __post_init__(self) -> None:
        check_types(self)
        require(
            re.fullmatch(r"[\w.+-]*\w[\w.+-]*", self.name) is not None and not self.name.startswith(("-", ".")),
            "name",
            rule="be a directory name of letters, digits and _ . + - that starts with none of . -",
            value=self.name,
            remedy="use for example 'gsm8k-pte', and output_dir for the directory above",
        )
        require(
            bool(self.output_dir),
            "output_dir",
            rule="name a directory",
            value=self.output_dir,
            remedy="use 'runs'",
        )
        require(0 <= self.seed < 2**63, "seed", rule="be from 0 to 2**63 - 1", value=self.seed, remedy="use 0")
        require(
            len(set(self.log_with)) == len(self.log_with),
            "log_with",
            rule="name each tracker once",
            value=self.log_with,
            remedy="drop the repetition",
        )


@dataclass(frozen=True)
class ExperimentConfig:
    """A whole run: the sections of an experiment file."""

    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        require(
            not self.task.families or self.eval.problems is not None,
            "eval.problems",
            rule=f"be a number with task.kind {self.task.kind!r} (generated problems have no end)",
            value=self.eval.problems,
            remedy="use for example 512",
        )
        sampled = [name for name in self.task.families if FAMILIES[name].temperature > 0]
        require(
            not sampled or self.eval.temperature > 0,
            "eval.temperature",
            rule=f"be above 0 with problems of {', '.join(map(repr, sampled))} (completions choose values at random)",
            value=self.eval.temperature,
            remedy=f"use {FAMILIES[sampled[0]].temperature if sampled else 1.0}",
        )

    def check_trainable(self) -> None:
        """Refuses a run that has nothing to train, or nothing to train on.

        Raises:
            ValueError: `adapter.kind` is `none`, or a JSONL task has no `task.train_path`.
        """
        require(
            self.adapter.kind != "none",
            "adapter.kind",
            rule="be trainable (the base is frozen)",
            value=self.adapter.kind,
            remedy="use 'thought' or 'lora'",
        )
        require(
            self.task.kind != "jsonl" or self.task.train_path is not None,
            "task.train_path",
            rule="name a file of training problems",
            value=self.task.train_path,
            remedy="set it to a JSONL file, or use pte eval",
        )
