"""Measurements: how they are read, named and ordered."""

from __future__ import annotations

import pytest

from pte.arms import ARMS
from pte.report import style
from pte.report.measurements import parse_measurement, sort_key, words

ROW = {"task": "recall", "arm": "pte", "stage": "both", "seed": 1, "setting": {"facts": 8}, "metric": "accuracy"}


def test_a_measurement_keeps_what_it_says() -> None:
    one = parse_measurement({**ROW, "value": 0.5, "right": 4, "total": 8}, question="capacity", where="part")
    assert one is not None
    assert (one.question, one.task, one.arm, one.seed, one.number("facts")) == ("capacity", "recall", "pte", 1, 8.0)
    assert (one.value, one.right, one.total, one.at("rank")) == (0.5, 4, 8, None)


@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
def test_what_could_not_be_measured_is_no_measurement(value: float | None) -> None:
    assert parse_measurement({**ROW, "value": value}, question="capacity", where="part") is None


@pytest.mark.parametrize("row", [{}, [], "x", {**ROW, "value": "much"}, {**ROW, "value": 1, "seed": "first"}])
def test_what_is_no_measurement_is_refused_with_its_place(row: object) -> None:
    with pytest.raises(ValueError, match=r"parts/a.json, measurement 3: .*; measure this part again"):
        parse_measurement(row, question="capacity", where="parts/a.json, measurement 3")


def test_a_condition_that_is_missing_is_named() -> None:
    one = parse_measurement({**ROW, "value": 1}, question="capacity", where="part")
    with pytest.raises(ValueError, match=r"'capacity' needs the number 'rank' .*\{'facts': 8\}"):
        one.number("rank")


def test_numbers_come_by_size_words_by_letters_and_by_their_number() -> None:
    values = ["horizon 16", "64", 8, "chain", "horizon 4", "0.5"]
    assert sorted(values, key=sort_key) == ["0.5", 8, "64", "chain", "horizon 4", "horizon 16"]
    assert sorted(["50 %", "5 %", "25 %", "10 %"], key=sort_key) == ["5 %", "10 %", "25 %", "50 %"]
    assert sorted(["8b", "10.5.1", "9"], key=sort_key) == ["9", "10.5.1", "8b"], "no number stands at their beginning"


def test_settings_read_like_words() -> None:
    assert words((("windows", 4), ("rank", 32), ("window_tokens", 16))) == "4 windows, rank 32, window of 16 tokens"
    assert words((("windows", 1), ("factor", "all_maps"))) == "1 window, factor all_maps"


def test_every_arm_has_a_label_and_a_colour_of_its_own() -> None:
    assert set(ARMS) <= set(style.LABELS) and set(ARMS) <= set(style.COLOURS)
    assert len({style.COLOURS[name] for name in ARMS}) == len(ARMS) == len({style.LABELS[name] for name in ARMS})
    larger = {name for name, arm in ARMS.items() if arm.cache == "larger"}
    assert {name for name in ARMS if style.label(name).endswith("+ state's bytes")} == larger
    rules = {name: arm.update_rule for name, arm in ARMS.items() if arm.update_rule}
    assert {name: style.label(name) for name in rules} == {name: f"PTE, rule {rule}" for name, rule in rules.items()}
    # What is no arm but drawn beside them: every token kept.
    assert set(style.LABELS) == set(style.COLOURS) == {*ARMS, "every token kept"}


def test_unknown_arms_get_a_label_a_colour_and_a_place_of_their_own() -> None:
    names = ["zebra", "pte_delta", "pte_zeroed", "lora_full", "pte_read"]
    assert style.ordered(names) == ["lora_full", "pte_read", "pte_delta", "pte_zeroed", "zebra"]
    assert (style.label("pte_delta"), style.label("zebra_rule")) == ("PTE, rule delta", "zebra rule")
    assert len(set(style.colours(names).values())) == len(names)


@pytest.mark.parametrize(
    ("metric", "value", "text"),
    [
        ("accuracy", 0.9213, "92.1 %"),
        ("cache_bytes", 10.3 * 2**20, "10.3 MiB"),
        ("cache_bytes", 100, "100 B"),
        ("seconds", 0.25, "250 ms"),
        ("seconds", 912, "15.2 min"),
        ("tokens", 300_000, "300 k"),
        ("tokens", 9000, "9,000"),
        ("update_flops_per_token", 4.1e9, "4.1 G"),
        ("reward", 0.12, "0.120"),
        ("logprob_gap_max", 8e-5, "8.0e-05"),
        ("state_norm", 0, "0"),
    ],
)
def test_values_are_shown_with_the_unit_they_are_read_in(metric: str, value: float, text: str) -> None:
    assert style.shown(metric, value) == text
