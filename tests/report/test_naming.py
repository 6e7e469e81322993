"""Which runs are seeds of one arm, and what arms are called."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pte.report.derived import measurements_of, unrepeated
from pte.report.measurements import of_metric
from pte.report.naming import names_of_lines, with_names
from pte.report.runs import RecordedRun, read_run
from pte.report.sections import build_report
from pte.report.work import learning_section
from synthetic_evidence import write_evidence


def write_run(directory: Path, *, seed: int = 0, rank: int = 8, accuracy: float = 0.75) -> RecordedRun:
    """A training run of two GRPO steps."""
    directory.mkdir(parents=True)
    run = {"seed": seed, "name": directory.name}
    config = {"task": {"kind": "chained"}, "adapter": {"rank": rank}, "cache": {"window_tokens": 4}, "run": run}
    (directory / "record.json").write_text(json.dumps({"config": config}))
    row = {"stage": "grpo", "reward": accuracy, "seconds": 2.0 + seed + accuracy, "tokens_per_second": 10.0}
    (directory / "metrics.jsonl").write_text("".join(json.dumps({"step": step, **row}) + "\n" for step in (1, 2)))
    scores = {"accuracy": accuracy, "problems": 8, "samples_per_problem": 1}
    (directory / "summary.json").write_text(json.dumps({"evaluations": {"chained": scores}}))
    return read_run(str(directory))


def names(*runs: RecordedRun) -> list[str]:
    return [run.arms[0].name for run in with_names(runs)]


def test_seeds_of_one_configuration_are_one_arm_whose_mean_is_shown(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "rank8" / f"seed{seed}", seed=seed, accuracy=0.5 + seed / 4) for seed in (0, 1)]
    assert names(*runs) == ["rank8", "rank8"], "the directory above, as nothing but the seed is in the name"
    report = build_report(runs, command="pte report")
    arms = next(section for section in report.sections if section.name == "arms")
    ((name, accuracy, *_, seeds),) = arms.tables[0].rows
    assert (name, accuracy.partition(" [")[0], seeds) == ("rank8", "62.5 %", "2")
    rl = next(section for section in report.sections if section.name == "rl")
    assert [row[1:3] for row in rl.tables[0].rows] == [("rank8", "2")] and not report.notes


@pytest.mark.parametrize(
    ("directories", "name"),
    [
        (("pte-seed0", "pte-seed1"), "pte"),
        (("wide_seed_3",), "wide"),
        (("try", "try-again"), "try"),
        (("lr3-a", "lr3-b"), "lr3"),
        (("first", "second"), "first and 1 more"),
    ],
)
def test_an_arm_is_called_what_its_directories_share(tmp_path: Path, directories: tuple[str, ...], name: str) -> None:
    runs = [write_run(tmp_path / directory, seed=seed) for seed, directory in enumerate(directories)]
    assert set(names(*runs)) == {name}


def test_other_configurations_are_other_arms_whatever_their_directories_are_called(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / place / "try", rank=rank) for place, rank in (("a", 8), ("b", 16))]
    assert names(*runs) == ["a/try", "b/try"]
    seeds = [write_run(tmp_path / f"x-seed{seed}", seed=seed, rank=8 * (1 + seed)) for seed in (0, 1)]
    assert names(*seeds) == ["x-seed0", "x-seed1"]
    found, notes = unrepeated(with_names(runs))
    assert [one.arm for one in of_metric(found, "accuracy")] == ["a/try", "b/try"] and not notes
    # Neither's curve is drawn over the other's.
    learning = learning_section(with_names(runs))
    assert learning is not None and len(learning.figures[0].figure.legends[0].get_texts()) == 2


def test_a_run_without_a_recorded_configuration_is_alone(tmp_path: Path) -> None:
    for place in ("a", "b"):
        write_run(tmp_path / place / "try")
        (tmp_path / place / "try" / "record.json").unlink()
    assert names(*(read_run(str(tmp_path / place / "try")) for place in ("a", "b"))) == ["a/try", "b/try"]


def test_every_seed_has_a_curve_of_its_own(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"pte-seed{seed}", seed=seed) for seed in (0, 1)]
    learning = learning_section(with_names(runs))
    assert learning is not None
    texts = [text.get_text() for text in learning.figures[0].figure.legends[0].get_texts()]
    assert texts == ["pte, seed 0", "pte, seed 1"]
    again = write_run(tmp_path / "more" / "pte-seed1", seed=1)
    assert [*names_of_lines(with_names([*runs, again])).values()] == [*texts, f"pte, seed 1, {again.path}"]


def test_a_seed_that_two_runs_have_counts_once_and_a_note_says_so(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, accuracy=value) for name, value in (("try-a", 0.5), ("try-b", 1.0))]
    report = build_report(runs, command="pte report")
    arms = next(section for section in report.sections if section.name == "arms")
    ((name, accuracy, *_),) = arms.tables[0].rows
    assert name == "try" and accuracy.startswith("50.0 %"), "the first one's"
    (note,) = report.notes
    assert note.startswith(f"{tmp_path / 'try-b'} has 4 measurements that {tmp_path / 'try-a'} has too (try, seed 0)")


def test_parts_that_two_directories_hold_count_once(tmp_path: Path) -> None:
    runs = [
        read_run(str(write_evidence(tmp_path / name, seeds=(0,), questions=("capacity", "rl")))) for name in ("a", "b")
    ]
    found, notes = unrepeated(runs)
    assert found == measurements_of(runs[:1]) and len(notes) == 1
    assert f"{tmp_path / 'b'} has {len(found)} measurements that {tmp_path / 'a'} has too" in notes[0]


def test_comparisons_of_several_configurations_are_not_one(tmp_path: Path) -> None:
    runs = []
    for place, rank in (("narrow", 8), ("wide", 16)):
        write_run(tmp_path / place / "pte", rank=rank)
        scores = {"pte": {"accuracy": rank / 16, "problems": 8, "samples_per_problem": 1}}
        (tmp_path / place / "pte" / "result.json").write_text(json.dumps(scores))
        (tmp_path / place / "record.json").write_text((tmp_path / place / "pte" / "record.json").read_text())
        (tmp_path / place / "summary.json").write_text("{}")
        runs.append(read_run(str(tmp_path / place)))
    found, notes = unrepeated(with_names(runs))
    scores = [one for one in of_metric(found, "accuracy") if one.question == "arms"]
    assert {one.at("comparison"): one.value for one in scores} == {"narrow": 0.5, "wide": 1.0} and not notes
    assert {one.at("comparison") for one in of_metric(found, "reward")} == {"narrow", "wide"}
    assert all(one.at("comparison") is None for one in measurements_of(with_names(runs[:1])))
