"""Runs as they are read: each kind, and every way in which one can be missing, half or broken."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest

from pte.report.derived import kept_tokens, measurements_of
from pte.report.measurements import of_metric
from pte.report.page import render_page
from pte.report.runs import read_run
from pte.report.sections import build_report, viewer_groups
from synthetic_evidence import write_evidence

pytestmark = pytest.mark.system

GRPO = {
    "stage": "grpo",
    "reward": 0.5,
    "accuracy": 0.25,
    "logprob_gap_max": 1e-6,
    "seconds": 2.0,
    "tokens_per_second": 10.0,
}
SCORES = {"accuracy": 0.75, "problems": 8, "samples_per_problem": 1, "peak_cache_bytes": 1024, "seconds": 1.5}
ROLLOUT = {
    "id": "p",
    "prompt_tokens": ["a", "b"],
    "completion_tokens": ["c"] * 7,
    "logprobs": [-0.1] * 7,
    "window_tokens": 4,
    "token_bytes": 10,
    "state_bytes": 5,
    "evictions": [{"before_token": 4, "evicted_tokens": [0, 1], "state_norm": [1.0], "state_change": [1.0]}],
}


def write_train(directory: Path, *, seed: int = 0) -> Path:
    directory.mkdir(parents=True)
    config = {"task": {"kind": "chained"}, "cache": {"window_tokens": 4, "evict_tokens": 2}, "run": {"seed": seed}}
    (directory / "record.json").write_text(json.dumps({"config": config, "commit": "abc"}))
    rows = [{"step": 1, "stage": "distill", "loss": 2.0}, {"step": 2, **GRPO}, {"step": 3, **GRPO, "reward": 0.75}]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "summary.json").write_text(json.dumps({"evaluations": {"chained": SCORES}}))
    (directory / "rollouts.json").write_text(json.dumps([ROLLOUT]))
    return directory


def write_compare(directory: Path) -> Path:
    for arm in ("lora_full", "pte"):
        write_train(directory / arm)
        scores = {arm: SCORES, "seconds": 9.0}
        if arm == "pte":
            scores |= {"reward": {**SCORES, "samples_per_problem": 4}, "pte_zeroed": {**SCORES, "accuracy": 0.0}}
        (directory / arm / "result.json").write_text(json.dumps(scores))
        (directory / arm / "summary.json").unlink()
    (directory / "record.json").write_text((directory / "pte" / "record.json").read_text())
    (directory / "summary.json").write_text(json.dumps({"final_reward": 0.8}))
    (directory / "pte" / "warm_start.json").write_text(json.dumps({"accuracy": {**SCORES, "accuracy": 0.5}}))
    (directory / "base_full").mkdir()
    (directory / "base_full" / "result.json").write_text(json.dumps({"base_full": SCORES}))
    return directory


def test_a_train_run_is_its_curves_scores_and_completions(tmp_path: Path) -> None:
    run = read_run(str(write_train(tmp_path / "try", seed=5)))
    (arm,) = run.arms
    assert (run.kind, run.notes, arm.name, arm.task, arm.seed) == ("train", (), "try", "chained", 5)
    found = measurements_of([run])
    (accuracy,) = [one for one in found if one.question == "arms" and one.metric == "accuracy"]
    assert (accuracy.value, accuracy.right, accuracy.total, accuracy.stage) == (0.75, 6, 8, "both")
    assert accuracy.setting == (("window_tokens", 4), ("block_tokens", 2))


def test_a_curve_adds_up_seconds_and_tokens_of_the_grpo_steps(tmp_path: Path) -> None:
    found = measurements_of([read_run(str(write_train(tmp_path / "try")))])
    rewards = of_metric([one for one in found if one.question == "rl"], "reward")
    # Two steps of 2 s at 10 tokens a second.
    assert [(one.number("step"), one.number("seconds"), one.number("tokens")) for one in rewards] == [
        (1, 2, 20),
        (2, 4, 40),
    ]
    assert [one.value for one in rewards] == [0.5, 0.75]


def test_kept_tokens_follow_the_evictions() -> None:
    # Six of seven tokens enter; before token 4 two leave: 0 1 2 3 4 | 4 - 2 + 1 = 3, 4.
    assert kept_tokens(ROLLOUT) == [0, 1, 2, 3, 4, 3, 4]


def test_memory_is_prompt_window_and_state_beside_every_token_kept(tmp_path: Path) -> None:
    found = [one for one in measurements_of([read_run(str(write_train(tmp_path / "try")))]) if one.question == "memory"]
    lines = {arm: [one.value for one in found if one.arm == arm] for arm in ("try", "every token kept")}
    assert lines["try"] == [(2 + kept) * 10 + 5 for kept in (0, 1, 2, 3, 4, 3, 4)]
    assert lines["every token kept"] == [(2 + kept) * 10 for kept in range(7)]


def test_a_comparison_is_its_arms_controls_and_warm_starts(tmp_path: Path) -> None:
    run = read_run(str(write_compare(tmp_path / "job")))
    assert (run.kind, run.notes) == ("compare", ())
    scores = [one for one in measurements_of([run]) if one.question == "arms" and one.metric == "accuracy"]
    assert {(one.arm, one.stage): one.value for one in scores} == {
        ("base_full", "none"): 0.75,
        ("lora_full", "both"): 0.75,
        ("pte", "both"): 0.75,
        ("pte", "warm_start"): 0.5,
        ("pte_zeroed", "both"): 0.0,
    }


def test_an_evidence_run_is_its_parts(tmp_path: Path) -> None:
    run = read_run(str(write_evidence(tmp_path / "evidence", seeds=(0,), questions=("capacity", "surprise"))))
    assert run.kind == "evidence" and not run.notes
    assert [part.name for part in run.parts] == ["capacity-0", "capacity-1", "surprise-0", "surprise-1"]
    assert {one.question for one in run.parts[0].measurements} == {"capacity"}
    assert len(measurements_of([run])) == sum(len(part.measurements) for part in run.parts) == 3 * 4 * 6 + 1


def test_a_curve_says_by_which_stages_the_arm_had_learned(tmp_path: Path) -> None:
    directory = write_train(tmp_path / "try")
    (directory / "metrics.jsonl").write_text(json.dumps({"step": 1, **GRPO}) + "\n")
    found = measurements_of([read_run(str(directory))])
    assert {one.stage for one in found if one.question == "rl"} == {"grpo"}


def broken(path: Path, content: str | None) -> None:
    path.unlink() if content is None else path.write_text(content)


@pytest.mark.parametrize(
    ("file", "content", "note"),
    [
        ("summary.json", None, "summary.json is missing: the run has not ended"),
        ("summary.json", '{"evaluations": {', "summary.json is not whole"),
        ("summary.json", "[]", "summary.json is no JSON object"),
        ("record.json", None, "record.json is missing"),
        ("record.json", '{"config": {"tas\n', "record.json is not whole (Invalid control character"),
        ("record.json", "[1]", "record.json is no JSON object"),
        ("metrics.jsonl", None, "metrics.jsonl is missing: there are no learning curves"),
        ("metrics.jsonl", '{"step": 1, "stage": "distill", "loss": 1.0}\n{"st', "metrics.jsonl, line 2 is not whole"),
        ("rollouts.json", "[{}]", "completions without id, prompt_tokens"),
        ("rollouts.json", "[", "rollouts.json is not whole"),
        ("rollouts.json", json.dumps([{**ROLLOUT, "evictions": None}]), "are left out"),
        ("rollouts.json", json.dumps([{**ROLLOUT, "evictions": [{"before_token": 4}]}]), "are left out"),
        ("rollouts.json", json.dumps([{**ROLLOUT, "prompt_tokens": None}]), "are left out"),
        ("rollouts.json", json.dumps([{**ROLLOUT, "completion_tokens": [1]}]), "are left out"),
    ],
)
def test_a_half_run_is_read_as_far_as_it_goes_with_a_sentence(
    tmp_path: Path, file: str, content: str | None, note: str
) -> None:
    directory = write_train(tmp_path / "try")
    broken(directory / file, content)
    run = read_run(str(directory))
    assert run.kind == "train" and len(run.notes) == 1 and note in run.notes[0]
    render_page(build_report([run], command="pte report"))


def test_half_a_record_of_evidence_is_a_sentence_with_its_file(tmp_path: Path) -> None:
    directory = write_evidence(tmp_path / "evidence", seeds=(0,), questions=("surprise",))
    for content in ('{"preset": "full\n', "[1]"):
        (directory / "record.json").write_text(content)
        run = read_run(str(directory))
        assert run.kind == "evidence" and len(run.parts) == 2
        (note,) = run.notes
        assert note.startswith(str(directory / "record.json")) and note.endswith("what it would say is left out.")


def test_one_broken_measurement_leaves_the_others_of_its_part(tmp_path: Path) -> None:
    directory = write_evidence(tmp_path / "evidence", seeds=(0, 1, 2, 3), questions=("surprise",))
    file = directory / "parts" / "surprise-1.json"
    part = json.loads(file.read_text())
    del part["measurements"][1]["task"]
    file.write_text(json.dumps(part))
    run = read_run(str(directory))
    assert [len(one.measurements) for one in run.parts] == [2, 1]
    (note,) = run.notes
    assert f"{file}, measurement 2: a measurement must have task" in note and "measure this part again" in note
    assert note.endswith("(1 of 2 measurements left out).")


def test_files_that_are_still_written_are_no_parts(tmp_path: Path) -> None:
    directory = write_evidence(tmp_path / "evidence", seeds=(0,), questions=("surprise",))
    (directory / "parts" / ".unfinished-3-surprise-2.json").write_text('{"meas')
    (directory / "rollouts").mkdir()
    (directory / "rollouts" / ".unfinished-3-pte.json").write_text("[")
    run = read_run(str(directory))
    assert len(run.parts) == 2 and not run.rollouts and not run.notes
    job = write_compare(tmp_path / "job")
    shutil.copytree(job / "pte", job / ".unfinished-pte")
    assert [arm.name for arm in read_run(str(job)).arms] == ["base_full", "lora_full", "pte"]


@pytest.mark.parametrize(
    ("logprobs", "shown"),
    [
        (None, [None] * 7),
        ([-0.5, None, math.nan, -0.25, -math.inf, "x"], [-0.5, None, None, -0.25, None, None, None]),
    ],
)
def test_a_log_prob_that_is_not_known_is_null_at_its_place(
    tmp_path: Path, logprobs: list[object] | None, shown: list[float | None]
) -> None:
    directory = write_train(tmp_path / "try")
    evictions = [{**ROLLOUT["evictions"][0], "state_norm": [math.nan]}]
    (directory / "rollouts.json").write_text(json.dumps([{**ROLLOUT, "logprobs": logprobs, "evictions": evictions}]))
    page = render_page(build_report([read_run(str(directory))], command="pte report"))

    def refuse(name: str) -> None:
        raise AssertionError(f"JSON has no {name}")

    content = re.search(r'id="rollouts">(.*?)</script>', page, re.DOTALL).group(1)
    (rollout,) = json.loads(content, parse_constant=refuse)[0]["rollouts"]
    assert rollout["logprobs"] == shown and rollout["evictions"][0]["state_norm"] == [None]


@pytest.mark.parametrize(
    ("content", "note"),
    [("{", "not whole"), ("{}", ""), ('{"question": "arms"}', "no list of measurements"), ("[1]", "no JSON object")],
)
def test_a_half_part_is_left_out_with_a_sentence(tmp_path: Path, content: str, note: str) -> None:
    directory = write_evidence(tmp_path / "evidence", seeds=(0,), questions=("surprise",))
    (directory / "parts" / "surprise-1.json").write_text(content)
    run = read_run(str(directory))
    assert len(run.parts) == 1 and all(note in one for one in run.notes) and bool(run.notes) == bool(note)


def test_completions_of_an_evidence_run_come_by_the_name_of_their_file(tmp_path: Path) -> None:
    directory = write_evidence(tmp_path / "evidence", seeds=(0,), questions=("surprise",))
    (directory / "rollouts").mkdir()
    for arm in ("lora_full", "pte_read"):
        (directory / "rollouts" / f"{arm}.json").write_text(json.dumps([ROLLOUT]))
    groups = viewer_groups([read_run(str(directory)), read_run(str(write_compare(tmp_path / "job")))])
    assert [group["label"] for group in groups] == [
        "evidence: PTE, rule read",
        "job: PTE",
        "evidence: LoRA, full cache",
        "job: LoRA, full cache",
    ], "the arms that have a state come first"


def test_an_evidence_run_without_a_part_says_so(tmp_path: Path) -> None:
    directory = write_evidence(tmp_path / "evidence", questions=("surprise",))
    for part in (directory / "parts").iterdir():
        part.unlink()
    assert "no part of this evidence run has been measured yet" in read_run(str(directory)).notes[0]


def test_what_is_no_run_is_refused_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"a run must be a directory .*; check the path"):
        read_run(str(tmp_path / "missing"))
    with pytest.raises(ValueError, match=r"must hold record.json, .*; name a directory that pte train"):
        read_run(str(tmp_path))
    (tmp_path / "record.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"none of them \(.*record.json is no JSON object: .*\); name a directory"):
        read_run(str(tmp_path))
