"""Rewards: completions in, one number each out. A reward reads the completion and never the prompt.

Decides: what counts as the final answer, when two answers are the same, which function a name stands for, and that
whatever a user's function returns is checked before a gradient sees it.
Does not know: models, tokens (it passes ids on), groups, advantages.

Paper: "outcome reward = final answer correct". The functions have TRL's signature, so that a function written for
TRL runs here: `(prompts, completions, completion_ids, **columns) -> list[float | None]`, called with keywords.
Deviations from TRL: completions are strings, never conversations; None ("does not apply") is refused.
"""

import importlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import lru_cache
from numbers import Real
from pathlib import Path

BOX = "\\boxed{"
LONGEST_ANSWER_CHARACTERS = 1000
"""A longer box holds reasoning and not an answer (the longest gold answer of the usual sets has 210 characters)."""
CPU_LIMIT_SECONDS = 3.0
"""Of one comparison; the slowest of the usual sets' answers takes 0.3 s."""
_INTEGER = re.compile(r"[+-]?\d{1,400}")


RewardFunction = Callable[..., Sequence[float | None]]
"""TRL's signature, all arguments by keyword: `prompts`, `completions`, `completion_ids`, and one list for each field of
the problems (`answer` among them), each with one entry for each completion."""


def math_reward(completions: Sequence[str], answer: Sequence[str], **ignored: object) -> list[float]:
    r"""1.0 where the final answer, the last `\boxed{...}` of the completion, has the gold answer's value, else 0.0.

    No box, or a box still open where the completion was cut off, is no answer. Equal strings and integers are
    compared here; anything else by math-verify in a child process, which a hostile answer can at most kill: after 3
    CPU seconds or 4 GB it scores 0. Works from any thread. POSIX only.

    Args:
        completions: What the model wrote, without the prompt.
        answer: Gold answers, as plain numbers or LaTeX without dollar signs, one for each completion.
        ignored: The rest of TRL's arguments; the prompts are among them and are not read.

    Raises:
        ValueError: Another number of answers than completions.
        RuntimeError: math-verify cannot be imported.

    Paper: r(y), outcome reward.
    """
    _check_same_length(completions, answer)
    return [
        float(_answers_match(gold, final_answer(completion)))
        for completion, gold in zip(completions, answer, strict=True)
    ]


def final_answer(completion: str) -> str | None:
    r"""The content of the last complete `\boxed{...}`, or None. Escaped braces (`\{`) do not count as braces."""
    start = completion.rfind(BOX)
    while start >= 0:
        depth = 1
        position = first = start + len(BOX)
        while position < len(completion):
            character = completion[position]
            if character == "\\":
                position += 1
            elif character == "{":
                depth += 1
            elif character == "}":
                depth -= 1
                if depth == 0:
                    return completion[first:position].strip()
            position += 1
        start = completion.rfind(BOX, 0, start)
    return None


def exact_reward(parse_answer: Callable[[str], str | None]) -> RewardFunction:
    """A reward of 1.0 where the parsed answer is the gold string, character for character, else 0.0.

    Args:
        parse_answer: From a completion to its answer, None where it gives none. It gets the completion only.
    """

    def exact_answer_reward(completions: Sequence[str], answer: Sequence[str], **ignored: object) -> list[float]:
        _check_same_length(completions, answer)
        parsed = [parse_answer(completion) for completion in completions]
        return [float(found is not None and found == gold) for found, gold in zip(parsed, answer, strict=True)]

    return exact_answer_reward


def load_reward(name: str) -> RewardFunction:
    """The function that `module:function` names, for example `pte.learn.rewards:math_reward`.

    Raises:
        ValueError: Not of that form, no such module, no such function in it, or not callable.
    """
    module_name, separator, function_name = name.partition(":")
    if not (module_name and separator and function_name):
        raise ValueError(
            f'reward must be written "module:function", got {name!r}; for example "my_rewards:length_reward"'
        )
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"reward must name a module that can be imported, got {name!r} ({error}); "
            "put the module's folder on PYTHONPATH"
        ) from error
    function: object = getattr(module, function_name, None)
    if not callable(function):
        close = get_close_matches(function_name, [key for key in vars(module) if callable(vars(module)[key])], n=1)
        remedy = f"did you mean {module_name}:{close[0]}?" if close else "define it there"
        raise ValueError(f"reward must name a function of {module_name}, got {name!r}; {remedy}")
    return function


def compute_rewards(
    reward_function: RewardFunction,
    *,
    prompts: list[str],
    completions: list[str],
    completion_ids: list[list[int]],
    columns: Mapping[str, list[str]],
) -> list[float]:
    """The rewards of a batch as floats, each checked.

    Args:
        reward_function: What scores.
        prompts: One for each completion, repeated within a group.
        completions: What the model wrote, decoded.
        completion_ids: The same as token ids.
        columns: Fields of the problems by name, one entry for each completion.

    Raises:
        ValueError: Arguments of unequal length, a column with a reserved name, the wrong number of rewards, or a
            reward that is None, NaN, infinite or no number.
        TypeError: The function returned something other than a list or tuple.
        RuntimeError: The function raised; its error is the cause.
    """
    reserved: dict[str, Sequence[object]] = {"prompts": prompts, "completion_ids": completion_ids}
    for column in columns:
        if column in (*reserved, "completions"):
            raise ValueError(f"columns must not use reserved names, got {column!r}; rename that field of the data")
    for argument, values in {**reserved, **columns}.items():
        if len(values) != len(completions):
            raise ValueError(
                f"{argument} must have one entry for each completion ({len(completions)}), got {len(values)}; "
                "repeat the entry of a problem for each completion of its group"
            )
    name = _reward_name(reward_function)
    try:
        rewards: object = reward_function(
            prompts=prompts, completions=completions, completion_ids=completion_ids, **columns
        )
    except Exception as error:
        raise RuntimeError(
            f"reward function {name} must score every completion, but raised {type(error).__name__}: {error}; it got "
            f"{len(completions)} completions and the columns {', '.join(columns) or '(none)'}: "
            "let it return 0.0 for a completion that it cannot read"
        ) from error
    if not isinstance(rewards, list | tuple):
        raise TypeError(
            f"reward function {name} must return a list of numbers, got {type(rewards).__name__}; use .tolist()"
        )
    if len(rewards) != len(completions):
        raise ValueError(
            f"reward function {name} must return one reward for each completion ({len(completions)}), "
            f"got {len(rewards)}; return a list in the order of `completions`"
        )
    return [_checked_reward(reward, index, name) for index, reward in enumerate(rewards)]


def _checked_reward(reward: object, index: int, name: str) -> float:
    if reward is None:
        raise ValueError(
            f'reward function {name} must return numbers, got None at index {index}: TRL\'s "does not apply" has no '
            "meaning where one function scores everything; return 0.0"
        )
    if not isinstance(reward, Real) or not math.isfinite(reward):
        raise ValueError(
            f"reward function {name} must return finite numbers, got {reward!r} at index {index}; "
            "return 0.0 where the score is undefined, and convert tensors with .item()"
        )
    return float(reward)


def _reward_name(reward_function: RewardFunction) -> str:
    module = getattr(reward_function, "__module__", None)
    function = getattr(reward_function, "__qualname__", type(reward_function).__qualname__)
    return f"{module}:{function}" if module else str(function)


def _check_same_length(completions: Sequence[str], answer: Sequence[str]) -> None:
    if len(answer) != len(completions):
        raise ValueError(
            f"answer must have one entry for each completion ({len(completions)}), got {len(answer)}; "
            "repeat the answer of a problem for each completion of its group"
        )


@lru_cache(maxsize=8192)
def _answers_match(gold: str, candidate: str | None) -> bool:
    if not candidate or len(candidate) > LONGEST_ANSWER_CHARACTERS:
        return False
    if candidate == gold.strip():
        return True
    if _INTEGER.fullmatch(candidate) and _INTEGER.fullmatch(gold.strip()):
        return int(candidate) == int(gold)
    return _math_process().same_value(gold, candidate)


class _MathProcess:
    """The running `math_worker.py`, restarted when an answer has killed it."""

    def __init__(self, cpu_limit_seconds: float = CPU_LIMIT_SECONDS) -> None:
        self.cpu_limit_seconds = cpu_limit_seconds
        self.owner_pid = os.getpid()
        self.lock = threading.Lock()
        self.process: subprocess.Popen[str] | None = None

    def same_value(self, gold: str, candidate: str) -> bool:
        """Whether the two have the same value; False where the comparison killed the process."""
        with self.lock:
            reply, ended_by = self._ask(gold, candidate)
            if not reply and ended_by != -signal.SIGPROF:
                # Not the time limit: somebody else's Ctrl-C or a full machine may have ended it.
                reply, _ = self._ask(gold, candidate)
            return reply == "1"

    def _ask(self, gold: str, candidate: str) -> tuple[str, int | None]:
        """The reply, or an empty one and what the process ended with."""
        if self.process is None or self.process.poll() is not None:
            self._stop()
            self.process = self._start()
        process = self.process
        assert process.stdin is not None and process.stdout is not None
        try:
            print(json.dumps([gold, candidate]), file=process.stdin, flush=True)
            reply = process.stdout.readline().strip()
        except BrokenPipeError:
            reply = ""
        except BaseException:
            self._stop()  # interrupted: a reply that comes late would answer the next question
            raise
        return reply, None if reply else process.wait()

    def _start(self) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("math_worker.py")), str(self.cpu_limit_seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            # Keeps this folder off the child's import path, where our `loss` or `trainer` would shadow others.
            env={**os.environ, "PYTHONSAFEPATH": "1"},
        )
        assert process.stdout is not None
        first_line = process.stdout.readline().strip()
        if first_line != "ready":
            process.kill()
            process.wait()
            raise RuntimeError(
                f"math_reward must be able to import math_verify, got {first_line or 'no answer from its process'!r};"
                " pip install 'math-verify[antlr4_13_2]'"
            )
        return process

    def _stop(self) -> None:
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.communicate()


_math_processes: list[_MathProcess] = []


def _math_process() -> _MathProcess:
    """This process's child; a forked copy must not share its parent's pipes."""
    if not _math_processes or _math_processes[0].owner_pid != os.getpid():
        _math_processes[:] = [_MathProcess()]
    return _math_processes[0]
