"""What the report says: tables and sentences that follow from the numbers, for every question and for unknown ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from pte.report.measurements import Measurement
from pte.report.page import render_markdown, render_page, write_figures
from pte.report.questions import capacity_section
from pte.report.ranking import arms_section
from pte.report.runs import Part, RecordedRun, read_run
from pte.report.sections import QUESTIONS, Report, build_report
from pte.report.work import cost_section, memory_section, rl_section
from synthetic_evidence import write_evidence


def measured(question: str, arm: str, value: float, metric: str = "accuracy", /, **more: object) -> Measurement:
    counts = {"right": round(value * 100), "total": 100} if metric == "accuracy" else {}
    seed, stage = more.pop("seed", 0), more.pop("stage", "none" if arm.startswith("base") else "both")
    return Measurement(question, "chained", arm, stage, seed, tuple(more.items()), metric, value, **counts)


def test_the_table_of_arms_says_the_gap_closed_against_arms_that_learned_alike() -> None:
    rows = [
        measured("arms", "base_full", 1.0),
        measured("arms", "lora_full", 0.9),
        measured("arms", "lora_window", 0.1),
        measured("arms", "pte", 0.7),
        measured("arms", "pte", 0.3, stage="warm_start"),
        measured("arms", "lora_window", 0.2, stage="warm_start"),
        measured("arms", "lora_full", 0.4, stage="warm_start"),
    ]
    section = arms_section(rows)
    (table,) = section.tables
    closed = {(row[0], row[1]): row[-2] for row in table.rows}
    assert closed["PTE", "warm start + GRPO"] == "75 %"  # (0.7 - 0.1) / (0.9 - 0.1)
    assert closed["PTE", "warm start"] == "50 %"  # (0.3 - 0.2) / (0.4 - 0.2)
    assert closed["base, full cache", "not trained"] == "-"
    assert section.findings == (
        "chained: PTE (warm start + GRPO) closes 75 % of the gap from LoRA_c to full-cache LoRA.",
    )


def test_without_lora_there_is_no_gap_and_no_sentence_on_it() -> None:
    section = arms_section([measured("arms", "pte", 0.7), measured("arms", "base_full", 1.0)])
    assert section.findings == () and [row[-2] for row in section.tables[0].rows] == ["-", "-"]


def test_a_knee_is_said_per_rule_and_rank() -> None:
    curve = {4: 1.0, 8: 0.92, 16: 0.4}
    rows = [measured("capacity", "pte_read", value, facts=facts, rank=8) for facts, value in curve.items()]
    base = measured("capacity", "base_full", 1.0, facts=4)
    section = capacity_section([*rows, measured("capacity", "pte_paper", 0.2, facts=4, rank=8), base])
    assert section.findings == ("base, full cache: knee at 4 facts.", "PTE, rule read, rank 8: knee at 8 facts.")
    (table,) = section.tables
    assert table.columns == ("rule", "rank", "task", "knee", "4 facts", "8 facts", "16 facts")
    assert [row[3] for row in table.rows] == ["4", "-", "8"] and table.rows[1][5:] == ("-", "-")


def test_memory_tells_a_flat_line_from_a_rising_one() -> None:
    rows = [
        measured("memory", "lora_full", 1024.0 * (tokens + 1), "cache_bytes", tokens=tokens) for tokens in range(100)
    ]
    rows += [
        measured("memory", "pte", 1024.0 * min(tokens + 1, 16), "cache_bytes", tokens=tokens) for tokens in range(100)
    ]
    (finding,) = memory_section(rows).findings
    assert finding == "chained, cache: LoRA, full cache rises to 100 KiB at 99 tokens; PTE stays flat at 16 KiB."


def test_the_memory_of_a_cache_is_that_of_its_state_too() -> None:
    rows = [measured("memory", "pte", 1024.0, "cache_bytes", tokens=tokens) for tokens in (1, 2)]
    rows += [measured("memory", "pte", 512.0, "state_bytes", tokens=tokens) for tokens in (1, 2)]
    section = memory_section(rows)
    assert section.findings == ("chained, cache: PTE stays flat at 1.5 KiB.",)
    assert [drawn.caption[:70] for drawn in section.figures] == [
        "Memory over the tokens of a completion. Cache: with the state's bytes."
    ]


def test_the_share_of_the_state_is_fold_and_read_over_the_whole_wall_time() -> None:
    seconds = {"decode_seconds": 6.0, "fold_seconds": 0.5, "read_seconds": 1.0, "backward_seconds": 2.0}
    # The parts are 10 s; a total among them, or another total of seconds, is no further part.
    totals = {"other_seconds": 0.5, "step_seconds": 10.0, "evaluation_seconds": 7.0, "training_seconds": 100.0}
    section = cost_section([measured("cost", "pte", value, metric) for metric, value in (seconds | totals).items()])
    assert section.findings == ("chained: PTE spends 15.0 % of its wall time on the state.",)
    assert section.tables[0].rows[0][-1] == "15.0 %"
    (drawn,) = section.figures
    (place,) = drawn.figure.axes
    assert sum(bar.get_width() for bar in place.patches) == pytest.approx(10.0)


def test_a_measured_share_of_the_state_is_the_one_that_is_said() -> None:
    seconds = {"fold_seconds": 1.0, "backward_seconds": 9.0, "step_seconds": 10.0, "state_fraction": 0.12}
    section = cost_section([measured("cost", "pte", value, metric) for metric, value in seconds.items()])
    assert section.findings == ("chained: PTE spends 12.0 % of its wall time on the state.",)
    assert "fold + read" not in section.tables[0].columns


def gap_cell(arms: dict[str, dict[int, float]]) -> tuple[str, str]:
    """PTE's gap closed and the note, from accuracies by arm and seed."""
    rows = [measured("arms", arm, value, seed=seed) for arm, seeds in arms.items() for seed, value in seeds.items()]
    (table,) = arms_section(rows).tables
    return next(row[-2] for row in table.rows if row[0] == "PTE"), table.note


def test_the_gap_closed_is_the_mean_over_the_seeds_that_all_three_arms_have() -> None:
    # Seed 0: (0.6 - 0.2) / 0.8 = 0.5; seed 1: (0.5 - 0.1) / 0.8 = 0.5 + 0.1 = 0.6 with 0.58. LoRA_c's seed 2 is alone.
    arms = {
        "lora_full": {0: 1.0, 1: 0.9},
        "lora_window": {0: 0.2, 1: 0.1, 2: 0.9},
        "pte": {0: 0.6, 1: 0.58},
    }
    cell, note = gap_cell(arms)
    # Gaps 50 % and 60 %: mean 55, standard error 5, t(1) = 12.706.
    assert cell == "55 % [-9, 119]"
    assert "each seed that the arm and both references have (n: 2), 95 % intervals of Student's t" in note


def test_one_common_seed_gives_a_gap_without_an_interval() -> None:
    arms = {"lora_full": {0: 1.0}, "lora_window": {0: 0.2, 1: 0.9}, "pte": {0: 0.6, 1: 0.9}}
    cell, note = gap_cell(arms)
    assert cell == "50 %" and "(n: 1)." in note


def test_a_gap_that_rounds_to_nothing_has_no_sign() -> None:
    cell, _ = gap_cell({"lora_full": {0: 1.0}, "lora_window": {0: 0.2}, "pte": {0: 0.199}})
    assert cell == "0 %"


def test_without_a_common_seed_the_gap_is_that_of_the_means_and_the_note_says_so() -> None:
    arms = {"lora_full": {0: 1.0}, "lora_window": {1: 0.2}, "pte": {2: 0.8}}
    cell, note = gap_cell(arms)
    assert cell == "75 %" and "Gap closed of PTE: of the means over all seeds of each arm" in note


def test_the_cache_of_an_arm_is_its_cache_and_its_state() -> None:
    rows = [
        measured("arms", "lora_full", 4096.0, "cache_bytes"),
        measured("arms", "pte", 1024.0, "cache_bytes"),
        measured("arms", "pte", 512.0, "state_bytes"),
        measured("arms", "pte", 1024.0, "cache_bytes", seed=1),
    ]
    (table,) = arms_section(rows).tables
    assert table.columns == ("arm", "cache", "gap closed", "seeds")
    assert [row[1] for row in table.rows] == ["4 KiB", "1.5 KiB"]
    assert table.note == "Cache: with the state's bytes where these were measured."


def evidence_of(*parts: Part, **record: object) -> Report:
    return build_report([RecordedRun("run", "evidence", record, parts=parts)], command="pte report")


def test_every_machine_that_parts_were_measured_on_is_named() -> None:
    row = (measured("arms", "pte", 0.5),)
    report = evidence_of(
        Part("a", 1.0, None, row, hardware={"cpu": "A", "gpus": []}, versions={"torch": "1"}),
        Part("b", 1.0, None, (measured("arms", "pte", 0.5, seed=3),), hardware={"cpu": "B", "gpus": ["H200"]}),
        Part("c", 1.0, None, row),
        hardware={"cpu": "C"},
        versions={"torch": "2"},
    )
    assert dict(report.facts)["hardware"] == "A, no GPU; B, H200; C"
    runs, parts = report.provenance
    (told,) = [dict(zip(runs.columns, row, strict=True)) for row in runs.rows]
    assert told["hardware"] == "A, no GPU; B, H200; C" and told["versions"] == "torch 1; torch 2"
    assert told["seeds"] == "0, 3", "the measurements say at which"
    assert parts.columns == ("part", "measurements", "wall time", "commit")


def test_names_of_figures_are_file_names_whatever_metrics_are_called(tmp_path: Path) -> None:
    rows = tuple(
        measured("rules", "pte", 1.0, metric, evictions=count)
        for metric in ("tokens/second", "tokens second", "../norm")
        for count in (1, 10)
    )
    report = evidence_of(Part("a", 1.0, None, rows))
    written = write_figures(report, tmp_path / "figures")
    assert sorted((tmp_path / "figures").iterdir()) == sorted(written) and len(set(written)) == 3


def test_reward_at_both_ends_is_the_mean_of_a_tenth_of_the_steps() -> None:
    rows = [measured("rl", "pte", step / 20, "reward", step=step, seconds=3.0 * step) for step in range(20)]
    (table,) = rl_section(rows).tables
    # The first two are 0 and 0.05, the last two 0.9 and 0.95.
    assert table.rows[0][3:6] == ("0.025", "0.925", "57 s")


def test_every_question_has_its_section_and_no_other(evidence_run: Path) -> None:
    report = build_report([read_run(str(evidence_run))], command="pte report")
    assert [section.name for section in report.sections] == [*QUESTIONS, "question-surprise"]
    assert not report.notes and not report.viewer
    assert all(section.tables for section in report.sections)
    figures = [drawn.name for section in report.sections for drawn in section.figures]
    assert len(set(figures)) == len(figures) >= len(QUESTIONS)
    for section in report.sections:
        for drawn in section.figures:
            assert "n: 3 seeds" in drawn.caption or "seeds" in drawn.caption, drawn.caption


@pytest.mark.parametrize("question", QUESTIONS)
def test_one_measurement_without_a_setting_is_shown_whatever_it_was_asked_for(question: str) -> None:
    part = Part("part", 1.0, None, (measured(question, "an_arm", 0.5, "something"),))
    report = build_report([RecordedRun("run", "evidence", {}, parts=(part,))], command="pte report")
    (section,) = report.sections
    assert any("an arm" in row for table in section.tables for row in table.rows)
    page = render_page(report)
    assert "an arm" in page and "something" in render_markdown(report, images=None)


def test_measurements_that_do_not_fit_their_question_become_a_plain_table_with_a_note(tmp_path: Path) -> None:
    directory = write_evidence(tmp_path / "evidence", seeds=(0,), questions=("surprise",))
    for part in (directory / "parts").glob("*.json"):
        part.write_text(part.read_text().replace('"surprise"', '"forgetting"'))
    report = build_report([read_run(str(directory))], command="pte report")
    assert [section.name for section in report.sections] == ["question-forgetting"]
    assert "needs the number 'evictions_ago'" in report.notes[0]
    assert report.sections[0].tables[0].rows[0][1] == "an arm of later"


def test_seeds_of_several_runs_are_one_arm(tmp_path: Path) -> None:
    runs = [
        read_run(str(write_evidence(tmp_path / str(seed), seeds=(seed,), questions=("forgetting",)))) for seed in (0, 1)
    ]
    report = build_report(runs, command="pte report")
    (figure,) = report.sections[0].figures
    assert "n: 2 seeds" in figure.caption and dict(report.facts)["seeds"] == "0, 1"


def test_grpo_with_and_without_a_warm_start_are_curves_of_their_own() -> None:
    rows = [
        Measurement("rl", "chained", "pte", stage, 0, (("step", step), ("seconds", step)), "reward", value)
        for stage, value in (("both", 0.75), ("grpo", 0.0))
        for step in (1, 2)
    ]
    section = rl_section(rows)
    assert len(section.figures) == 2
    assert [row[0] for row in section.tables[0].rows] == [
        "chained after a warm start",
        "chained without a warm start",
    ]
    assert [row[4][:4] for row in section.tables[0].rows] == ["0.75", "0.00"]


def test_a_training_that_stopped_is_named_and_is_no_score() -> None:
    rows = (
        measured("arms", "lora_full", 0.9, stage="warm_start", windows=8),
        measured("arms", "lora_window", 0.1, stage="warm_start", windows=8),
        measured("arms", "pte_paper", 37.0, "stopped_at_step", seed=1, stage="warm_start", windows=8),
    )
    run = RecordedRun("it", "evidence", {}, parts=(Part("p", 1.0, None, rows),))
    report = build_report([run], command="pte report it")
    assert report.notes == (
        "PTE, rule paper (chained, 8 windows, seed 1) stopped at step 37, as its loss, gradient or log-prob gap was "
        "not sound; it has no scores in the section 'arms'.",
    )
    (section,) = report.sections
    # Arm, accuracy, gap closed, seeds.
    assert [(row[0], row[1][:6], row[3]) for row in section.tables[0].rows] == [
        ("LoRA, full cache", "90.0 %", "1"),
        ("LoRA, window (LoRA_c)", "10.0 %", "1"),
        ("PTE, rule paper", "-", "0 of 1, 1 stopped"),
    ]


def test_an_arm_that_stopped_at_one_of_its_seeds_says_so_in_its_row() -> None:
    rows = [measured("arms", "pte_paper", value, seed=seed) for seed, value in ((0, 0.5), (2, 0.7))]
    rows.append(measured("arms", "pte_paper", 37.0, "stopped_at_step", seed=1))
    (row,) = arms_section(rows).tables[0].rows
    assert row[-1] == "2 of 3, 1 stopped" and row[1].startswith("60.0 %")
