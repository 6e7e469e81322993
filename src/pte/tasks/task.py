"""What a run needs of its problems: prompts as tokens, an endless seeded order, rewards, accuracy, right traces.

Decides: the order in which training problems come (a pure function of seed and position, so that a resumed run needs
only the position), and how the two kinds of task, generated problems (one family or a mixture) and JSONL files, look
the same to the stages. Does not know policies or rollouts.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pte.learn.rewards import RewardFunction, exact_reward, load_reward, math_reward
from pte.tasks.generated import Family, GeneratedProblem
from pte.tasks.problems import BOXED_INSTRUCTION, Problem, PromptTemplate, encode_prompt, load_problems
from pte.tasks.problems import Tokenizer as PromptTokenizer

GENERATED_AT_ONCE = 256
GENERATED_LOOKED_AT = 64
"""Generated problems of each family that `longest_prompt` looks at: those of one shape are all of one length."""


class Tokenizer(PromptTokenizer, Protocol):
    """What a task needs of a tokenizer; those of Transformers have it."""

    eos_token_id: int

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of token ids."""


@dataclass(frozen=True)
class TrainingProblem:
    """A problem with, where the task has one, a right completion.

    Args:
        problem: What the prompt shows and the reward compares with.
        trace: Text of a right completion, the end token included when the text has one; None without.
    """

    problem: Problem
    trace: str | None


@dataclass(frozen=True)
class Task:
    """Problems and their scoring, with a tokenizer.

    Args:
        tokenizer: Of the base.
        training: The training problem at a position of the endless order.
        evaluation: Problems to evaluate on, by the name of their set.
        reward: What GRPO raises.
        accuracy: 1.0 where the answer is right; what dynamic sampling and evaluation look at.
        template: How a problem becomes a prompt.
        instruction: Appended to a problem, or None.
        num_training: Positions of the order after which problems repeat or no longer differ in length.
        ends_traces: Whether a trace without an end token gets one; generated traces are as they should be.
        more_stop_token_ids: Tokens that end a completion beside the tokenizer's end token.
    """

    tokenizer: Tokenizer
    training: Callable[[int], TrainingProblem]
    evaluation: Mapping[str, Sequence[Problem]]
    reward: RewardFunction
    accuracy: RewardFunction
    template: PromptTemplate
    instruction: str | None
    num_training: int
    ends_traces: bool = True
    more_stop_token_ids: tuple[int, ...] = ()

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a completion, the tokenizer's end token first."""
        return tuple(dict.fromkeys((self.tokenizer.eos_token_id, *self.more_stop_token_ids)))

    def prompt_ids(self, problem: Problem) -> tuple[int, ...]:
        """The prompt as token ids.

        Raises:
            ValueError: The problem has no text, or the tokenizer cannot encode it.
        """
        if not problem.problem.strip():
            raise ValueError(f"problem {problem.id!r} must not be empty, got {problem.problem!r}; write its text")
        try:
            ids = encode_prompt(problem.problem, self.tokenizer, template=self.template, instruction=self.instruction)
        except ValueError:
            raise
        except Exception as error:  # tokenizers raises nothing narrower
            raise ValueError(
                f"problem {problem.id!r} must be text that the model's tokenizer can encode, got "
                f"{problem.problem[:60]!r} ({error}); use the words of its vocabulary"
            ) from error
        return tuple(ids)

    def longest_prompt(self) -> tuple[int, ...]:
        """The longest prompt of all training problems."""
        return max((self.prompt_ids(self.training(position).problem) for position in range(self.num_training)), key=len)

    def completion_ids(self, trace: str) -> tuple[int, ...]:
        """A right completion as token ids, ended by the end token if the task ends its traces."""
        ids = tuple(self.tokenizer.encode(trace, add_special_tokens=False))
        ended = not self.ends_traces or (ids and ids[-1] in self.stop_token_ids)
        return ids if ended else (*ids, self.stop_token_ids[0])

    @staticmethod
    def columns(problems: Sequence[Problem]) -> dict[str, list[str]]:
        """Fields of the problems, as a reward function gets them."""
        return {
            "answer": [problem.answer for problem in problems],
            "id": [problem.id for problem in problems],
            "source": [problem.source for problem in problems],
        }

    def text(self, completion_ids: Sequence[int]) -> str:
        """The text of a completion."""
        return self.tokenizer.decode(completion_ids, skip_special_tokens=True)


def generated_task(
    tokenizer: Tokenizer,
    families: Mapping[str, Family],
    *,
    shapes: Mapping[str, Mapping[str, int | None]],
    seed: int,
    eval_problems: int,
    reward: str = "exact",
) -> Task:
    """Problems of one family, or of several in turn; held-out problems never occur in training (`split_of`).

    Each family is an evaluation set of its own, under its name.

    Args:
        tokenizer: Of the base.
        families: By name, in the order in which training problems take turns.
        shapes: For each family, the parameters of its `generate`.
        seed: Of the problems.
        eval_problems: Held-out problems of each family.
        reward: "exact" for the families' own accuracy, or `module:function`.

    Raises:
        ValueError: A shape is out of range, or `reward` is neither "exact" nor a function that can be loaded.
    """
    blocks: dict[str, tuple[int, list[TrainingProblem]]] = {}
    names = tuple(families)

    def training(position: int) -> TrainingProblem:
        turn, name = position // len(names), names[position % len(names)]
        block, offset = divmod(turn, GENERATED_AT_ONCE)
        if name not in blocks or blocks[name][0] != block:
            drawn = families[name].generate(
                GENERATED_AT_ONCE, seed=mixed_seed(seed, block), split="train", **shapes[name]
            )
            blocks[name] = (block, [TrainingProblem(_as_problem(one), one.trace) for one in drawn])
        return blocks[name][1][offset]

    evaluation = {
        name: [_as_problem(one) for one in family.generate(eval_problems, seed=seed, split="heldout", **shapes[name])]
        for name, family in families.items()
    }
    accuracy = families[names[0]].accuracy if len(names) == 1 else mixed_accuracy(families)
    return Task(
        tokenizer=tokenizer,
        training=training,
        evaluation=evaluation,
        reward=accuracy if reward == "exact" else load_reward(reward),
        accuracy=accuracy,
        ends_traces=False,
        template="raw",
        instruction=None,
        num_training=GENERATED_LOOKED_AT * len(names),
    )


def mixed_accuracy(families: Mapping[str, Family]) -> RewardFunction:
    """The accuracy of completions of several families, each scored by its own; the problems' source says which.

    Args:
        families: By name.
    """

    def accuracy_of_its_family(
        completions: Sequence[str], answer: Sequence[str], source: Sequence[str], **ignored: object
    ) -> list[float | None]:
        scores: list[float | None] = [None] * len(completions)
        of = [text.partition("/")[0] for text in source]
        for name in dict.fromkeys(of):
            rows = [row for row, other in enumerate(of) if other == name]
            scored = families[name].accuracy(
                completions=[completions[row] for row in rows], answer=[answer[row] for row in rows]
            )
            for row, score in zip(rows, scored, strict=True):
                scores[row] = score
        return scores

    return accuracy_of_its_family


def jsonl_task(
    tokenizer: Tokenizer,
    *,
    seed: int,
    train_path: str | Path | None,
    eval_paths: Sequence[str | Path],
    eval_problems: int | None,
    template: PromptTemplate,
    boxed_instruction: bool,
    reward: str,
    traces_path: str | Path | None,
) -> Task:
    """Problems from files, in a new seeded order every epoch.

    Raises:
        FileNotFoundError, ValueError: A file is missing or malformed, or the reward cannot be loaded.
    """
    problems = [] if train_path is None else load_problems(train_path)
    traces = {} if traces_path is None else load_traces(traces_path)
    unknown = sorted(set(traces) - {problem.id for problem in problems})
    if unknown:
        raise ValueError(
            f"{traces_path}: every trace must belong to a training problem, got id {unknown[0]!r}; drop the line"
        )
    if traces:
        problems = [problem for problem in problems if problem.id in traces]
    orders: dict[int, list[int]] = {}

    def training(position: int) -> TrainingProblem:
        epoch, offset = divmod(position, len(problems))
        if epoch not in orders:
            orders.clear()
            orders[epoch] = random.Random(mixed_seed(seed, epoch)).sample(range(len(problems)), len(problems))
        problem = problems[orders[epoch][offset]]
        return TrainingProblem(problem, traces.get(problem.id))

    sets = [Path(path).stem for path in eval_paths]
    if repeated := sorted({name for name in sets if sets.count(name) > 1}):
        raise ValueError(
            f"task.eval_paths must have different file names (they name the sets), got {repeated[0]!r} twice; "
            f"rename one"
        )
    functions: dict[str, RewardFunction] = {"math": math_reward, "exact": exact_reward(last_line)}
    accuracy = functions["exact" if reward == "exact" else "math"]
    return Task(
        tokenizer=tokenizer,
        training=training,
        evaluation={Path(path).stem: load_problems(path)[:eval_problems] for path in eval_paths},
        reward=functions[reward] if reward in functions else load_reward(reward),
        accuracy=accuracy,
        template=template,
        instruction=BOXED_INSTRUCTION if boxed_instruction else None,
        num_training=len(problems),
    )


def load_traces(path: str | Path) -> dict[str, str]:
    """Right completions by problem id, from JSONL lines with the string fields `id` and `trace`.

    Raises:
        FileNotFoundError: No such file.
        ValueError: A line that is not such an object, or an id that an earlier line has.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"traces_path must exist, got {path}; paths are relative to the working folder")
    traces: dict[str, str] = {}
    # Lines end at newlines alone: JSON text may hold other separators.
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line.decode())
            key, trace = entry["id"], entry["trace"]
        except (ValueError, KeyError, TypeError) as error:
            shown = line[:60].decode(errors="replace")
            raise ValueError(
                f'{path}, line {number}: a trace must be a JSON object with "id" and "trace", got {shown!r}'
            ) from error
        if not (isinstance(key, str) and isinstance(trace, str) and trace) or key in traces:
            raise ValueError(f"{path}, line {number}: id and trace must be text, each id once, got id {key!r}")
        traces[key] = trace
    return traces


def last_line(completion: str) -> str | None:
    """The last line of a completion, the answer of reward `exact` on JSONL problems; None for an empty one."""
    lines = completion.strip().splitlines()
    return lines[-1].strip() if lines else None


def mixed_seed(seed: int, part: int) -> int:
    """A seed for one part of an endless order."""
    return random.Random(f"{seed}/{part}").getrandbits(62)


def _as_problem(one: GeneratedProblem) -> Problem:
    return Problem(one.id, one.problem, one.answer, one.source)
