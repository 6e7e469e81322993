"""What each command of `pte` takes: its arguments, its examples, and the overview of all.

Decides: names, defaults and help of flags; tyro reads them. Imports nothing heavy, so that `--help` is quick.
Does not know how words become arguments (`cli`) or what a command does (`commands`).
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

import tyro

from pte.config import CacheConfig, ExperimentConfig

Flattened = Annotated[ExperimentConfig, tyro.conf.arg(name="")]

OVERVIEW = """usage: pte COMMAND [EXPERIMENT.toml] [flags]

Train reasoning models by RL while their KV cache never exceeds a fixed budget.

commands:
  train     warm start and GRPO of one policy, then its evaluation
  distill   the warm start alone
  eval      accuracy, length, evictions and cache bytes of a policy on problem sets
  generate  completions of prompts under a bounded cache
  serve     an OpenAI-compatible server: several adapters of one base, memory fixed at the start
  compare   the main job: base, LoRA and PTE arms from one experiment file, a table and a figure
  plan      what fits into a GPU's memory, the largest batch, the longest completion, tokens/s at the roofline
  evidence  what the method is worth: tasks, arms, controls and open questions, measured and reported
  report    one HTML page, figures and tables from the files of any runs
  bench     speed and memory against Transformers, in one run
  doctor    what is installed, which fast paths are on, and whether the laws hold on this machine
  completion  what bash, zsh or fish needs to complete commands, flags and their values

examples:
  pte compare configs/embedded.toml
  pte train configs/gsm8k.toml --train.steps 20 --run.name try
  pte train configs/gsm8k.toml --dry-run
  pte eval configs/embedded.toml --adapter.checkpoint runs/embedded/pte
  pte eval --cache.policy none --eval.problems 128
  pte generate configs/embedded.toml --prompt "A3 B5 #1 A B C ? C"
  pte serve sums=runs/embedded/pte --window-tokens 16 --evict-tokens 4 --max-new-tokens 512
  pte plan --model qwen2.5-7b --gpu-memory 80GB --window 1024 --completion 8192
  pte evidence --preset quick
  pte report runs/embedded --output report.html
  pte bench --preset cpu
  pte doctor
  source <(pte completion bash)

`pte COMMAND --help` lists the flags of a command."""

EXAMPLES = {
    "train": "pte train configs/gsm8k.toml --train.steps 20 --run.name try\n"
    "  pte train configs/gsm8k.toml --dry-run\n  pte train configs/gsm8k.toml --run.name try --run.resume",
    "distill": "pte distill configs/embedded.toml --distill.steps 200 --run.name warm",
    "eval": "pte eval configs/embedded.toml --adapter.checkpoint runs/embedded/pte\n"
    "  pte eval --cache.window-tokens 64 --cache.evict-tokens 16 --adapter.kind none --output scores.json\n"
    "  pte eval configs/paper-qwen2.5-3b.toml --suite math6 --data-dir data --adapter.kind none",
    "generate": 'pte generate --adapter.kind none --prompt "A3 B5 #1 A B C #2 C A D ? D"',
    "serve": "pte serve sums=runs/embedded/pte --window-tokens 16 --evict-tokens 4 --max-new-tokens 512\n"
    "  pte serve math=runs/math/pte code=runs/code/pte --model Qwen/Qwen2.5-3B-Instruct "
    "--device cuda --dtype bfloat16 --slots 64",
    "compare": "pte compare configs/embedded.toml\n  pte compare configs/embedded.toml --run.resume",
    "plan": "pte plan --model qwen2.5-7b --gpu-memory 80GB --window 1024 --completion 8192 --group 8\n"
    "  pte plan configs/paper-qwen2.5-7b.toml --model qwen2.5-7b --gpu a100-40gb --host-memory 200GB\n"
    "  pte plan configs/embedded.toml --host-memory 8GB --prompt 32 --output plan.json",
    "evidence": "pte evidence --preset quick\n  pte evidence --preset full --minutes 25\n"
    "  pte evidence --preset full --only ablation --workers 1",
    "report": "pte report runs/embedded\n  pte report runs/seed0 runs/seed1 runs/seed2 --output seeds.html\n"
    "  pte report runs/evidence --output report.html --figures docs/figures --markdown docs/evidence.md",
    "bench": "pte bench --preset cpu --output cpu.json\n"
    "  pte bench --preset gpu --part rollout long --output benchmarks/baselines/h200-7b-w1024.json\n"
    "  pte bench --preset gpu --model tiny --device cpu",
    "doctor": "pte doctor\n  pte doctor --output doctor.json",
    "completion": "pte completion bash\n  pte completion zsh\n  pte completion fish",
}


@dataclasses.dataclass(frozen=True)
class TrainArguments:
    """Warm start and GRPO of one policy.

    Several processes share a run under torchrun or accelerate launch: torchrun --nproc-per-node 8 -m pte train
    configs/gsm8k.toml --model.device cuda (docs/distributed.md).
    """

    experiment: Flattened
    dry_run: bool = False
    """Run the worst case once (longest prompt, longest completion, one update), print its peak memory, keep nothing."""
    shard_base: bool = False
    """Under torchrun or accelerate launch: each process holds a share of the base's layers (FSDP2), which are gathered
    one at a time; for a base that one device cannot hold. Without it each process holds the whole base."""


@dataclasses.dataclass(frozen=True)
class CompareArguments:
    """Base, LoRA and PTE arms of one experiment."""

    experiment: Flattened
    workers: int | None = None
    """Arms trained at once, one CPU thread each; unset for one per core (on a GPU: 1)."""


@dataclasses.dataclass(frozen=True)
class EvalArguments:
    """Scores of a policy on problem sets."""

    experiment: Flattened
    train_path: str | None = None
    """Training problems of the policy: warns where the evaluation sets overlap with them."""
    suite: Literal["math6"] | None = None
    """Score a suite instead of the experiment's sets; `math6`: the six of the paper's tables, AIME as pass@16."""
    data_dir: str | None = None
    """Directory with the problem files of the suite."""
    output: str | None = None
    """Write the scores to this JSON file."""
    completions: str | None = None
    """Write every completion to this JSONL file."""
    rollouts: str | None = None
    """Write a few completions with log-probs, evictions and states to this JSON file; as rollouts.json in a run's
    directory, `pte report` shows it."""


@dataclasses.dataclass(frozen=True)
class GenerateArguments:
    """Completions under a bounded cache."""

    experiment: Flattened
    prompt: tuple[str, ...] = ()
    """Problems to complete; one argument each."""
    problems: str | None = None
    """JSONL file of problems to complete."""


@dataclasses.dataclass(frozen=True)
class ServeArguments:
    """An OpenAI-compatible server: /v1/completions, /v1/chat/completions, /v1/models, /health.

    Several adapters of one base and the base alone are models, each with its own slots under the same window: give the
    one that the adapters were trained under; a PEFT folder brings its own. All memory is taken at the start and never
    grows: a full house queues, and past the queue answers 503.
    """

    adapters: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[NAME=]ADAPTER...")] = ()
    """Saved adapters, runs or PEFT folders (peft_type PTE); requests name them by NAME or the last part of the path."""
    model: str = "embedded"
    """Directory or hub name of the base, and its name in requests; `embedded` is the tiny reasoner shipped with pte."""
    host: str = "127.0.0.1"
    """Address to listen at; the default is reached from this machine alone, 0.0.0.0 from everywhere."""
    port: int = 8000
    """Port to listen at; 0 for any free one."""
    slots: int = 16
    """Sequences of each model that run at once."""
    max_queue: int = 64
    """Sequences of each model that may wait for a slot."""
    max_prompt_tokens: int = 1024
    """Longest prompt; a slot has room for it and for the window."""
    max_new_tokens: int = 4096
    """Longest completion."""
    top_logprobs: int = 20
    """Likeliest tokens a request may ask for beside each token; 0 records none and saves their cost."""
    api_key: str | None = None
    """What clients must send as their key; unset for the environment's PTE_API_KEY, or none."""
    dtype: Literal["float32", "bfloat16", "float16", "float8"] = "float32"
    """Of the base's weights, keys and values; `float8`: linear maps and cache in it, all else in bfloat16."""
    device: str = "cpu"
    """`cpu`, `cuda`, `cuda:1` or `mps`."""
    trust_remote_code: bool = False
    """Run code that the checkpoint brings along."""
    allow_beyond_trained_positions: bool = False
    """Allow prompt plus completion to exceed the positions that the base was trained on."""
    cache: Annotated[CacheConfig, tyro.conf.arg(name="")] = dataclasses.field(default_factory=CacheConfig)


@dataclasses.dataclass(frozen=True)
class PlanArguments:
    """What an experiment needs, from the configuration of its model alone: full-cache LoRA, LoRA_c and PTE.

    No weights are read. Peak memory of rollout and update by kind, the largest batch and the longest completion that
    fit, and times at the roofline. Without a file, on a GPU, the base is bfloat16 unless --dtype says otherwise, and
    --window without --evict evicts a quarter. Offline, --model takes qwen2.5-3b, qwen2.5-7b, llama-3.1-8b and
    r1-distill-llama-8b. Short for the experiment's flags:
    --model --dtype --rank --window --evict --completion --slots --group --prompts-per-step --micro-batch
    --gradient-mode --horizon --gradient-checkpointing.
    """

    experiment: Flattened
    gpu_memory: str | None = None
    """Memory of the GPU, for example 80GB (10^9 bytes) or 80GiB (2^30); unset for what `gpu` is sold with."""
    host_memory: str | None = None
    """Memory beside the GPU, where evicted keys and values wait; without a GPU, of a machine that trains on its CPU."""
    gpu: Literal["h200", "h100", "a100-80gb", "a100-40gb", "l40s", "rtx4090"] | None = None
    """Whose rates are taken; unset for the one whose memory is nearest."""
    bandwidth: float | None = None
    """Bytes that the GPU's memory moves in a second; unset for its data sheet's."""
    flops: float | None = None
    """Operations of the GPU's matrix products in a second; unset for its data sheet's."""
    prompt: int = 1024
    """Tokens of the longest prompt."""
    output: str | None = None
    """Write the plan to this JSON file."""


PLAN_FLAGS = {
    "--model": "--model.path",
    "--dtype": "--model.dtype",
    "--rank": "--adapter.rank",
    "--window": "--cache.window-tokens",
    "--evict": "--cache.evict-tokens",
    "--completion": "--rollout.max-new-tokens",
    "--slots": "--rollout.slots",
    "--group": "--train.group-size",
    "--prompts-per-step": "--train.prompts-per-step",
    "--micro-batch": "--train.micro-batch-size",
    "--gradient-mode": "--train.gradient-mode",
    "--horizon": "--train.horizon",
    "--gradient-checkpointing": "--train.gradient-checkpointing",
}
"""What is short for what in `pte plan`."""


@dataclasses.dataclass(frozen=True)
class ReportArguments:
    """One self-contained HTML page, figures and tables, from the JSON of any runs and from that alone.

    A run is a directory that pte train, pte compare or pte evidence wrote. Runs of several seeds are averaged. What a
    run has no data for is left out; what is missing or half written is said in a sentence.
    """

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN...")] = ()
    """Run directories."""
    output: str = "report.html"
    """The page."""
    figures: str | None = None
    """Write the figures as PNG files into this directory."""
    markdown: str | None = None
    """Write the tables as Markdown into this file, with links to the figures where they are written."""


@dataclasses.dataclass(frozen=True)
class BenchArguments:
    """Speed and memory against Transformers."""

    preset: str = "cpu"
    """What is measured: `cpu`, the tiny configuration, or `gpu`, real shapes with random weights."""
    part: tuple[str, ...] = ()
    """Parts of gpu: rollout, long, update, step, kernels, float8; unset for all, each at most 9 minutes."""
    model: str | None = None
    """Shape that gpu measures: 3b, 7b, 8b or tiny; unset for 7b."""
    device: str | None = None
    """Where gpu measures: cuda, or cpu for the tiny model; unset for cuda."""
    output: str | None = None
    """Write the result to this JSON file; gpu adds its rows to those that the file holds."""


@dataclasses.dataclass(frozen=True)
class EvidenceArguments:
    """What the method is worth, measured: tasks, arms, controls and open questions, and a report of them.

    A run goes on where it was: parts that are done are not done again.
    """

    preset: Literal["quick", "full"] = "quick"
    """`quick`: two tasks, main arms, one seed, half an hour on 2 cores; `full`: everything, some hours."""
    directory: str | None = None
    """Directory of the run; unset for runs/evidence-PRESET."""
    only: tuple[str, ...] = ()
    """Only parts whose names begin so, for example arms-chained or ablation."""
    workers: int | None = None
    """Parts at once, one CPU thread each; unset for one per core."""
    minutes: float | None = None
    """Start no further part after this many minutes; the next call goes on."""


@dataclasses.dataclass(frozen=True)
class DoctorArguments:
    """What is installed, what the machine offers, which fast paths are on, and whether the laws hold here.

    The embedded reasoner samples under a small window and is replayed, and must agree with Transformers' generate under
    the full cache, on every device. Exit status 0: pte works here; 1: something is wrong, with its remedy.
    """

    output: str | None = None
    """Write the findings to this JSON file, for a report of a fault."""


@dataclasses.dataclass(frozen=True)
class CompletionArguments:
    """A script that completes commands, flags, their values and experiment files, for a shell to read once.

    It calls no Python when a key is pressed; write it again after an update of pte. For bash write it to
    ~/.local/share/bash-completion/completions/pte, or put `source <(pte completion bash)` into ~/.bashrc; for zsh to a
    file `_pte` in a directory of fpath, before compinit; for fish to ~/.config/fish/completions/pte.fish.
    """

    shell: Annotated[Literal["bash", "zsh", "fish"], tyro.conf.Positional]
    """Shell that reads it."""


ARGUMENTS = {
    "train": TrainArguments,
    "distill": TrainArguments,
    "eval": EvalArguments,
    "generate": GenerateArguments,
    "serve": ServeArguments,
    "compare": CompareArguments,
    "plan": PlanArguments,
    "evidence": EvidenceArguments,
    "report": ReportArguments,
    "bench": BenchArguments,
    "doctor": DoctorArguments,
    "completion": CompletionArguments,
}


def takes_experiment(command: str) -> bool:
    """Whether a command's first word may be an experiment file."""
    return any(field.name == "experiment" for field in dataclasses.fields(ARGUMENTS[command]))
