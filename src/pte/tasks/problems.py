"""Problem files and prompts.

Decides: what a problem is on disk, what is refused while reading it, and how its text becomes a prompt.
Does not know: Transformers (a tokenizer is whatever has two methods), rollouts, how answers are compared.

A problem file is JSONL, UTF-8: one object a line with exactly the string fields `id`, `problem`, `answer`,
`source`. Unknown fields are refused: a misspelt `anwser` would otherwise be found by the first reward.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, Protocol

BOXED_INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
"""What asks for the box that `math_reward` reads; the wording that Qwen2.5-Math and DeepSeek-R1 document."""

PromptTemplate = Literal["auto", "chat", "plain", "raw"]


@dataclass(frozen=True)
class Problem:
    """One problem with a verifiable answer."""

    id: str
    """Names the problem; unique in its file."""
    problem: str
    """The text that the prompt shows; never empty."""
    answer: str
    """The final answer only: a number or LaTeX, without dollar signs and without a solution."""
    source: str
    """The upstream set, then the subset after a slash."""


class Tokenizer(Protocol):
    """What a prompt needs of a tokenizer; those of Transformers have it."""

    chat_template: str | None

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        """The conversation as text, with the template's special tokens written out."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The text as token ids."""


def load_problems(path: str | Path) -> list[Problem]:
    """The problems of a JSONL file, in its order.

    Args:
        path: The file; empty lines in it are skipped.

    Raises:
        FileNotFoundError: No such file.
        ValueError: A line that is not a JSON object with exactly the four string fields, an empty problem, an id
            that an earlier line has, or a file without problems. File and line are named.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"problem file must exist, got {path}; paths are relative to the working folder")
    content = path.read_bytes()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        bad_line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {bad_line}: a problem file must be UTF-8, got others; convert it") from error
    problems: list[Problem] = []
    line_of_id: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        problem = _parse_problem(line, place=f"{path}, line {number}")
        if problem.id in line_of_id:
            raise ValueError(
                f"{path}, line {number}: id must be unique, got {problem.id!r}, "
                f"which line {line_of_id[problem.id]} has; rename one or drop it"
            )
        line_of_id[problem.id] = number
        problems.append(problem)
    if not problems:
        raise ValueError(f"{path}: a problem file must hold at least one problem, got none; write one object a line")
    return problems


def render_prompt(
    problem_text: str,
    tokenizer: Tokenizer,
    *,
    template: PromptTemplate = "auto",
    instruction: str | None = None,
) -> str:
    """The text that the policy continues.

    Args:
        problem_text: `Problem.problem`.
        tokenizer: Its chat template is used by "chat" and, where it has one, by "auto".
        template: "chat" is one user turn, then the opening of the assistant's. "plain" is `Problem: ...` and
            `Solution:` for base models. "auto" is "chat" where the tokenizer has a chat template, else "plain".
            "raw" is the text itself, as the embedded task wants it.
        instruction: Appended on a line of its own, for example `BOXED_INSTRUCTION`; None for nothing.

    Raises:
        ValueError: An unknown template, "chat" without a chat template, or an instruction with "raw".
    """
    if template not in ("auto", "chat", "plain", "raw"):
        raise ValueError(f'template must be "auto", "chat", "plain" or "raw", got {template!r}; use "auto"')
    if template == "raw":
        if instruction is not None:
            raise ValueError(
                f'instruction must be None with template "raw", got {instruction!r}; '
                'use template "plain", or write the instruction into the problem'
            )
        return problem_text
    text = question(problem_text, instruction=instruction)
    if template == "chat" and not tokenizer.chat_template:
        raise ValueError('template "chat" must have a chat template in the tokenizer, got none; use "plain"')
    if template == "plain" or not tokenizer.chat_template:
        return plain_prompt(text)
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )


def question(problem_text: str, *, instruction: str | None) -> str:
    """What a user asks: the problem and, on a line of its own, the instruction where there is one."""
    return problem_text if instruction is None else f"{problem_text}\n{instruction}"


def plain_prompt(text: str) -> str:
    """A question as a base model without a chat format continues it."""
    return f"Problem: {text}\nSolution:"


def encode_prompt(
    problem_text: str,
    tokenizer: Tokenizer,
    *,
    template: PromptTemplate = "auto",
    instruction: str | None = None,
) -> list[int]:
    """The prompt of `render_prompt` as token ids, with exactly the special tokens that its form calls for.

    A chat template writes the begin-of-sequence token itself, so the tokenizer must not add another; in the other
    forms it must.

    Raises:
        ValueError: As `render_prompt`.
    """
    text = render_prompt(problem_text, tokenizer, template=template, instruction=instruction)
    is_chat = template == "chat" or (template == "auto" and bool(tokenizer.chat_template))
    return tokenizer.encode(text, add_special_tokens=not is_chat)


def _parse_problem(line: str, *, place: str) -> Problem:
    names = [field.name for field in fields(Problem)]
    try:
        record: object = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{place}: each line must be a JSON object, got {_shortened(line)} ({error}); "
            "write one object a line, without commas between lines"
        ) from error
    if not isinstance(record, dict):
        raise ValueError(f"{place}: each line must be a JSON object, got {_shortened(line)}; write {{...}}")
    _check_keys(list(record), names=names, place=place)
    for name in names:
        if not isinstance(record[name], str):
            raise ValueError(
                f"{place}: {name} must be a string, got {record[name]!r}; put the value in quotation marks"
            )
    if not record["problem"].strip():
        raise ValueError(f"{place}: problem must not be empty, got {record['problem']!r}; drop the line")
    return Problem(**{name: record[name] for name in names})


def _check_keys(keys: Sequence[str], *, names: Sequence[str], place: str) -> None:
    """Refuses unknown and missing keys, the unknown first: a misspelt key is both."""
    unknown = [key for key in keys if key not in names]
    if unknown:
        raise ValueError(
            f"{place}: keys must be {', '.join(names)}, got the unknown {', '.join(map(repr, unknown))}; "
            "rename or remove them"
        )
    missing = [name for name in names if name not in keys]
    if missing:
        raise ValueError(
            f"{place}: {', '.join(missing)} must be given, got only {', '.join(keys)}; add what is missing"
        )


def _shortened(line: str) -> str:
    line = line.strip()
    return repr(line if len(line) <= 60 else line[:57] + "...")
