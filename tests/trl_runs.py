"""Trainers of TRL on the embedded reasoner: chained problems, groups of four, a window of 8, seconds in all."""

from __future__ import annotations

from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from trl import GRPOConfig

from peft_models import shake, thought_adapter
from pte.integrations.peft import PTEConfig
from pte.integrations.trl import PTEGRPOTrainer
from pte.tasks.chained import embedded_model_dir, generate_problems
from short_runs import odd_ids

STOPS = [2, 11, 13]
"""The reasoner's end token, and its digits 6 and 8, for completions of many lengths."""
BUDGET = {"r": 4, "global_tokens": 2, "window_tokens": 8, "evict_tokens": 2}
# Two updates on each batch of eight completions, each in two iterations, beside the frozen reference.
SHORT = {
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "steps_per_generation": 2,
    "num_generations": 4,
    "num_iterations": 2,
    "beta": 0.05,
    "max_completion_length": 30,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "report_to": [],
    "save_strategy": "no",
    "bf16": False,
    "use_cpu": True,
    "disable_tqdm": True,
    "seed": 3,
}


def problems(count: int = 8, *, statements: int = 2) -> Dataset:
    drawn = generate_problems(count, seed=1, split="train", num_statements=statements)
    return Dataset.from_list([{"prompt": one.problem, "answer": one.answer} for one in drawn])


def ragged_problems() -> Dataset:
    """Prompts of two lengths in turns; the longer ones need more tokens than `SHORT` lets them have."""
    short, long = problems(4), problems(4, statements=4)
    return Dataset.from_list([row for pair in zip(short, long, strict=True) for row in pair])


def arguments(directory: Path, **changes: object) -> GRPOConfig:
    return GRPOConfig(str(directory), **{**SHORT, **changes})


def embedded_base(dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(embedded_model_dir(), dtype=dtype)


def trainer_of(
    directory: Path,
    *,
    model: str | PreTrainedModel | PeftModel | None = None,
    dataset: Dataset | None = None,
    budget: dict[str, object] | None = None,
    reward: object = odd_ids,
    options: dict[str, object] | None = None,
    **changes: object,
) -> PTEGRPOTrainer:
    """A trainer of a fresh adapter on the reasoner in float64, or of a given model."""
    model = embedded_base() if model is None else model
    config = None if isinstance(model, PeftModel) else PTEConfig(**{**BUDGET, **(budget or {})})
    return PTEGRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=arguments(directory, **changes),
        train_dataset=problems() if dataset is None else dataset,
        processing_class=AutoTokenizer.from_pretrained(embedded_model_dir()),
        peft_config=config,
        **(options or {}),
    )


def moved_trainer(directory: Path, **settings: object) -> PTEGRPOTrainer:
    """The same with an adapter that changes the reasoner visibly, in float64 like its base, and more stop tokens."""
    base = embedded_base()
    base.generation_config.eos_token_id = STOPS
    trainer = trainer_of(directory, model=base, **settings)
    shake(thought_adapter(trainer.model), seed=0).double()
    for name, parameter in thought_adapter(trainer.model).named_parameters():
        if name.endswith(".up"):
            parameter.data *= 0.1
    # TRL sets it in its loop: micro-batches that add to one optimizer step.
    trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation
    return trainer


def rows_of(trainer: PTEGRPOTrainer) -> list[dict[str, object]]:
    """Two problems, each as often as a group has completions, in TRL's order."""
    return [row for index in range(2) for row in [trainer.train_dataset[index]] * trainer.num_generations]


def snapshot(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def logged(trainer: PTEGRPOTrainer, name: str) -> list[float]:
    return [row[name] for row in trainer.state.log_history if name in row]
