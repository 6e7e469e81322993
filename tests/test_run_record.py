"""What a run writes down: no run is overwritten, a resumed log equals an uninterrupted one, the record says it all."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pte.config import CacheConfig, ExperimentConfig, RunConfig, TrainConfig
from pte.run_record import MetricsLog, check_resumed_config, commit, open_run_directory, replace_synced, save_record


def test_a_run_is_never_written_over_and_resumes_only_where_one_is(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "a"
    with pytest.raises(FileNotFoundError, match="must hold a run to resume, got .*; start without --run.resume"):
        open_run_directory(run, resume=True)
    assert open_run_directory(run, resume=False) == run and run.is_dir()
    assert open_run_directory(run, resume=False) == run, "an empty directory holds no run"
    save_record(run, ExperimentConfig())
    with pytest.raises(FileExistsError, match="must be new, got .*; go on with that run by --run.resume, or"):
        open_run_directory(run, resume=False)
    assert open_run_directory(run, resume=True) == run
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="must be new"):
        open_run_directory(tmp_path / "file", resume=False)


def test_the_record_holds_the_resolved_configuration_commit_versions_and_hardware(tmp_path: Path) -> None:
    config = ExperimentConfig(cache=CacheConfig(window_tokens=24, evict_tokens=6))
    save_record(tmp_path, config)
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["config"]["cache"] == {
        "policy": "window",
        "window_tokens": 24,
        "evict_tokens": 6,
        "sink_tokens": 4,
        "recent_tokens": None,
    }
    assert set(record["config"]) == {
        "model", "adapter", "cache", "rollout", "task", "distill", "train", "eval", "run",
    }  # fmt: skip
    assert set(record["versions"]) == {"python", "pte", "torch", "transformers"}
    assert record["hardware"]["cores"] >= 1 and record["hardware"]["memory_bytes"] > 2**20
    assert record["hardware"]["cpu"]
    assert record["commit"] == commit()
    assert commit() is None or set(commit().removesuffix("-dirty")) <= set("0123456789abcdef")


def test_resuming_under_another_configuration_is_refused_but_a_run_may_be_longer(tmp_path: Path) -> None:
    config = ExperimentConfig()
    save_record(tmp_path, config)
    check_resumed_config(tmp_path, config)
    longer = replace(config, train=TrainConfig(steps=999), run=RunConfig(resume=True))
    check_resumed_config(tmp_path, longer)
    other = replace(config, cache=CacheConfig(window_tokens=512))
    with pytest.raises(ValueError, match=r"cache.window_tokens must be that of the run that is resumed \(1024\), got"):
        check_resumed_config(tmp_path, other)


@given(
    steps=st.lists(st.integers(1, 3), min_size=1, max_size=6),
    done=st.integers(0, 6),
    cut=st.integers(0, 40),
)
def test_wherever_a_run_was_killed_the_resumed_log_equals_the_uninterrupted_one(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int], done: int, cut: int
) -> None:
    """Rows per step, a checkpoint after `done` steps, and a kill that cut some bytes off what came later."""
    directory = tmp_path_factory.mktemp("log")
    done = min(done, len(steps))

    def write(log: MetricsLog, first: int) -> None:
        for step in range(first, len(steps) + 1):
            log.append(step, [{"row": row, "loss": 0.1 * step + row} for row in range(steps[step - 1])])

    write(MetricsLog(directory / "whole.jsonl"), 1)
    whole = (directory / "whole.jsonl").read_bytes()
    at_checkpoint = sum(len(line) for line in whole.splitlines(keepends=True) if json.loads(line)["step"] <= done)
    (directory / "killed.jsonl").write_bytes(whole[: max(at_checkpoint, len(whole) - cut)])
    write(MetricsLog(directory / "killed.jsonl", done_steps=done), done + 1)
    assert (directory / "killed.jsonl").read_bytes() == whole


def test_a_new_log_drops_the_rows_of_a_run_without_checkpoint(tmp_path: Path) -> None:
    MetricsLog(tmp_path / "metrics.jsonl").append(1, [{"loss": 1.0}])
    log = MetricsLog(tmp_path / "metrics.jsonl", done_steps=0)
    log.append(1, [{"loss": float("nan"), "gap": float("inf"), "reward": 0.5}])
    assert [json.loads(line) for line in log.path.read_text().splitlines()] == [
        {"step": 1, "loss": None, "gap": None, "reward": 0.5}
    ]


def test_a_whole_row_without_its_line_end_is_kept_and_ended(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}')
    MetricsLog(path, done_steps=1).append(2, [{}])
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_broken_line_in_the_middle_of_a_log_and_a_row_with_its_own_step_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:2 must be a JSON object with a step; remove the line"):
        MetricsLog(path, done_steps=3)
    path.write_text('{"loss": 1}\n{"step": 3}\n')
    with pytest.raises(ValueError, match="metrics.jsonl:1 must be a JSON object with a step"):
        MetricsLog(path, done_steps=3)
    with pytest.raises(ValueError, match="a row must leave the step to the log, got 'step'"):
        MetricsLog(tmp_path / "new.jsonl").append(1, [{"step": 2}])


def test_a_full_disk_leaves_log_and_record_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(1, [{"loss": 1.0}])
    save_record(tmp_path, ExperimentConfig())
    before = log.path.read_bytes(), (tmp_path / "record.json").read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            log.append(2, [{"loss": 2.0}])
        with pytest.raises(OSError, match="No space left"):
            save_record(tmp_path, ExperimentConfig(train=TrainConfig(steps=1)))
        with pytest.raises(OSError, match="No space left"):
            replace_synced(tmp_path / "record.json", b"new")
    assert (log.path.read_bytes(), (tmp_path / "record.json").read_bytes()) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "record.json"]
    log.append(2, [{"loss": 2.0}])
    assert [json.loads(line)["step"] for line in log.path.read_text().splitlines()] == [1, 2]
