"""From a configuration to a base, an adapter and a task: what training, evaluation and generation have in common.

Decides: how names in a configuration become objects, which adapter options come from a saved adapter, and that
nothing is downloaded, attached or written before the configuration has been checked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from pte.checkpoint_files import AdapterMetadata, check_adapter_fits, fingerprint_of_base
from pte.config import TaskConfig
from pte.learn.rewards import compute_rewards
from pte.lora_folder import is_lora_folder, start_from_lora
from pte.model.load import check_positions, end_token_ids, load_tokenizer
from pte.model.policy import BoundedPolicy
from pte.open_policy import load_policy, sharded_policy
from pte.peft_folder import check_tensors_fit, load_any_adapter
from pte.ranks import ALONE, Ranks
from pte.tasks.chained import embedded_model_dir
from pte.tasks.families import FAMILIES
from pte.tasks.task import Task, generated_task, jsonl_task

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from pte.config import ExperimentConfig


FINGERPRINT_ROWS = 512


@dataclass
class Session:
    """A policy and a task, ready to run.

    Args:
        base_name: As the configuration names it.
        policy: Base, adapter, budget.
        task: Problems and scoring.
        ranks: Processes that share its work.
    """

    base_name: str
    policy: BoundedPolicy
    task: Task
    ranks: Ranks = ALONE

    def adapter_tensors(self) -> dict[str, Tensor]:
        """The adapter's parameters, on the CPU."""
        adapter = self.policy.adapter
        return {} if adapter is None else {name: tensor.detach().cpu() for name, tensor in adapter.state_dict().items()}

    def metadata(self) -> AdapterMetadata:
        """What the adapter is and fits."""
        adapter = self.policy.adapter
        assert adapter is not None
        return AdapterMetadata(
            options=adapter.options(), base_name=self.base_name, base_fingerprint=self.base_fingerprint()
        )

    def base_fingerprint(self) -> str:
        """Of the base, as `base_fingerprint` says."""
        return base_fingerprint(self.policy.base)

    def load_adapter_tensors(self, tensors: Mapping[str, Tensor], metadata: AdapterMetadata) -> None:
        """Fills the adapter from saved tensors.

        Raises:
            ValueError: They belong to another base, were made with other options, or are not all of them.
        """
        adapter = self.policy.adapter
        assert adapter is not None
        check_adapter_fits(
            metadata,
            base_name=self.base_name,
            base_fingerprint=self.base_fingerprint(),
            options=adapter.options(),
        )
        check_tensors_fit(tensors, expected=adapter.state_dict(), base_name=metadata.base_name)
        adapter.load_state_dict(dict(tensors))

    def start_adapter(self, path: str) -> None:
        """Fills the adapter from a checkpoint of a run, from a PEFT folder, or with A and B of a LoRA adapter of PEFT.

        Raises:
            FileNotFoundError, ValueError: There is no such adapter, or it does not fit.
        """
        assert self.policy.adapter is not None
        if is_lora_folder(path):
            start_from_lora(self.policy.adapter, path)
        else:
            self.load_adapter_tensors(*load_any_adapter(path))


def base_fingerprint(base: PreTrainedModel) -> str:
    """Of a base's configuration and the first rows of its embedding."""
    weight = base.get_parameter("model.embed_tokens.weight")
    return fingerprint_of_base(base.config.to_dict(), {"embedding": weight[:FINGERPRINT_ROWS]})


def open_session(
    config: ExperimentConfig,
    *,
    task_of: Callable[[ExperimentConfig, object], Task] | None = None,
    ranks: Ranks = ALONE,
    shard_base: bool = False,
) -> Session:
    """Loads the base, attaches the adapter, opens the task.

    Args:
        config: What to open.
        task_of: Makes the task from the configuration and the base's tokenizer; None for `open_task`.
        ranks: Processes that share the work; each has the adapter of rank 0.
        shard_base: Each has a share of the base's layers, where it would have the whole base.

    Raises:
        ValueError, FileNotFoundError, OSError: Model, adapter or data are missing, unsupported or do not fit.
    """
    if shard_base and ranks.size == 1:
        raise ValueError(
            "--shard-base needs several processes to hold the shards, got 1; start with torchrun or accelerate launch, "
            "or leave it out"
        )
    if shard_base and config.model.dtype == "float8":
        raise ValueError(
            "--shard-base needs a model.dtype whose weights FSDP shards, got 'float8'; set --model.dtype bfloat16, or "
            "leave out --shard-base"
        )
    path = str(embedded_model_dir()) if config.model.path == "embedded" else config.model.path
    if config.adapter.checkpoint is not None and config.adapter.kind == "none":
        raise ValueError(
            f"adapter.checkpoint needs an adapter to fill, got {config.adapter.checkpoint!r} with adapter.kind 'none'; "
            f"leave out one of the two"
        )
    try:
        tokenizer = load_tokenizer(path, trust_remote_code=config.model.trust_remote_code)
    except OSError as error:
        raise FileNotFoundError(
            f"model.path must name a directory with a Transformers checkpoint, or one on the hub, got "
            f"{config.model.path!r} ({str(error).splitlines()[0]}); check the path"
        ) from error
    device = torch.device(ranks.device(config.model.device))
    task = (task_of or open_task)(config, tokenizer)
    policy = sharded_policy(path, config, ranks, device=device) if shard_base else load_policy(path, config, device)
    task = replace(task, more_stop_token_ids=end_token_ids(policy.base))
    session = Session(base_name=config.model.path, policy=policy, task=task, ranks=ranks)
    if config.adapter.checkpoint is not None:
        session.start_adapter(config.adapter.checkpoint)
    if policy.adapter is not None:
        # Made from the same seed, but perhaps on processors that round otherwise.
        ranks.copy_from_first(list(policy.adapter.parameters()))
    return session


def check_problems(session: Session, config: ExperimentConfig) -> None:
    """Refuses, before any work, problems that do not fit the model and a reward function that cannot score.

    Looks at all training and evaluation problems. The reward is asked about two completions
    that are an end token alone, which a policy may write at any time.

    Raises:
        ValueError: A prompt is empty, has tokens that the model does not know, or is, with its completion, longer than
            the trained positions.
        RuntimeError, TypeError, ValueError: The reward function failed (`compute_rewards`).
    """
    task = session.task
    fits = partial(
        check_positions,
        session.policy.base.config,
        allow_beyond_trained_positions=config.model.allow_beyond_trained_positions,
    )
    prompt = task.longest_prompt()
    longest, known = len(prompt), len(session.policy.base.get_parameter("model.embed_tokens.weight"))
    if max(*prompt, *task.stop_token_ids) >= known:
        raise ValueError(
            f"the tokenizer must be the model's own, got token {max(*prompt, *task.stop_token_ids)} for a model of "
            f"{known} tokens; use the tokenizer that was saved with it"
        )
    if config.train.steps or config.distill.source == "teacher":
        fits(prompt_tokens=longest, completion_tokens=config.rollout.max_new_tokens)
    if config.distill.steps and config.distill.source == "traces":
        traces = (task.training(position).trace for position in range(task.num_training))
        lengths = [len(task.completion_ids(trace)) for trace in traces if trace is not None]
        fits(prompt_tokens=longest, completion_tokens=max(lengths, default=0))
    check_evaluation(session, config)
    if config.train.steps:
        problem = task.training(0).problem
        compute_rewards(
            task.reward,
            prompts=[problem.problem] * 2,
            completions=[""] * 2,
            completion_ids=[list(task.stop_token_ids)] * 2,
            columns=task.columns([problem] * 2),
        )


def check_evaluation(session: Session, config: ExperimentConfig) -> None:
    """Refuses, before any work, evaluation problems that do not fit the model.

    Raises:
        ValueError: A prompt is empty or, with its completion, longer than the trained positions.
    """
    for problems in session.task.evaluation.values():
        check_positions(
            session.policy.base.config,
            prompt_tokens=max(len(session.task.prompt_ids(problem)) for problem in problems),
            completion_tokens=config.eval.max_new_tokens,
            allow_beyond_trained_positions=config.model.allow_beyond_trained_positions,
        )


def check_no_idle_fields(task: TaskConfig) -> None:
    """Refuses a task with a field that its kind does not read.

    Raises:
        ValueError: Such a field differs from its default: it would be ignored.
    """
    readers = {name: (family.name,) for family in FAMILIES.values() for name in family.shape_fields}
    readers["mixture"] = ("mixture",)
    for field in fields(task):
        kinds = readers.get(field.name, ("jsonl",))
        value = getattr(task, field.name)
        if field.name in ("kind", "reward") or value == field.default or {task.kind, *task.families} & set(kinds):
            continue
        raise ValueError(
            f"task.{field.name} must be left out with task.kind {task.kind!r}, which does not read it, got {value!r}; "
            f"set task.kind to {kinds[0]!r}, or drop it"
        )


def open_task(config: ExperimentConfig, tokenizer: object) -> Task:
    """The task of a configuration.

    Raises:
        ValueError: A field is set that the task's kind does not read: it would be ignored.
    """
    task = config.task
    check_no_idle_fields(task)
    if task.families:
        assert config.eval.problems is not None
        families = {name: FAMILIES[name] for name in task.families}
        return generated_task(
            tokenizer,  # type: ignore[arg-type]
            families,
            shapes={
                name: {field: getattr(task, field) for field in family.shape_fields}
                for name, family in families.items()
            },
            seed=config.run.seed,
            eval_problems=config.eval.problems,
            reward=task.reward,
        )
    return jsonl_task(
        tokenizer,  # type: ignore[arg-type]
        seed=config.run.seed,
        train_path=task.train_path,
        eval_paths=task.eval_paths,
        eval_problems=config.eval.problems,
        template=task.prompt_template,
        boxed_instruction=task.boxed_instruction,
        reward=task.reward,
        traces_path=task.traces_path,
    )
