"""Bases made here: small Qwen2 models trained from scratch on right reasoning, under the full cache.

Decides: the tokenizer of generated problems, the optimisation (cross-entropy of the reasoning tokens, AdamW, warm-up,
cosine to zero), how a base is measured (Transformers' own `generate`, held-out problems), what is written beside the
weights. Does not know: pte's policies, caches and adapters. The same settings on the same machine with one thread give
the same weights.
"""

from __future__ import annotations

import json
import math
import platform
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from pte.run_record import replace_synced
from pte.tasks.generated import BOS_TOKEN, EOS_TOKEN, PAD_TOKEN, Family, GeneratedProblem

WEIGHTS_FILE = "model.safetensors"
RECORD_FILE = "training.json"
"""Written last: a folder that has it holds a whole base."""


@dataclass(frozen=True)
class BaseStep:
    """How far a training is.

    Args:
        step: From 1.
        steps: In all.
        loss: Mean cross-entropy of the reasoning tokens, nats.
        right_fraction: Of the reasoning tokens that are the likeliest.
        seconds: Since the first.
    """

    step: int
    steps: int
    loss: float
    right_fraction: float
    seconds: float

    def __str__(self) -> str:
        return (
            f"step {self.step:5d}/{self.steps}  loss {self.loss:.5f}  right {self.right_fraction:.4f}  "
            f"{self.seconds:5.0f} s"
        )


def print_step(step: BaseStep) -> None:
    """A line every 25 steps."""
    if step.step % 25 == 1 or step.step == step.steps:
        print(step, flush=True)


DrawBatch = Callable[[random.Random, float], Sequence[GeneratedProblem]]
"""Problems of one training step, all of one length, from a generator and the part of the training done, 0 to 1."""


@dataclass(frozen=True)
class BaseSize:
    """The architecture, a Qwen2 with tied embeddings."""

    hidden_size: int = 128
    intermediate_size: int = 384
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    max_positions: int = 8192
    """`max_position_embeddings`: how far prompt and completion may go together."""
    rope_theta: float = 10_000.0
    """Base of the rotary angles. The larger, the more of a head compares contents at any distance."""
    initializer_range: float = 0.02
    """Standard deviation of fresh weights. Narrow models find their attention patterns sooner from larger ones."""


@dataclass(frozen=True)
class BaseSettings:
    """How the weights are made."""

    seed: int = 0
    steps: int = 1500
    peak_lr: float = 2e-3
    warmup_steps: int = 100
    weight_decay: float = 0.05
    device: str = "cpu"
    size: BaseSize = field(default_factory=BaseSize)


@dataclass(frozen=True)
class BaseAccuracy:
    """How a base does on held-out problems under the full cache."""

    problems: int
    right_fraction: float
    """The family's accuracy."""
    temperature: float
    """0 is greedy."""
    completion_tokens: int
    """Longest completion."""


def build_tokenizer(vocabulary: Sequence[str], *, max_positions: int) -> PreTrainedTokenizerFast:
    """A word-level tokenizer over spaces that puts `<bos>` before what it encodes.

    An unknown word raises: no token stands for it. The empty `auto_map` makes `AutoTokenizer` load this class: for
    models of type qwen2, Transformers 5 otherwise builds its own `Qwen2Tokenizer` from the vocabulary, whatever
    `tokenizer_class` says, and that one reads `A3` as `A` and `3`.
    """
    ids = {token: index for index, token in enumerate(vocabulary)}
    words = Tokenizer(models.WordLevel(ids))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single=f"{BOS_TOKEN} $A", special_tokens=[(BOS_TOKEN, ids[BOS_TOKEN])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        padding_side="left",
        model_max_length=max_positions,
        clean_up_tokenization_spaces=False,
        auto_map={"AutoTokenizer": [None, None]},
    )


def build_model(tokenizer: PreTrainedTokenizerFast, size: BaseSize) -> Qwen2ForCausalLM:
    """A fresh model for a tokenizer; its weights come from torch's global generator."""
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=size.hidden_size,
            intermediate_size=size.intermediate_size,
            num_hidden_layers=size.num_layers,
            num_attention_heads=size.num_heads,
            num_key_value_heads=size.num_kv_heads,
            max_position_embeddings=size.max_positions,
            rope_parameters={"rope_theta": size.rope_theta, "rope_type": "default"},
            initializer_range=size.initializer_range,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def train_base(
    folder: Path,
    *,
    vocabulary: Sequence[str],
    draw_batch: DrawBatch,
    settings: BaseSettings,
    on_step: Callable[[BaseStep], None],
) -> float:
    """Trains a base, saves weights and tokenizer into a folder, returns the seconds that training took.

    Args:
        folder: Made where it does not exist.
        vocabulary: Tokens in the order of their ids.
        draw_batch: Training problems of a step, of one length each (prompts alike, traces alike).
        settings: Seed, size, optimisation.
        on_step: Called after each step.
    """
    torch.manual_seed(settings.seed)
    tokenizer = build_tokenizer(vocabulary, max_positions=settings.size.max_positions)
    model = build_model(tokenizer, settings.size).to(settings.device)  # type: ignore[arg-type]
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings.peak_lr, betas=(0.9, 0.98))
    rng, start = random.Random(settings.seed), time.perf_counter()
    for step in range(settings.steps):
        rise = min(1.0, (step + 1) / settings.warmup_steps)
        fall = 0.5 * (1 + math.cos(math.pi * step / settings.steps))
        for group in optimizer.param_groups:
            group["lr"] = settings.peak_lr * rise * fall
        token_ids, prompt_tokens = encode_batch(draw_batch(rng, step / settings.steps), tokenizer)
        token_ids = token_ids.to(settings.device)
        hidden = model.model(token_ids, use_cache=False).last_hidden_state[:, prompt_tokens - 1 : -1]
        logits, targets = model.lm_head(hidden).flatten(0, 1), token_ids[:, prompt_tokens:].flatten()
        loss = torch.nn.functional.cross_entropy(logits, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        right = (logits.argmax(-1) == targets).float().mean().item()
        on_step(BaseStep(step + 1, settings.steps, loss.item(), right, time.perf_counter() - start))
    seconds = time.perf_counter() - start
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return seconds


def encode_batch(problems: Sequence[GeneratedProblem], tokenizer: PreTrainedTokenizerFast) -> tuple[torch.Tensor, int]:
    """Token ids (batch, tokens) of prompts with their traces, and the length of the prompts with `<bos>`.

    Raises:
        ValueError: The problems differ in length.
    """
    token_ids = tokenizer([f"{problem.problem} {problem.trace}" for problem in problems])["input_ids"]
    prompts = {1 + len(problem.problem.split()) for problem in problems}
    lengths = {len(ids) for ids in token_ids}
    if len(prompts) != 1 or len(lengths) != 1:
        raise ValueError(
            f"problems of a training step must be of one length, got prompts of {sorted(prompts)} tokens, with their "
            f"traces {sorted(lengths)}; draw one shape a step"
        )
    return torch.tensor(token_ids), prompts.pop()


@torch.no_grad()
def base_completions(
    folder: Path, problems: Sequence[GeneratedProblem], *, temperature: float, seed: int, device: str = "cpu"
) -> list[str]:
    """What a saved base writes on problems of one length, by Transformers' own `generate` and the full cache.

    Args:
        folder: Weights and tokenizer.
        problems: Their traces say how long a completion may be.
        temperature: 0 for greedy.
        seed: Of the samples.
        device: Where the model runs.
    """
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.to(torch.device(device))  # type: ignore[arg-type]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = tokenizer([problem.problem for problem in problems], return_tensors="pt").to(device)
    longest = max(len(problem.trace.split()) for problem in problems)
    torch.manual_seed(seed)
    ids = model.generate(  # type: ignore[misc]
        **prompts,
        do_sample=temperature > 0,
        temperature=temperature or 1.0,
        top_k=0 if temperature else None,
        max_new_tokens=longest,
    )
    return tokenizer.batch_decode(ids[:, prompts["input_ids"].shape[1] :])


def measure_base(
    folder: Path, family: Family, *, shape: Mapping[str, int | None], count: int, device: str = "cpu"
) -> BaseAccuracy:
    """How often a saved base is right on held-out problems of one shape.

    Completions are greedy, or sampled for a family whose completions choose something at random.
    """
    problems = family.generate(count, seed=0, split="heldout", **shape)
    completions = base_completions(folder, problems, temperature=family.temperature, seed=0, device=device)
    right = family.accuracy(completions=completions, answer=[problem.answer for problem in problems])
    return BaseAccuracy(
        problems=count,
        right_fraction=sum(float(one or 0) for one in right) / count,
        temperature=family.temperature,
        completion_tokens=max(len(problem.trace.split()) for problem in problems),
    )


def is_complete(folder: Path, settings: BaseSettings) -> bool:
    """Whether a folder holds a base made with these settings, measured and recorded."""
    path = folder / RECORD_FILE
    if not path.is_file() or not (folder / WEIGHTS_FILE).is_file():
        return False
    return bool(json.loads(path.read_text())["settings"] == asdict(settings))


def write_record(folder: Path, record: Mapping[str, object], settings: BaseSettings, *, seconds: float) -> None:
    """`training.json`: the settings, the versions, what was measured. Written last, so that it says "complete".

    Args:
        folder: Of the weights.
        record: What the caller measured, plain values.
        settings: How the weights were made.
        seconds: That training took.
    """
    content = {
        "settings": asdict(settings),
        "parameters": AutoModelForCausalLM.from_pretrained(folder).num_parameters(),
        "training_seconds": round(seconds, 1),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        **record,
    }
    replace_synced(folder / RECORD_FILE, (json.dumps(content, indent=2) + "\n").encode())
