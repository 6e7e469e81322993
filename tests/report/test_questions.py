"""Ablations and forgetting: what stands beside what, and what is said of it."""

from __future__ import annotations

import pytest

from pte.report.measurements import Measurement
from pte.report.questions import ablation_section, forgetting_section
from pte.report.runs import Part, RecordedRun
from pte.report.sections import build_report


def measured(question: str, arm: str, value: float, metric: str = "accuracy", /, **more: object) -> Measurement:
    counts = {"right": round(value * 100), "total": 100} if metric == "accuracy" else {}
    seed = more.pop("seed", 0)
    return Measurement(question, "recall", arm, "warm_start", seed, tuple(more.items()), metric, value, **counts)


def ablated(factor: str, value: str, accuracy: float, metric: str = "accuracy") -> Measurement:
    return measured("ablation", "pte_delta", accuracy, metric, factor=factor, value=value)


def test_each_factor_stands_beside_the_reference_that_it_varies() -> None:
    rows = [
        ablated("reference", "reference", 0.9),
        ablated("reference", "reference", 4e8, "peak_memory_bytes"),
        ablated("rank", "64", 0.8),
        ablated("rank", "8", 0.7),
        ablated("gradient_mode", "exact", 0.95),
        ablated("gradient_mode", "exact", 5e8, "peak_memory_bytes"),
        *(ablated("evicted of 20 tokens", f"{percent} %", 0.5) for percent in (5, 50, 25, 10)),
    ]
    section = ablation_section(rows)
    values = {table.title: [row[0] for row in table.rows] for table in section.tables}
    assert values == {
        "Ablation of rank": ["reference", "8", "64"],
        "Ablation of gradient mode": ["reference", "exact"],
        "Ablation of evicted of 20 tokens": ["5 %", "10 %", "25 %", "50 %"],
    }
    rank, mode, _ = section.tables
    assert "peak memory" in mode.columns and "peak memory" not in rank.columns, "of rank it was not measured"
    assert len(section.figures[0].figure.axes) == 1, "nor has it a panel of the reference alone"
    captions = [drawn.caption for drawn in section.figures]
    assert all("one factor at a time, all else as in the row 'reference'." in caption for caption in captions[:2])
    assert "'reference'" not in captions[2] and "not the window of the reference" in captions[2]
    assert "main arms" not in " ".join(captions)


def test_without_a_reference_the_caption_of_an_ablation_promises_none() -> None:
    (drawn,) = ablation_section([ablated("rank", "64", 0.8), ablated("rank", "8", 0.7)]).figures
    assert drawn.caption.startswith("What rank changes, a row for each value. n:")


def test_an_interval_ends_inside_its_panel() -> None:
    rows = [
        measured("ablation", "pte", 1.0 + seed, "step_seconds", seed=seed, factor="rank", value="8") for seed in (0, 1)
    ]
    (drawn,) = ablation_section(rows).figures
    (place,) = drawn.figure.axes
    # Mean 1.5, standard error 0.5, t(1) = 12.706.
    assert place.get_xlim()[0] == 0 and place.get_xlim()[1] > 1.5 + 12.7 * 0.5


def forgotten(ages: tuple[int, ...], **accuracy: float) -> list[Measurement]:
    return [measured("forgetting", arm, value, evictions_ago=age) for arm, value in accuracy.items() for age in ages]


def test_values_that_are_still_kept_stand_apart_on_a_logarithmic_axis() -> None:
    section = forgetting_section(forgotten((0, 1, 2, 4, 8), pte_read=0.5))
    (drawn,) = section.figures
    (place,) = drawn.figure.axes
    assert "log scale" in place.get_xlabel() and place.get_xscale() == "symlog"
    drawn.png()
    assert [text.get_text() for text in place.get_xticklabels()] == ["still kept", "1", "2", "4", "8"]
    lines = [list(line.get_xdata()) for line in place.lines]
    assert [1, 2, 4, 8] in lines and [0] in lines and all(0 not in line or set(line) == {0} for line in lines)
    # Equal steps of the axis: 1 to 2 is as far as 4 to 8.
    at = [place.transData.transform((x, 0.5))[0] for x in (0, 1, 2, 4, 8)]
    assert at[2] - at[1] == pytest.approx(at[4] - at[3]) and at[1] > at[0]
    assert section.tables[0].columns == ("arm", "still kept", "1", "2", "4", "8")


def test_the_share_of_answered_queries_is_a_column_beside_the_accuracies_by_age() -> None:
    answered = [
        measured("forgetting", "pte_read", value, "answered_fraction", seed=seed)
        for seed, value in ((0, 0.5), (1, 0.5))
    ]
    section = forgetting_section([*answered, *forgotten((1, 2), pte_read=0.5, pte_delta=0.75)])
    (table,) = section.tables
    assert table.columns == ("arm", "answered", "1", "2")
    assert [(row[0], row[1]) for row in table.rows] == [("PTE, rule read", "50.0 %"), ("PTE, rule delta", "-")]
    assert len(section.figures) == 1


def test_answered_queries_alone_are_shown_too() -> None:
    section = forgetting_section([measured("forgetting", "pte_read", 0.5, "answered_fraction")])
    assert section.tables[0].rows[0][1] == "PTE, rule read"
    part = Part("part", 1.0, None, (measured("forgetting", "pte_read", 0.5, "answered_fraction"),))
    assert not build_report([RecordedRun("run", "evidence", {}, parts=(part,))], command="pte report").notes
