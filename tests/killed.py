"""A command in a process of its own that is killed at a chosen moment; started from one warm server process."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from multiprocessing.context import ForkServerContext
from pathlib import Path

import torch


@cache
def warm_processes() -> ForkServerContext:
    """Processes that fork from a server which has the imports behind it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pte.commands"])
    return context


def run_and_die(arguments: Sequence[str], fsync: int | None) -> None:
    """Runs a command in this process, which kills itself as it is about to flush a file for the n-th time.

    Args:
        arguments: Of `pte`.
        fsync: n, from 1; None to run to the end.
    """
    from pte.cli import main

    calls = 0

    def is_the_time() -> bool:
        nonlocal calls
        calls += 1
        return calls == fsync

    work_and_die(lambda: sys.exit(main(arguments)), is_the_time)


def work_and_die(work: Callable[[], object], moment: Callable[[], bool]) -> None:
    """Works in this process, which kills itself as it is about to flush a file and the moment has come."""
    torch.set_num_threads(1)
    flush = os.fsync

    def dying(descriptor: int) -> None:
        if moment():
            os.kill(os.getpid(), signal.SIGKILL)
        flush(descriptor)

    os.fsync = dying
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        work()


def has_lines(path: Path, count: int) -> bool:
    """Whether a file is there and has at least so many lines."""
    return path.is_file() and len(path.read_bytes().splitlines()) >= count


def exit_code_of(work: Callable[[], object], moment: Callable[[], bool]) -> int | None:
    """Exit code of work in a process of its own, -9 where it was killed at the moment; both travel by pickle."""
    process = warm_processes().Process(target=work_and_die, args=(work, moment))
    process.start()
    process.join(60)
    return process.exitcode


def run_command(
    arguments: Sequence[str],
    *,
    fsync: int | None = None,
    kill_when: Callable[[], bool] | None = None,
) -> int | None:
    """Exit code of a command, -9 where it was killed.

    Args:
        arguments: Of `pte`.
        fsync: Kill it as it is about to flush a file for the n-th time.
        kill_when: Kill it as soon as this is True.
    """
    process = warm_processes().Process(target=run_and_die, args=(list(arguments), fsync))
    process.start()
    while kill_when is not None and process.exitcode is None:
        if kill_when():
            process.kill()
            break
        process.join(0.005)
    process.join(60)
    return process.exitcode


def failing_arm(config: object, arm: str) -> None:
    """Stands for an arm of a comparison that fails at once, while the others would go on for minutes."""
    if arm == "pte":
        raise ValueError(f"arm {arm} failed")
    time.sleep(600)


def leave_a_mark(path: Path, word: str, seconds: float) -> None:
    """Work that takes some time and then appends a word to a file."""
    time.sleep(seconds)
    with open(path, "a") as file:
        file.write(f"{word}\n")


def fail(words: str) -> None:
    """Work that fails."""
    raise ValueError(words)
