"""Short runs of the embedded reasoner: four statements, traces of 44 tokens, a window of 16, seconds in all."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from pte.config import ExperimentConfig
from pte.session import Session, open_session
from pte.tasks.chained import embedded_model_dir, generate_problems

SHORT = {
    "adapter.rank": 4,
    "adapter.global_tokens": 2,
    "cache.window_tokens": 16,
    "cache.evict_tokens": 4,
    "task.num_statements": 4,
    "rollout.max_new_tokens": 56,
    "rollout.slots": 16,
    "distill.steps": 2,
    "distill.batch_size": 4,
    "train.steps": 2,
    "train.prompts_per_step": 2,
    "train.group_size": 4,
    "train.micro_batch_size": 8,
    "train.learning_rate": 1e-3,
    "eval.problems": 4,
    "eval.max_new_tokens": 56,
}


def short_settings(changes: dict[str, object]) -> dict[str, object]:
    """The short settings with changes, by dotted name; problems of a file have no number of statements."""
    settings = {**SHORT, **{name.replace("__", "."): value for name, value in changes.items()}}
    if settings.get("task.kind") == "jsonl":
        settings.pop("task.num_statements")
    return settings


def short_config(**changes: object) -> ExperimentConfig:
    """The short settings with changes, written `section__key=value`."""
    settings = short_settings(changes)
    sections: dict[str, dict[str, object]] = {}
    for name, value in settings.items():
        section, _, key = name.partition(".")
        sections.setdefault(section, {})[key] = value
    config = ExperimentConfig()
    return replace(config, **{name: replace(getattr(config, name), **values) for name, values in sections.items()})


def short_flags(**changes: object) -> list[str]:
    """The same for the command line."""
    flags = []
    for name, value in short_settings(changes).items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            flags.append(flag if value else flag.replace(".", ".no-"))
        else:
            flags += [flag, *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return flags


def open_short(*, double: bool = True, moved: bool = True, **changes: object) -> tuple[ExperimentConfig, Session]:
    """A session; in float64 where results must be exact, with an adapter that changes the model where `moved`."""
    config = short_config(**changes)
    session = open_session(config)
    adapter = session.policy.adapter
    if moved and adapter is not None:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in adapter.named_parameters():
                if name.endswith(".up"):
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    if double:
        session.policy.base.double()
        if adapter is not None:
            adapter.double()
    return config, session


def odd_ids(completion_ids: list[list[int]], **_: object) -> list[float]:
    """A reward that splits every group: whether the ids of a completion add up to an odd number."""
    return [float(sum(ids) % 2) for ids in completion_ids]


def tied(completion_ids: list[list[int]], **_: object) -> list[float]:
    """A reward that ties every group."""
    return [0.5] * len(completion_ids)


def rewarded(session: Session, reward: object) -> Session:
    """The same session with another reward, which also counts as accuracy."""
    return replace(session, task=replace(session.task, reward=reward, accuracy=reward))


def parameters(session: Session) -> dict[str, torch.Tensor]:
    adapter = session.policy.adapter
    assert adapter is not None
    return {name: parameter.detach().clone() for name, parameter in adapter.named_parameters()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max((one[name] - other[name]).abs().max().item() for name in one)


def text_model(directory: Path) -> Path:
    """The embedded reasoner with a chat template that shows the problem alone, so that JSONL tasks can use it."""
    path = directory / "model"
    shutil.copytree(embedded_model_dir(), path)
    config = json.loads((path / "tokenizer_config.json").read_text())
    config["chat_template"] = "<bos> {{ messages[0]['content'] }}"
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def write_problems(path: Path, count: int = 8, *, seed: int = 3) -> Path:
    """Chained problems as a problem file."""
    drawn = generate_problems(count, seed=seed, split="train", num_statements=4)
    rows = [{"id": one.id, "problem": one.problem, "answer": one.answer, "source": one.source} for one in drawn]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_traces(path: Path, count: int = 8, *, seed: int = 3) -> Path:
    """Their right traces."""
    drawn = generate_problems(count, seed=seed, split="train", num_statements=4)
    path.write_text("".join(json.dumps({"id": one.id, "trace": one.trace}) + "\n" for one in drawn))
    return path
