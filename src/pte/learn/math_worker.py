"""A child process that compares mathematical answers, and may die doing it.

Decides: whether two LaTeX strings have the same value, and when a comparison has run for too long.
Does not know: pte; it runs as a script and imports math-verify only.

A model writes what it likes into its box: `9^{9^{9^9}}` or five thousand brackets keep sympy busy for hours or fill
the memory. math-verify's own timeouts are Python signal handlers: they need the main thread, take the process's
alarm from others, and cannot stop memory from filling. Here the kernel ends the process, at a limit of CPU seconds
(so that the score does not depend on the machine's load) or of memory; the parent starts a new one.

Protocol: one JSON line `[gold, candidate]` in, one line `1` or `0` out; the first line out is `ready`, or an error.
"""

import json
import os
import re
import resource
import signal
import sys
from typing import Any, TextIO

MEMORY_LIMIT_BYTES = 4 * 2**30
RELATIVE_TOLERANCE = 1e-4
"""math-verify rounds to 6 and chops at 15 decimals, so that 4.5e-33 equals 9.9e-33; this is asked on top."""


def same_value(gold: str, candidate: str) -> bool:
    """Whether math-verify takes the two for the same answer, and numbers agree to four digits."""
    from math_verify import LatexExtractionConfig, parse, verify

    config = [LatexExtractionConfig(boxed_match_priority=0)]
    parsed = [parse(f"\\boxed{{{tidy(text)}}}", config, parsing_timeout=None) for text in (gold, candidate)]
    if not verify(parsed[0], parsed[1], timeout_seconds=None):
        return False
    values = [_number(answers) for answers in parsed]
    if values[0] is None or values[1] is None or values[0] == 0:
        return True
    return abs(values[0] - values[1]) <= RELATIVE_TOLERANCE * abs(values[0])


def tidy(answer: str) -> str:
    r"""The answer in spellings that math-verify reads: `1\,234` as 1234, `4.5e33` as a product, no full stop."""
    answer = re.sub(r"(?<=\d)(?:\\[,!;: ]|,\\!|\{,\})(?=\d{3}(?!\d))", "", answer)
    answer = re.sub(r"(?<![\w.])(\d+(?:\.\d+)?)[eE]([+-]?\d+)(?!\w)", r"\1 \\times 10^{\2}", answer)
    return answer.strip().rstrip(".")


def _number(readings: list[Any]) -> complex | None:
    """The value of math-verify's first reading, a sympy object, where it is a plain number; a percentage is not."""
    try:
        return complex(readings[0].evalf())
    except (TypeError, ValueError, AttributeError, IndexError, OverflowError):
        return None


def serve(requests: TextIO, replies: TextIO, *, cpu_limit_seconds: float) -> None:
    """Answers requests until the parent closes the pipe; the limit holds for each."""
    for request in requests:
        # SIGPROF has no handler: at the limit the kernel ends the process, inside any C function.
        signal.setitimer(signal.ITIMER_PROF, cpu_limit_seconds)
        try:
            same = same_value(*json.loads(request))
        except Exception:  # MemoryError and RecursionError are among them
            same = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(int(same), file=replies, flush=True)


def main() -> None:
    """Takes standard output for replies alone, sets the limits, serves. The argument: CPU seconds a comparison."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        import math_verify  # noqa: F401
    except ImportError as error:
        print(f"{type(error).__name__}: {error}", file=replies, flush=True)
        return
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    print("ready", file=replies, flush=True)
    serve(sys.stdin, replies, cpu_limit_seconds=float(sys.argv[1]))


if __name__ == "__main__":
    main()
