"""`pte train` under the launchers that people use: the run of one process, whoever dies, and nothing else is shared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pte.checkpoint import latest_checkpoint, load_adapter
from pte.cli import main
from pte.learn.trainer import CHECKPOINTS
from ranked import free_port, launched
from short_runs import largest_difference, short_flags

pytestmark = pytest.mark.system

RUN = {
    "distill__steps": 1,
    "task__num_statements": 2,
    "rollout__temperature": 1.5,
    "cache__window_tokens": 8,
    "rollout__max_new_tokens": 26,
    "train__steps": 3,
    "train__prompts_per_step": 3,
    "train__checkpoint_every": 1,
    "eval__problems": 3,
    "eval__max_new_tokens": 26,
}
TORCHRUN = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
# With --cpu it starts one process, or needs MPI for more; with --multi_gpu torchrun's, on whatever model.device says.
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port"]


def launch(launcher: list[str], *words: str, home: Path) -> subprocess.CompletedProcess[str]:
    """The command as two processes of a launcher."""
    tests = Path(__file__).parents[1]
    paths = [str(tests.parent / "src"), str(tests), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, "-m", *launcher, str(free_port()), "-m", "pte", *words],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "HF_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=100,
    )


def adapter_of(run: Path) -> dict[str, torch.Tensor]:
    return load_adapter(run)[0]


def tokens_of(run: Path) -> list[int]:
    return [json.loads(line)["tokens"] for line in (run / "completions.jsonl").read_text().splitlines()]


def flags(directory: Path, *, reward: str = "short_runs:odd_ids", **changes: object) -> list[str]:
    return short_flags(**RUN, task__reward=reward, run__output_dir=directory, run__name="run", **changes)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    directory = tmp_path_factory.mktemp("alone")
    assert main(["train", *flags(directory)]) == 0
    return directory / "run"


def assert_same_run(one: Path, alone: Path) -> None:
    """In float32 the sums of two ranks round otherwise than one process's; learning rate 1e-3, three steps."""
    assert tokens_of(one) == tokens_of(alone)
    assert largest_difference(adapter_of(one), adapter_of(alone)) < 1e-5
    summaries = [json.loads((run / "summary.json").read_text()) for run in (one, alone)]
    scores = [summary["evaluations"]["chained"] for summary in summaries]
    assert scores[0]["accuracy"] == scores[1]["accuracy"]
    assert scores[0]["completion_tokens"] == scores[1]["completion_tokens"]


def test_accelerate_launch_makes_one_run_of_two_processes(alone: Path, tmp_path: Path) -> None:
    done = launch(ACCELERATE, "train", *flags(tmp_path, run__log_with=("tensorboard",)), home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "run", alone)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["ranks"] == 2
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4], "one rank alone writes"
    assert list((tmp_path / "run").rglob("events.out.tfevents.*"))
    assert done.stdout.count("summary, metrics and curve.png") == 1, "one rank alone speaks"


def test_a_killed_rank_ends_the_run_with_words_and_one_process_goes_on_from_its_checkpoint(
    alone: Path, tmp_path: Path
) -> None:
    words = flags(tmp_path, reward="ranked:deadly_for_rank_1")
    started = time.monotonic()
    died = launch(TORCHRUN, "train", *words, home=tmp_path)
    assert died.returncode != 0 and time.monotonic() - started < 90
    run = tmp_path / "run"
    last = latest_checkpoint(run / CHECKPOINTS)
    assert last == run / CHECKPOINTS / "step-000003", "the fourth reward of rank 1 is that of step 4"
    said = " ".join(died.stderr.split())
    assert "pte train: step 4 (grpo): " in said
    assert f"; the last good checkpoint: {last}; start the same command again with --run.resume" in said
    assert main(["train", *words, "--run.resume"]) == 0
    assert_same_run(run, alone)


def test_commands_with_processes_of_their_own_are_refused_under_a_launcher(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in launched(1, 2, free_port()).items():
        monkeypatch.setenv(name, value)
    for command in ("compare", "evidence", "generate"):
        assert main([command]) == 2
        said = capsys.readouterr().err
        assert said == (
            f"pte {command} (rank 1): a launcher can start train, distill, eval, got 2 processes of {command}; run "
            f"pte {command} by itself\n"
        )
