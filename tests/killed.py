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

    torch.set_num_threads(1)
    flush, calls = os.fsync, 0

    def dying(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == fsync:
            os.kill(os.getpid(), signal.SIGKILL)
        flush(descriptor)

    os.fsync = dying
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        sys.exit(main(arguments))


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
