"""A run: killed and resumed it is the run that was never killed; stopped or without disk it loses nothing."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from killed import run_command
from pte.checkpoint import latest_checkpoint, load_adapter, load_checkpoint
from pte.cli import main
from pte.learn.stage import TIMING_METRICS, by_length
from pte.learn.trainer import CHECKPOINTS, open_run, save, train
from pte.rollout.replay import Replay
from short_runs import equal, parameters, short_config, short_flags

pytestmark = pytest.mark.system

# A reward that is not the same for all, two kinds of stage, further rounds, two updates on a batch, checkpoints that
# lie apart: everything that a checkpoint has to bring back.
RESUMED = {
    "distill__steps": 2,
    "distill__decay": "cosine",
    "train__steps": 3,
    "train__decay": "linear",
    "train__dynamic_sampling": True,
    "train__max_resample_rounds": 1,
    "train__minibatches_per_step": 2,
    "train__checkpoint_every": 3,
    "eval__problems": 1,
    "eval__max_new_tokens": 8,
}


def plain_metrics(directory: Path) -> list[dict[str, object]]:
    """metrics.jsonl without what depends on the machine's mood."""
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMING_METRICS} for row in rows]


def record_of(directory: Path) -> tuple[list[dict[str, object]], bytes, dict[str, torch.Tensor]]:
    tensors, _ = load_adapter(directory)
    return plain_metrics(directory), (directory / "completions.jsonl").read_bytes(), tensors


def assert_same_record(one: Path, other: Path) -> None:
    (metrics, completions, tensors), (same_metrics, same_completions, same_tensors) = record_of(one), record_of(other)
    assert metrics == same_metrics
    assert completions == same_completions
    assert equal(tensors, same_tensors)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody killed."""
    directory = tmp_path_factory.mktemp("whole")
    assert run_command(["train", *short_flags(**RESUMED, run__output_dir=directory, run__name="run")]) == 0
    rows = plain_metrics(directory / "run")
    assert [row["step"] for row in rows] == list(range(1, 6))
    assert any(row["grad_norm"] > 0 for row in rows[2:]), "a GRPO stage without a gradient would prove nothing"
    return directory / "run"


def test_a_run_killed_while_it_writes_resumes_bit_for_bit(whole: Path, tmp_path: Path) -> None:
    flags = ["train", *short_flags(**RESUMED, run__output_dir=tmp_path, run__name="run")]
    # Flushes of a new run: 2 for its record (a resumed one: 2 for each log that it cuts), then 1 in a step of the warm
    # start, 2 in one of GRPO, 8 for a checkpoint, which steps 2, 3 and 5 end with. So it dies in step 2; in the
    # checkpoint of step 3; as it cuts the logs; in step 5, with step 4 logged and not saved; and at drawn moments.
    assert run_command(flags, fsync=4) == -9
    moments, resumed_from = random.Random(7), []
    for fsync in (18, 1, 17, moments.randint(1, 20), moments.randint(1, 20)):
        if run_command([*flags, "--run.resume"], fsync=fsync) == -9:
            last = latest_checkpoint(tmp_path / "run" / CHECKPOINTS)
            resumed_from.append(None if last is None else last.name)
    assert resumed_from[:3] == ["step-000002", "step-000002", "step-000003"]
    assert main([*flags, "--run.resume"]) == 0
    assert_same_record(whole, tmp_path / "run")


def test_a_run_killed_at_random_times_in_both_stages_resumes_bit_for_bit(whole: Path, tmp_path: Path) -> None:
    flags = ["train", *short_flags(**RESUMED, run__output_dir=tmp_path, run__name="run")]
    metrics, moments = tmp_path / "run" / "metrics.jsonl", random.Random(11)
    killed_after = []
    for steps in (1, 3, 4):
        delay, seen = moments.uniform(0, 0.15), []

        def late_enough(steps: int = steps, delay: float = delay, seen: list[float] = seen) -> bool:
            lines = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
            if lines >= steps and not seen:
                seen.append(time.monotonic())
            return bool(seen) and time.monotonic() - seen[0] >= delay

        resume = ["--run.resume"] if metrics.exists() else []
        if run_command([*flags, *resume], kill_when=late_enough) == -9:
            killed_after.append(metrics.read_bytes().count(b"\n"))
    assert min(killed_after) <= 2 < max(killed_after), "one kill in each stage"
    assert main([*flags, "--run.resume"]) == 0
    assert_same_record(whole, tmp_path / "run")


def test_a_finished_run_that_is_resumed_changes_nothing(whole: Path) -> None:
    before = record_of(whole)
    flags = ["train", *short_flags(**RESUMED, run__output_dir=whole.parent, run__name="run"), "--run.resume"]
    assert main(flags) == 0
    after = record_of(whole)
    assert before[:2] == after[:2] and equal(before[2], after[2])


def test_a_run_leaves_its_record_its_metrics_and_of_tensors_the_adapters_alone(whole: Path) -> None:
    assert sorted(path.name for path in whole.iterdir()) == [
        "checkpoints",
        "completions.jsonl",
        "curve.png",
        "metrics.jsonl",
        "record.json",
        "rollouts.json",
        "summary.json",
    ]
    config = json.loads((whole / "record.json").read_text())["config"]
    assert config["train"]["steps"] == 3 and config["cache"]["window_tokens"] == 16
    last = latest_checkpoint(whole / CHECKPOINTS)
    assert last is not None and last.name == "step-000005"
    assert len(list((whole / CHECKPOINTS).glob("step-*"))) == 2
    checkpoint = load_checkpoint(last)
    assert set(checkpoint.training_state) == {"distill", "grpo"}
    run = open_run(short_config(run__output_dir=str(whole.parent), run__name="other", **RESUMED))
    assert checkpoint.adapter.keys() == dict(run.session.policy.adapter.named_parameters()).keys()
    assert (whole / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_longer_run_goes_on_from_a_finished_one(tmp_path: Path) -> None:
    config = short_config(run__output_dir=str(tmp_path), distill__steps=1, train__steps=1)
    train(open_run(config))
    longer = replace(config, train=replace(config.train, steps=2), run=replace(config.run, resume=True))
    run = open_run(longer)
    assert run.done_steps == 2
    assert train(run).name == "step-000003"
    straight = replace(longer, run=replace(config.run, name="straight"))
    train(open_run(straight))
    assert_same_record(tmp_path / "run", tmp_path / "straight")


def opened(tmp_path: Path, **changes: object):
    return open_run(short_config(run__output_dir=str(tmp_path), **{"distill__steps": 1, **changes}))


class AnotherPolicy(Replay):
    """A replay that is a tenth of a nat off."""

    def scores(self, *arguments: object, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs, entropies = super().scores(*arguments, **options)
        return logprobs + 0.1, entropies


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("gap", "step 2 (grpo): rollout and replay must agree within max_logprob_gap (0.001 nats), got 0.1"),
        ("loss", "step 2 (grpo): the loss must be finite, got nan"),
        ("gradient", "step 2 (grpo): the gradient must be finite, got norm nan"),
    ],
)
def test_a_run_that_is_not_sound_ends_with_status_3_and_keeps_its_last_checkpoint(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fault: str,
    message: str,
) -> None:
    import pte.learn.grpo
    import pte.learn.optimizer
    import pte.learn.trainer

    if fault == "gap":
        make = pte.learn.trainer.make_replay
        kinds = {"DistillConfig": make, "TrainConfig": lambda policy, stage: AnotherPolicy(policy)}
        monkeypatch.setattr(
            pte.learn.trainer, "make_replay", lambda policy, stage: kinds[type(stage).__name__](policy, stage)
        )
    elif fault == "loss":
        advantages = pte.learn.grpo.group_advantages
        monkeypatch.setattr(
            pte.learn.grpo, "group_advantages", lambda *args, **options: advantages(*args, **options) * math.nan
        )
    else:
        norm = torch.nn.utils.get_total_norm
        steps = []

        def broken(gradients: list[torch.Tensor]) -> torch.Tensor:
            steps.append(1)
            return norm(gradients) * (math.nan if len(steps) == 2 else 1)

        monkeypatch.setattr(torch.nn.utils, "get_total_norm", broken)
    flags = short_flags(run__output_dir=tmp_path, distill__steps=1)
    assert main(["train", *flags]) == 3
    last = latest_checkpoint(tmp_path / "run" / CHECKPOINTS)
    shown = capsys.readouterr().err
    assert message in shown and f"the last good checkpoint: {last}" in shown
    assert last is not None and last.name == "step-000001"
    assert len(plain_metrics(tmp_path / "run")) == 1
    # What was wrong is gone: the run goes on from the checkpoint that it named.
    monkeypatch.undo()
    run = open_run(short_config(run__output_dir=str(tmp_path), run__resume=True, distill__steps=1))
    assert run.done_steps == 1
    assert equal(parameters(run.session), load_adapter(last)[0])


def test_a_run_that_is_not_sound_before_its_first_checkpoint_says_that_there_is_none(tmp_path: Path) -> None:
    run = opened(tmp_path)
    with torch.no_grad():
        next(run.session.policy.adapter.parameters()).fill_(math.nan)
    with pytest.raises(RuntimeError, match=r"step 1 \(distill\): the .* must be finite.*checkpoint: none was written"):
        train(run)


def test_a_disk_that_fills_up_while_saving_keeps_the_last_good_checkpoint_and_says_so(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flush = os.fsync
    last = tmp_path / "run" / CHECKPOINTS / "step-000003"

    def full(descriptor: int) -> None:
        if last.exists() and os.readlink(f"/proc/self/fd/{descriptor}").endswith("training.json"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    flags = ["train", *short_flags(**RESUMED, run__output_dir=tmp_path)]
    assert main(flags) == 2
    shown = capsys.readouterr().err
    assert "could not save a checkpoint (No space left on device)" in shown
    assert f"the last good checkpoint is {last}; free space and start again with resume" in shown
    assert latest_checkpoint(last.parent) == last
    assert load_checkpoint(last).step == 3
    assert not list(last.parent.glob(".unfinished*"))
    monkeypatch.undo()
    assert main([*flags, "--run.resume"]) == 0
    assert_same_record(tmp_path / "run", whole)


def test_a_tracker_gets_every_metric_of_every_step(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(opened(tmp_path, run__log_with=("tensorboard",), train__steps=2))
    (events,) = {path.parent for path in (tmp_path / "run").rglob("events.out*")}
    read = EventAccumulator(str(events))
    read.Reload()
    for row in plain_metrics(tmp_path / "run"):
        for key, value in row.items():
            if key not in ("step", "stage"):
                logged = {one.step: one.value for one in read.Scalars(f"{row['stage']}/{key}")}
                assert logged[row["step"]] == pytest.approx(value, rel=1e-6), key


def test_a_tracker_that_is_not_installed_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="run.log_with must name installed trackers, got 'wandb'; pip install wandb"):
        opened(tmp_path, run__log_with=("wandb",))
    assert not (tmp_path / "run").exists()


def test_a_run_without_steps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a run must have steps, got 0 in distill and in train; set distill.steps or"):
        opened(tmp_path, distill__steps=0, train__steps=0)


def test_the_stages_take_their_settings_from_the_configuration(tmp_path: Path) -> None:
    run = opened(
        tmp_path,
        distill__gradient_mode="horizon",
        distill__horizon=3,
        train__gradient_mode="exact",
        train__minibatches_per_step=2,
        train__weight_decay=0.1,
        train__kl_beta=0.1,
        train__reference="bounded",
        train__max_logprob_gap=0.5,
    )
    distill, grpo = run.stages
    assert (distill.replay.gradient_mode, distill.replay.horizon) == ("horizon", 3)
    assert (grpo.replay.gradient_mode, grpo.replay.horizon) == ("exact", None)
    assert grpo.optimizer.total_steps == 4
    assert grpo.optimizer.adamw.defaults["weight_decay"] == 0.1
    assert distill.optimizer.adamw.defaults["weight_decay"] == 0
    assert grpo.reference.policy.schedule == run.session.policy.schedule and grpo.reference.policy.adapter is None
    assert grpo.max_logprob_gap == 0.5
    assert run.total_steps == 3


def test_a_checkpoint_of_another_adapter_is_not_restored(tmp_path: Path) -> None:
    run = opened(tmp_path)
    save(run, 1)
    config = short_config(run__output_dir=str(tmp_path), run__resume=True, distill__steps=1, adapter__rank=8)
    with pytest.raises(ValueError, match=r"adapter.rank must be that of the run that is resumed \(4\), got 8"):
        open_run(config)


def test_micro_batches_hold_neighbours_in_length_and_every_item_once() -> None:
    items = [("a", 3), ("b", 9), ("c", 5), ("d", 9), ("e", 1)]
    batches = list(by_length(items, [length for _, length in items], size=2))
    assert batches == [[("b", 9), ("d", 9)], [("c", 5), ("a", 3)], [("e", 1)]]
