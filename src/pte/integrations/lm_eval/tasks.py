"""Problem files of pte as tasks of the harness: the prompts and the scores of `pte eval`.

Decides: that a document is a problem as it stands in its file, that its prompt is the one `pte eval` builds (one user
turn where the harness applies a chat template, else the plain form), and how samples become scores. Which file and how
many samples a task has, its file in `problems/` says; the directory comes from `--metadata data_dir=DIR`.
Does not know models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from datasets import Dataset
from lm_eval.api.task import ConfigurableTask

from pte.learn.rewards import compute_rewards, math_reward
from pte.tasks.problems import BOXED_INSTRUCTION, load_problems, plain_prompt, question
from pte.tasks.scoring import avg_at_k, pass_at_k

METRICS = ("score", "accuracy")
"""`score`: the number in a suite's table, pass@k of the task's k samples; `accuracy`: the mean over the samples."""


class ProblemTask(ConfigurableTask):
    """The problems of one file, completed and scored as `pte eval` does.

    Args:
        config: Of a task file: `task`, `dataset_kwargs: {file: NAME}`, `repeats`, and the harness's metadata.
    """

    def __init__(self, config: Mapping[str, object]) -> None:
        repeats = config.get("repeats", 1)
        settings: dict[str, object] = {
            "output_type": "generate_until",
            "custom_dataset": load_documents,
            "test_split": "test",
            "num_fewshot": 0,
            "process_results": score_document,
            "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in METRICS],
            # Length and, for one sample, temperature are the model's: no option is set here for them.
            "generation_kwargs": {"until": [], **({"do_sample": True} if repeats != 1 else {})},
            "filter_list": [{"name": "none", "filter": [{"function": "take_first_k", "k": repeats}]}],
        }
        super().__init__(config={**settings, **{key: value for key, value in config.items() if key != "class"}})

    def doc_to_text(self, doc: Mapping[str, str], doc_to_text: object = None) -> str:
        """What the user asks."""
        return question(doc["problem"], instruction=BOXED_INSTRUCTION)

    def doc_to_target(self, doc: Mapping[str, str], doc_to_target: object = None) -> str:
        """The gold answer."""
        return doc["answer"]

    def fewshot_context(
        self,
        doc: dict[str, str],
        num_fewshot: int,
        system_instruction: str | None = None,
        apply_chat_template: bool = False,
        fewshot_as_multiturn: bool = False,
        chat_template: Callable[..., str] | None = None,
        gen_prefix: str | None = None,
    ) -> str:
        """The prompt of a problem.

        Raises:
            ValueError: A system instruction without a chat template.
        """
        if apply_chat_template:
            context = super().fewshot_context(
                doc=doc,
                num_fewshot=num_fewshot,
                system_instruction=system_instruction,
                apply_chat_template=True,
                fewshot_as_multiturn=fewshot_as_multiturn,
                chat_template=chat_template,
                gen_prefix=gen_prefix,
            )
            assert isinstance(context, str)
            return context
        if system_instruction is not None:
            raise ValueError(
                f"system_instruction needs --apply_chat_template on {self.config.task}, got {system_instruction!r}; "
                f"leave out one of the two"
            )
        return plain_prompt(self.doc_to_text(doc))


def load_documents(*, file: str, data_dir: str | None = None, **ignored: object) -> dict[str, Dataset]:
    """The problems of a file as the harness's documents, in its order.

    Args:
        file: JSONL in the directory.
        data_dir: The directory.
        ignored: The rest of the harness's metadata, model arguments among it.

    Raises:
        ValueError: No directory is given, or a line is no problem.
        FileNotFoundError: There is no such file.
    """
    if data_dir is None:
        raise ValueError(
            f"the task needs the directory that holds {file}, got none; give --metadata data_dir=DIR "
            f"(docs/reproduce.md says what the files are)"
        )
    return {"test": Dataset.from_list([asdict(problem) for problem in load_problems(Path(str(data_dir)) / file)])}


def score_document(doc: Mapping[str, str], results: Sequence[Sequence[str]]) -> dict[str, float]:
    """Pass@k and accuracy of the k samples of one problem, compared as `pte eval` compares.

    Args:
        doc: The problem.
        results: One entry, the texts of all its samples.
    """
    (texts,) = results
    rewards = compute_rewards(
        math_reward,
        prompts=[doc["problem"]] * len(texts),
        completions=list(texts),
        completion_ids=[[]] * len(texts),
        columns={name: [doc[name]] * len(texts) for name in ("answer", "id", "source")},
    )
    correct = torch.tensor([rewards], dtype=torch.float64) == 1.0
    return {"score": pass_at_k(correct, len(texts)), "accuracy": avg_at_k(correct)}
