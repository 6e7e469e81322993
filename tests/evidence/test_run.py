"""An evidence run: what is left is done, what is done is left, and the report needs the JSON alone."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress

from killed import warm_processes
from pte import jobs
from pte.cli import main
from pte.config import ModelConfig
from pte.evidence import run
from pte.evidence.levels import BASES
from pte.evidence.measurements import Label, Origin, part_file
from pte.evidence.parts import BasePart, Part, ScoredPart, TrainedPart, run_part
from pte.evidence.plan import plan
from pte.evidence.readings import Reading
from pte.evidence.run import job_of, parts_left, run_evidence
from pte.tasks.bases import RECIPES
from short_runs import short_config

pytestmark = pytest.mark.system


def scored(name: str, arm: str) -> ScoredPart:
    config = short_config(eval__problems=2)
    return ScoredPart(name, (Reading(Label("arms", "chained", arm, setting={"windows": 3}), config),))


ORIGIN = Origin(commit="abc", hardware={}, versions={})
PARTS: list[Part] = [scored("full", "base_full"), scored("window", "base_window")]


def tiny_plan(preset: str, directory: Path) -> list[Part]:
    return PARTS


def go(
    directory: Path, preset: str = "quick", *, only: Sequence[str] = (), minutes: float | None = None, **changes: int
) -> list[str]:
    outcome = run_evidence(
        preset,  # type: ignore[arg-type]
        directory,
        only=tuple(only),
        workers=changes.get("workers", 1),
        minutes=minutes,
        console=Console(quiet=True),
        progress=Progress(disable=True),
    )
    assert not outcome.failed
    return list(outcome.left)


def use_tiny_plan(patch: pytest.MonkeyPatch) -> None:
    """Two parts that take a moment, in forks that spare the workers the imports; the rest is as it is."""
    context = warm_processes()
    patch.setattr(run, "plan", tiny_plan)
    patch.setattr(jobs.multiprocessing, "get_context", lambda _: context)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiny_plan(monkeypatch)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one part, gone on with for the other, and what the command said."""
    root = tmp_path_factory.mktemp("evidence")
    with pytest.MonkeyPatch.context() as patch:
        use_tiny_plan(patch)
        patch.chdir(root)
        words = ["evidence", "--directory", "run", "--workers", "1"]
        assert main([*words, "--only", "full"]) == 0
        first = part_file(Path("run"), "full")
        assert first.is_file() and not part_file(Path("run"), "window").exists()
        before = first.stat().st_mtime_ns
        assert main(words) == 0
        assert part_file(Path("run"), "window").is_file()
        assert first.stat().st_mtime_ns == before, "a part that is done is not done again"
    return root / "run"


def test_a_run_says_what_ran_where_and_each_part_at_which_commit(done: Path) -> None:
    record = json.loads((done / "record.json").read_text())
    assert record["preset"] == "quick"
    assert record["versions"]["torch"] and record["hardware"]["cores"] >= 1
    for part in PARTS:
        content = json.loads(part_file(done, part.name).read_text())
        assert content["part"] == part.name and content["commit"] == record["commit"]
        assert content["hardware"] == record["hardware"] and content["versions"] == record["versions"]
        assert content["seconds"] >= 0 and content["measurements"]


def test_a_finished_run_has_nothing_left_and_a_beginning_of_a_name_chooses_parts(done: Path, tiny: None) -> None:
    assert go(done) == []
    part_file(done, "window").rename(done / "kept")
    try:
        assert go(done, minutes=0) == ["window"]
        assert go(done, minutes=0, only=["fu"]) == []
        assert go(done, minutes=0, only=["fu", "win"]) == ["window"]
    finally:
        (done / "kept").rename(part_file(done, "window"))


def test_out_of_time_the_command_names_what_is_left_and_how_to_go_on(
    done: Path, tmp_path: Path, tiny: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evidence", "--directory", str(tmp_path / "run"), "--minutes", "0"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "0 of 2 parts done" in said
    assert "2 parts are left, full is next; the same command goes on" in said
    assert "no part of this evidence run has been measured yet" in said
    assert not list((tmp_path / "run").glob("parts/*"))


def test_the_report_is_written_from_the_json_alone_and_the_same_again(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(done / "parts", copy / "parts")
    shutil.copy(done / "record.json", copy)
    monkeypatch.chdir(tmp_path)
    words = [
        "report",
        "run",
        "--output",
        "run/report.html",
        "--figures",
        "run/figures",
        "--markdown",
        "run/evidence.md",
    ]
    assert main(words) == 0
    written = {path.relative_to(copy): path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    assert {Path("report.html"), Path("evidence.md")} <= set(written)
    for path, content in written.items():
        assert (done / path).read_bytes() == content, path
    value = json.loads(part_file(done, "full").read_text())["measurements"][0]["value"]
    assert f"{100 * value:.0f}" in (copy / "evidence.md").read_text()


def test_chosen_parts_bring_the_bases_that_they_wait_for(tmp_path: Path) -> None:
    assert go(tmp_path, only=["arms-recall-16-base"], minutes=0) == ["base-recall", "arms-recall-16-base"]
    assert go(tmp_path, only=["arms-chained-8w-base"], minutes=0) == ["arms-chained-8w-base"]


def test_a_name_without_a_part_another_preset_and_senseless_numbers_are_refused(done: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="only must be the beginning of a part's name, got 'arm-'; use for example 'b"):
        go(tmp_path / "new", only=["arms-chained", "arm-"])
    with pytest.raises(ValueError, match="workers must be at least 1, got 0; leave it out"):
        go(tmp_path / "new", workers=0)
    with pytest.raises(ValueError, match="minutes must be 0 or above, got -1; leave it out"):
        go(tmp_path / "new", minutes=-1)
    assert not (tmp_path / "new").exists(), "a refused run leaves no directory behind"
    with pytest.raises(ValueError, match="must be of preset 'full', got .* of 'quick'; set another --directory"):
        go(done, "full", minutes=0)
    assert json.loads((done / "record.json").read_text())["preset"] == "quick"


def test_every_part_of_the_plan_is_a_job_that_a_process_can_be_given_and_a_bar_can_follow(tmp_path: Path) -> None:
    for part in plan("full", tmp_path):
        job = job_of(part, tmp_path, ORIGIN)
        assert pickle.loads(pickle.dumps((job.work, job.arguments))) == (run_part, (part, tmp_path, ORIGIN))
        assert (job.name, job.after) == (part.name, part.after)
        if isinstance(part, TrainedPart | BasePart):
            trained = isinstance(part, TrainedPart)
            steps = (
                part.config.distill.steps + part.config.train.steps if trained else RECIPES[part.base].settings.steps
            )
            assert job.steps == steps > 0
            assert job.metrics == tmp_path / "runs" / part.name / "metrics.jsonl"


def test_a_preset_that_is_none_is_refused_by_its_choices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["evidence", "--preset", "fast"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "--preset" in said and "quick" in said and "full" in said
    assert not list(tmp_path.iterdir())


def test_a_base_that_is_gone_is_made_again_where_a_part_still_waits_for_it(tmp_path: Path) -> None:
    def finish(part: Part) -> None:
        part_file(tmp_path, part.name).parent.mkdir(parents=True, exist_ok=True)
        part_file(tmp_path, part.name).write_text("{}")

    base, waiting = BasePart("base-recall", "recall"), scored("waiting", "base_full")
    waiting = replace(waiting, after=base.name)
    assert parts_left([base, waiting], tmp_path) == [base, waiting]
    finish(base)
    # The part's file came from another machine, the weights did not.
    assert parts_left([base, waiting], tmp_path) == [base, waiting]
    folder = tmp_path / BASES / "recall"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").touch()
    (folder / "training.json").write_text(json.dumps({"settings": asdict(RECIPES["recall"].settings)}))
    assert parts_left([base, waiting], tmp_path) == [waiting]
    finish(waiting)
    shutil.rmtree(folder)
    assert parts_left([base, waiting], tmp_path) == []


def test_parts_of_other_settings_and_damaged_ones_are_named_before_work_starts(
    done: Path, tmp_path: Path, tiny: None
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(done, copy)
    path = part_file(copy, "full")
    whole = path.read_text()
    path.write_text(whole.replace('"fingerprint": "', '"fingerprint": "0'))
    with pytest.raises(ValueError, match=r"got 1 with others in .*run \(full\); delete their files in"):
        go(copy)
    assert go(copy, only=["window"]) == [], "parts that are not chosen do not matter"
    path.write_text(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"a part must be a JSON object .*full.json .*; delete it to measure the part"):
        go(copy)


def test_a_record_that_is_damaged_and_a_directory_that_is_a_file_are_named(tmp_path: Path, tiny: None) -> None:
    (tmp_path / "record.json").write_text('{"preset": "qui')
    with pytest.raises(ValueError, match=r"record.json must be a JSON object with a preset, .*; delete it"):
        go(tmp_path)
    (tmp_path / "record.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"record.json must be a JSON object with a preset, .*; delete it"):
        go(tmp_path)
    with pytest.raises(ValueError, match=r"the directory must be one, got the file .*record.json"):
        go(tmp_path / "record.json")


def test_the_command_says_which_parts_failed_and_still_writes_the_report(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_tiny_plan(monkeypatch)
    missing = scored("broken", "base_full")
    config = replace(missing.readings[0].config, model=ModelConfig(path=str(tmp_path / "nowhere")))
    broken = replace(missing, readings=(replace(missing.readings[0], config=config),))
    monkeypatch.setattr(run, "plan", lambda preset, directory: [broken, *PARTS])
    assert main(["evidence", "--directory", str(tmp_path / "run"), "--workers", "1"]) == 2
    assert "1 parts failed: broken: " in " ".join(capsys.readouterr().err.split())
    assert part_file(tmp_path / "run", "window").is_file() and (tmp_path / "run" / "report.html").is_file()
