"""Several pieces of work in processes of their own, one CPU thread each, with a progress bar for each.

Decides: which job starts next (in order, each after the job that it needs), what is shown while jobs run, that no new
job starts after a deadline, and that no process outlives the command. Does not know what a job does.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, TaskID

POLL_SECONDS = 0.5
LINE_SECONDS = 60


@dataclass(frozen=True)
class Job:
    """One piece of work.

    Args:
        name: Shown to the user.
        work: A function of a module; its arguments travel to another process.
        arguments: Of the function.
        steps: What the bar counts; 1 for work without steps.
        metrics: metrics.jsonl that the work writes a line a step to, or None.
        after: Name of the job that must be done before; None for none.
    """

    name: str
    work: Callable[..., None]
    arguments: tuple[object, ...]
    steps: int = 1
    metrics: Path | None = None
    after: str | None = None


def run_jobs(
    jobs: Sequence[Job],
    *,
    workers: int,
    console: Console,
    progress: Progress,
    last_start: float | None = None,
) -> list[str]:
    """Runs jobs until all are done, or until the last that may still start is done.

    Args:
        jobs: In the order in which they start; one that another waits for comes before it.
        workers: Processes at once.
        console: For a line a minute where there is no terminal.
        progress: For the bars.
        last_start: `time.perf_counter()` after which no job starts; None for no deadline.

    Returns:
        Names of the jobs that were not started.

    Raises:
        Exception: What a job raised; the others are ended.
    """
    context = multiprocessing.get_context("spawn")
    alive, end = context.Pipe(duplex=False)
    with (
        ProcessPoolExecutor(
            max_workers=workers, mp_context=context, initializer=end_with_command, initargs=(alive,)
        ) as pool,
        progress,
    ):
        try:
            return watch(list(jobs), pool, workers=workers, console=console, progress=progress, last_start=last_start)
        except BaseException:
            end.close()
            raise


def end_with_command(alive: Connection) -> None:
    """Makes this worker compute on one thread and end when the command fails or is killed.

    A command that is resumed must find nobody writing in its runs.

    Args:
        alive: Of a pipe whose other end the command alone holds: closed when it fails, by the system when it dies.
    """
    import torch
    from transformers.utils.logging import disable_progress_bar

    torch.set_num_threads(1)
    disable_progress_bar()

    def watch_command() -> None:
        wait([alive])
        os._exit(1)

    threading.Thread(target=watch_command, daemon=True).start()


def watch(
    waiting: list[Job],
    pool: ProcessPoolExecutor,
    *,
    workers: int,
    console: Console,
    progress: Progress,
    last_start: float | None,
) -> list[str]:
    """Starts jobs as workers become free and shows how far they are; returns the names of those not started."""
    running: dict[str, tuple[Job, Future[None], TaskID]] = {}
    open_names = {job.name for job in waiting}
    said = time.perf_counter()
    while True:
        late = last_start is not None and time.perf_counter() > last_start
        ready = [job for job in waiting if job.after not in open_names]
        for job in ready[: 0 if late else workers - len(running)]:
            waiting.remove(job)
            task = progress.add_task(job.name, total=job.steps)
            running[job.name] = job, pool.submit(job.work, *job.arguments), task
        if not running:
            return [job.name for job in waiting]
        time.sleep(POLL_SECONDS)
        lines = not console.is_terminal and time.perf_counter() - said > LINE_SECONDS
        for name, (job, future, task) in list(running.items()):
            if job.metrics is not None and job.metrics.is_file():
                rows = job.metrics.read_bytes().splitlines()
                progress.update(task, completed=len(rows), description=described(name, rows))
                if lines:
                    console.print(f"{described(name, rows)} {len(rows)}/{job.steps}", highlight=False)
            if future.done():
                future.result()
                del running[name]
                open_names.discard(name)
                progress.update(task, completed=job.steps, description=f"{name} done")
                progress.stop_task(task)
                if not console.is_terminal:
                    console.print(f"{name} done", highlight=False)
        if lines:
            said = time.perf_counter()


def described(name: str, lines: Sequence[bytes]) -> str:
    """What a bar says of the last whole line of metrics."""
    try:
        row = json.loads(lines[-1])
    except (IndexError, ValueError):
        return name
    key = "reward" if row["stage"] == "grpo" else "loss"
    return f"{name} {row['stage']} {key} {row[key]:.3f}"
