"""Trains the embedded reasoner: the tiny base model that chained assignments ship with.

    OMP_NUM_THREADS=1 python scripts/make_embedded_model.py

With the defaults this rebuilds the shipped weights. It draws fresh training problems for every
step (never a held-out one), minimises the cross-entropy of the reasoning tokens under the full
cache, then lets Transformers' own greedy `generate` solve held-out problems, and writes weights,
tokenizer, `training.json` and `README.md` into `src/pte/tasks/embedded/`.
"""

import argparse
import json
import math
import platform
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from pte.tasks import chained

EVALUATED_STATEMENTS = (1, 2, 4, 6, 8, 10, 11, 12, 13, 14, 15, 16, 18, 20)
WEIGHTED_STATEMENTS = (2, 3, 4, 5, 6, 7, 8, 9, *(10, 11, 12, 13, 14) * 4)
"""Number of statements of a training batch, drawn uniformly: 5 of 7 batches have 10 to 14."""


@dataclass(frozen=True)
class Settings:
    """How the shipped weights are made."""

    seed: int
    steps: int
    batch: int
    """Traces in a step."""
    peak_lr: float
    warmup_steps: int
    threads: int
    heldout_problems: int
    """Problems for each number of statements evaluated."""


@dataclass(frozen=True)
class Accuracy:
    """How often greedy completions are right."""

    answer_right_fraction: float
    trace_right_fraction: float
    """Every reasoning token right, the answer included."""


@dataclass(frozen=True)
class Record:
    """What `training.json` holds."""

    settings: Settings
    parameters: int
    training_seconds: float
    versions: dict[str, str]
    accuracy_by_num_statements: dict[int, Accuracy]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over spaces that puts `<bos>` before what it encodes.

    An unknown word raises: no token stands for it. The empty `auto_map` makes `AutoTokenizer` load
    this class: for models of type qwen2, Transformers 5 otherwise builds its own `Qwen2Tokenizer`
    from the vocabulary, whatever `tokenizer_class` says, and that one reads `A3` as `A` and `3`.
    """
    vocabulary = {token: index for index, token in enumerate(chained.vocabulary())}
    words = Tokenizer(models.WordLevel(vocabulary))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single=f"{chained.BOS_TOKEN} $A",
        special_tokens=[(chained.BOS_TOKEN, vocabulary[chained.BOS_TOKEN])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token=chained.BOS_TOKEN,
        eos_token=chained.EOS_TOKEN,
        pad_token=chained.PAD_TOKEN,
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
        auto_map={"AutoTokenizer": [None, None]},
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    """A fresh Qwen2 of three layers; few enough parameters for 4 MB in fp32."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config)


def draw_batch(rng: random.Random, batch: int, tokenizer: PreTrainedTokenizerFast) -> tuple[torch.Tensor, int]:
    """Token ids (batch, tokens) of problems of one shape, and the length of their prompts."""
    min_distance = rng.choice((1, 1, 1, 2, 3))
    problems = chained.generate_problems(
        batch,
        seed=rng.getrandbits(48),
        split="train",
        num_statements=rng.choice(WEIGHTED_STATEMENTS),
        num_constants=rng.choice((3, 4, 4, 4, 5, 6)),
        min_distance=min_distance,
        max_distance=rng.choice((None, None, None, min_distance + 5)),
    )
    token_ids = tokenizer([f"{problem.problem} {problem.trace}" for problem in problems])["input_ids"]
    return torch.tensor(token_ids), 1 + len(problems[0].problem.split())


def train(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, settings: Settings) -> None:
    """Minimises the cross-entropy of the reasoning tokens; AdamW, warm-up, cosine to zero."""
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings.peak_lr, betas=(0.9, 0.98))
    rng, start = random.Random(settings.seed), time.perf_counter()
    for step in range(settings.steps):
        rise = min(1.0, (step + 1) / settings.warmup_steps)
        fall = 0.5 * (1 + math.cos(math.pi * step / settings.steps))
        for group in optimizer.param_groups:
            group["lr"] = settings.peak_lr * rise * fall
        token_ids, prompt_tokens = draw_batch(rng, settings.batch, tokenizer)
        hidden = model.model(token_ids, use_cache=False).last_hidden_state[:, prompt_tokens - 1 : -1]
        logits, targets = (
            model.lm_head(hidden).flatten(0, 1),
            token_ids[:, prompt_tokens:].flatten(),
        )
        loss = torch.nn.functional.cross_entropy(logits, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 25 == 0 or step == settings.steps - 1:
            right = (logits.argmax(-1) == targets).float().mean().item()
            seconds = time.perf_counter() - start
            print(
                f"step {step:5d}  loss {loss.item():.5f}  right {right:.4f}  {seconds:5.0f} s",
                flush=True,
            )


@torch.no_grad()
def heldout_accuracy(folder: Path, *, num_statements: int, count: int) -> Accuracy:
    """How the saved model does on held-out problems: greedy, full cache, free running."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    problems = chained.generate_problems(count, seed=0, split="heldout", num_statements=num_statements)
    prompts = tokenizer([problem.problem for problem in problems], return_tensors="pt")
    ids = model.generate(**prompts, do_sample=False, max_new_tokens=10 * num_statements + 4)
    completions = tokenizer.batch_decode(ids[:, prompts["input_ids"].shape[1] :])
    pairs = list(zip(completions, problems, strict=True))
    return Accuracy(
        answer_right_fraction=sum(chained.answer_is_right(c, p.answer) for c, p in pairs) / count,
        trace_right_fraction=sum(chained.trace_is_right(c, p) for c, p in pairs) / count,
    )


def write_record(folder: Path, record: Record) -> None:
    """`training.json`, and the same for people: a README beside the weights."""
    (folder / "training.json").write_text(json.dumps(asdict(record), indent=2) + "\n")
    settings = record.settings
    page = f"""# The embedded reasoner

A Qwen2 of {record.parameters:,} parameters (fp32) that solves chained assignments
(`pte.tasks.chained`) with the full cache, trained from scratch by
`scripts/make_embedded_model.py` with its defaults: seed {settings.seed}, {settings.steps} steps of
{settings.batch} traces, {settings.threads} CPU thread, {record.training_seconds:.0f} seconds.
Training problems have 2 to 14 statements and are never held-out ones. `training.json` holds the
record.

Held-out problems ({settings.heldout_problems} a row), Transformers' greedy `generate`, per cent:

| statements | answer right | whole trace right |
|---|---|---|
"""
    for number, row in record.accuracy_by_num_statements.items():
        answers, traces = 100 * row.answer_right_fraction, 100 * row.trace_right_fraction
        page += f"| {number} | {answers:.1f} | {traces:.1f} |\n"
    (folder / "README.md").write_text(page)


def evaluate_and_record(folder: Path, settings: Settings, *, training_seconds: float) -> None:
    """Measures the model saved in a folder and writes the result beside it."""
    accuracy = {}
    for number in EVALUATED_STATEMENTS:
        accuracy[number] = heldout_accuracy(folder, num_statements=number, count=settings.heldout_problems)
        print(f"{number} statements: {accuracy[number]}", flush=True)
    record = Record(
        settings=settings,
        parameters=AutoModelForCausalLM.from_pretrained(folder).num_parameters(),
        training_seconds=round(training_seconds, 1),
        versions={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        accuracy_by_num_statements=accuracy,
    )
    write_record(folder, record)


def main() -> None:
    """Trains, saves, then measures what was saved."""
    parser = argparse.ArgumentParser(description="Trains the embedded reasoner.")
    parser.add_argument("--out", type=Path, default=chained.embedded_model_dir())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--peak-lr", type=float, default=2e-3)
    parser.add_argument("--warmup-steps", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--heldout-problems", type=int, default=512)
    arguments = vars(parser.parse_args())
    folder: Path = arguments.pop("out")
    settings = Settings(**arguments)
    print(settings, flush=True)
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)

    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    start = time.perf_counter()
    train(model, tokenizer, settings)
    seconds = time.perf_counter() - start
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    evaluate_and_record(folder, settings, training_seconds=seconds)


if __name__ == "__main__":
    main()
