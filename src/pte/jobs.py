"""Several pieces of work in processes of their own, one CPU thread each, with a progress bar for each.

Decides: which job starts next (in order, each after the job that it needs), what is shown while jobs run, what ends
when one fails, that no new job starts after a deadline, and that no process outlives the command. Does not know what a
job does.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, TaskID

POLL_SECONDS = 0.5
LINE_SECONDS = 60


@dataclass(frozen=True)
class Outcome:
    """What became of jobs that were not all done.

    Args:
        left: Names of those that were not started, as time was up or as what they need had failed.
        failed: What those that failed raised, by name.
    """

    left: tuple[str, ...] = ()
    failed: Mapping[str, Exception] = field(default_factory=dict)


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
    go_on: bool = False,
) -> Outcome:
    """Runs jobs until all are done, or until the last that may still start is done.

    Args:
        jobs: In the order in which they start; one that another waits for comes before it.
        workers: Processes at once.
        console: For a line a minute where there is no terminal.
        progress: For the bars.
        last_start: `time.perf_counter()` after which no job starts; None for no deadline.
        go_on: Whether the others go on when a job fails.

    Raises:
        Exception: What a job raised, where the others do not go on: they are ended.
        BrokenProcessPool: A worker was killed; the others are ended.
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
            watched = Watch(pool, workers=workers, console=console, progress=progress, go_on=go_on)
            return watched.run(list(jobs), last_start=last_start)
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


class Watch:
    """Starts jobs as workers become free and shows how far they are.

    Args:
        pool: Of workers.
        workers: How many.
        console: For lines where there is no terminal.
        progress: For the bars.
        go_on: Whether the others go on when a job fails.
    """

    def __init__(
        self, pool: ProcessPoolExecutor, *, workers: int, console: Console, progress: Progress, go_on: bool
    ) -> None:
        self.pool, self.workers, self.go_on = pool, workers, go_on
        self.console, self.progress = console, progress
        self.running: dict[str, tuple[Job, Future[None], TaskID]] = {}
        self.failed: dict[str, Exception] = {}

    def run(self, waiting: list[Job], *, last_start: float | None) -> Outcome:
        """Until nothing runs and nothing may start."""
        open_names = {job.name for job in waiting}
        said = time.perf_counter()
        while True:
            late = last_start is not None and time.perf_counter() > last_start
            ready = [job for job in waiting if job.after not in open_names]
            for job in ready[: 0 if late else self.workers - len(self.running)]:
                waiting.remove(job)
                task = self.progress.add_task(job.name, total=job.steps)
                self.running[job.name] = job, self.pool.submit(job.work, *job.arguments), task
            if not self.running:
                return Outcome(tuple(job.name for job in waiting), self.failed)
            time.sleep(POLL_SECONDS)
            lines = not self.console.is_terminal and time.perf_counter() - said > LINE_SECONDS
            self.show(lines=lines)
            if lines:
                said = time.perf_counter()
            open_names -= self.ended() - set(self.failed)

    def show(self, *, lines: bool) -> None:
        """How far the running jobs are: on their bars, and as lines if asked for."""
        for name, (job, _, task) in self.running.items():
            if job.metrics is not None and job.metrics.is_file():
                rows = job.metrics.read_bytes().splitlines()
                self.progress.update(task, completed=len(rows), description=described(name, rows))
                if lines:
                    self.console.print(f"{described(name, rows)} {len(rows)}/{job.steps}", highlight=False)

    def ended(self) -> set[str]:
        """Names of the jobs that have ended since the last call; they run no more."""
        names = {name for name, (_, future, _) in self.running.items() if future.done()}
        for name in names:
            job, future, task = self.running.pop(name)
            error = future.exception()
            if isinstance(error, Exception) and self.go_on and not isinstance(error, BrokenProcessPool):
                self.failed[name] = error
            else:
                future.result()
            ending = "failed" if name in self.failed else "done"
            self.progress.update(task, completed=job.steps, description=f"{name} {ending}")
            self.progress.stop_task(task)
            if not self.console.is_terminal:
                self.console.print(f"{name} {ending}", highlight=False)
        return names


def described(name: str, lines: Sequence[bytes]) -> str:
    """What a bar says of the last whole line of metrics."""
    try:
        row = json.loads(lines[-1])
    except (IndexError, ValueError):
        return name
    key = "reward" if row["stage"] == "grpo" else "loss"
    return f"{name} {row['stage']} {key} {row[key]:.3f}"
