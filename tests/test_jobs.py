"""Jobs in processes of their own: their order, their deadline, what a failure does."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress

from killed import fail, leave_a_mark
from pte import jobs
from pte.jobs import Job, Outcome, described, run_jobs

pytestmark = pytest.mark.system


@pytest.fixture(autouse=True)
def workers_that_start_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    # Forks spare the workers the imports; the rest is as it is.
    context = jobs.multiprocessing.get_context("forkserver")
    monkeypatch.setattr(jobs.multiprocessing, "get_context", lambda _: context)


def run(*wanted: Job, workers: int = 2, last_start: float | None = None, go_on: bool = False) -> Outcome:
    return run_jobs(
        wanted,
        workers=workers,
        console=Console(quiet=True),
        progress=Progress(disable=True),
        last_start=last_start,
        go_on=go_on,
    )


def test_a_job_starts_after_the_one_that_it_needs_although_a_worker_is_free(tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    first = Job("first", leave_a_mark, (marks, "first", 1.0))
    assert run(first, Job("second", leave_a_mark, (marks, "second", 0.0), after="first")) == Outcome()
    assert marks.read_text().split() == ["first", "second"]


def test_after_the_deadline_nothing_starts_and_the_rest_is_named(tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    wanted = [Job(name, leave_a_mark, (marks, name, 1.5)) for name in ("one", "two", "three")]
    left = run(*wanted, workers=1, last_start=time.perf_counter() + 0.8)
    assert (marks.read_text().split(), left) == (["one"], Outcome(left=("two", "three")))


def test_the_first_job_that_fails_ends_the_others_with_its_error(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(ValueError, match="the job's own words"):
        run(Job("bad", fail, ("the job's own words",)), Job("long", leave_a_mark, (tmp_path / "marks", "long", 60.0)))
    assert time.monotonic() - started < 30
    assert not (tmp_path / "marks").exists()


def test_where_the_others_go_on_a_failure_is_named_and_what_needs_it_is_left(tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    outcome = run(
        Job("bad", fail, ("its own words",)),
        Job("needs bad", leave_a_mark, (marks, "needs", 0.0), after="bad"),
        Job("other", leave_a_mark, (marks, "other", 0.0)),
        go_on=True,
    )
    assert (outcome.left, list(outcome.failed)) == (("needs bad",), ["bad"])
    assert str(outcome.failed["bad"]) == "its own words" and marks.read_text().split() == ["other"]


def test_a_bar_says_what_the_last_whole_line_says() -> None:
    rows = [b'{"stage": "distill", "loss": 0.5}', b'{"stage": "grpo", "reward": 0.25}']
    assert described("job", rows) == "job grpo reward 0.250"
    assert described("job", rows[:1]) == "job distill loss 0.500"
    assert described("job", [*rows, b'{"sta']) == "job"
