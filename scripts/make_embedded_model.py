"""Trains the embedded reasoner: the tiny base model that chained assignments ship with.

    OMP_NUM_THREADS=1 python scripts/make_embedded_model.py

With the defaults this rebuilds the shipped weights. It draws fresh training problems for every
step (never a held-out one), minimises the cross-entropy of the reasoning tokens under the full
cache, then lets Transformers' own greedy `generate` solve held-out problems, and writes weights,
tokenizer, `training.json` and `README.md` into `src/pte/tasks/embedded/`.
"""

import argparse
import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from pte.tasks import chained
from pte.tasks.base_training import BaseSettings, BaseSize, base_completions, print_step, train_base, write_record
from pte.tasks.generated import GeneratedProblem

EVALUATED_STATEMENTS = (1, 2, 4, 6, 8, 10, 11, 12, 13, 14, 15, 16, 18, 20)
WEIGHTED_STATEMENTS = (2, 3, 4, 5, 6, 7, 8, 9, *(10, 11, 12, 13, 14) * 4)
"""Number of statements of a training batch, drawn uniformly: 5 of 7 batches have 10 to 14."""
SIZE = BaseSize(hidden_size=128, intermediate_size=384, num_layers=3, num_heads=4, num_kv_heads=2, max_positions=2048)
"""Few enough parameters for 4 MB in fp32."""


@dataclass(frozen=True)
class Accuracy:
    """How often greedy completions are right."""

    answer_right_fraction: float
    trace_right_fraction: float
    """Every reasoning token right, the answer included."""


def draw_batch(rng: random.Random, count: int) -> list[GeneratedProblem]:
    """Training problems of one shape."""
    min_distance = rng.choice((1, 1, 1, 2, 3))
    return chained.generate_problems(
        count,
        seed=rng.getrandbits(48),
        split="train",
        num_statements=rng.choice(WEIGHTED_STATEMENTS),
        num_constants=rng.choice((3, 4, 4, 4, 5, 6)),
        min_distance=min_distance,
        max_distance=rng.choice((None, None, None, min_distance + 5)),
    )


def heldout_accuracy(folder: Path, *, num_statements: int, count: int) -> Accuracy:
    """How the saved model does on held-out problems: greedy, full cache, free running."""
    problems = chained.generate_problems(count, seed=0, split="heldout", num_statements=num_statements)
    pairs = list(zip(base_completions(folder, problems, temperature=0.0, seed=0), problems, strict=True))
    return Accuracy(
        answer_right_fraction=sum(chained.answer_is_right(text, one.answer) for text, one in pairs) / count,
        trace_right_fraction=sum(chained.trace_is_right(text, one) for text, one in pairs) / count,
    )


def write_page(folder: Path) -> None:
    """The record for people: a README beside the weights."""
    record = json.loads((folder / "training.json").read_text())
    settings = record["settings"]
    page = f"""# The embedded reasoner

A Qwen2 of {record["parameters"]:,} parameters (fp32) that solves chained assignments
(`pte.tasks.chained`) with the full cache, trained from scratch by
`scripts/make_embedded_model.py` with its defaults: seed {settings["seed"]}, {settings["steps"]} steps of
{record["batch"]} traces, {record["threads"]} CPU thread, {record["training_seconds"]:.0f} seconds.
Training problems have 2 to 14 statements and are never held-out ones. `training.json` holds the
record.

Held-out problems ({record["heldout_problems"]} a row), Transformers' greedy `generate`, per cent:

| statements | answer right | whole trace right |
|---|---|---|
"""
    for number, row in record["accuracy_by_num_statements"].items():
        answers, traces = 100 * row["answer_right_fraction"], 100 * row["trace_right_fraction"]
        page += f"| {number} | {answers:.1f} | {traces:.1f} |\n"
    (folder / "README.md").write_text(page)


def main() -> None:
    """Trains, saves, then measures what was saved."""
    parser = argparse.ArgumentParser(description="Trains the embedded reasoner.")
    parser.add_argument("--out", type=Path, default=chained.embedded_model_dir())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=64, help="traces in a step")
    parser.add_argument("--peak-lr", type=float, default=2e-3)
    parser.add_argument("--warmup-steps", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--heldout-problems", type=int, default=512, help="for each number of statements evaluated")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = BaseSettings(
        seed=options.seed, steps=options.steps, peak_lr=options.peak_lr, warmup_steps=options.warmup_steps, size=SIZE
    )
    print(settings, flush=True)
    seconds = train_base(
        options.out,
        vocabulary=chained.vocabulary(),
        draw_batch=lambda rng, done: draw_batch(rng, options.batch),
        settings=settings,
        on_step=print_step,
    )
    accuracy = {}
    for number in EVALUATED_STATEMENTS:
        accuracy[number] = heldout_accuracy(options.out, num_statements=number, count=options.heldout_problems)
        print(f"{number} statements: {accuracy[number]}", flush=True)
    record = {
        "batch": options.batch,
        "threads": options.threads,
        "heldout_problems": options.heldout_problems,
        "accuracy_by_num_statements": {number: asdict(row) for number, row in accuracy.items()},
    }
    write_record(options.out, record, settings, seconds=seconds)
    write_page(options.out)


if __name__ == "__main__":
    main()
