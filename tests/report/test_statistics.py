"""Means and intervals: against tables, closed forms and cases small enough to work out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pte.report.measurements import Measurement
from pte.report.statistics import estimate, gap_closed, interpolated, knee, running_mean, t_quantile
from pte.tasks.scoring import wilson_interval


def measured(value: float, seed: int = 0, **counts: int) -> Measurement:
    return Measurement("arms", "chained", "pte", "both", seed, (), "accuracy", value, **counts)


# Student's t, two-sided 95 %, as in any table.
@pytest.mark.parametrize(
    ("degrees", "quantile"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (9, 2.262), (30, 2.042)]
)
def test_t_quantiles_are_those_of_the_table(degrees: int, quantile: float) -> None:
    assert t_quantile(0.975, degrees) == pytest.approx(quantile, abs=6e-4)


@given(st.floats(0.51, 0.999))
def test_t_with_one_and_two_degrees_is_its_closed_form(probability: float) -> None:
    assert t_quantile(probability, 1) == pytest.approx(math.tan(math.pi * (probability - 0.5)), rel=1e-9)
    centred = 2 * probability - 1
    assert t_quantile(probability, 2) == pytest.approx(centred * math.sqrt(2 / (1 - centred**2)), rel=1e-9)


@pytest.mark.parametrize(
    ("probability", "degrees", "text"), [(0.4, 3, "between 0.5 and 1, got 0.4"), (0.975, 0, "got 0")]
)
def test_a_quantile_that_does_not_exist_is_refused(probability: float, degrees: int, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        t_quantile(probability, degrees)


def test_three_seeds_have_a_t_interval() -> None:
    # Mean 0.6, standard deviation 0.1, standard error 0.1 / sqrt(3), t(2) = 4.3027: 0.6 +- 0.2484.
    one = estimate([measured(0.5, 0), measured(0.6, 1), measured(0.7, 2)])
    assert (one.seeds, one.interval) == (3, "t over seeds")
    assert (one.mean, one.low, one.high) == pytest.approx((0.6, 0.6 - 0.24841, 0.6 + 0.24841), abs=1e-4)


def test_the_interval_of_a_rate_stays_within_0_and_1() -> None:
    one = estimate([measured(0.9, 0, right=9, total=10), measured(1.0, 1, right=10, total=10)])
    assert one.high == 1.0 and one.low == pytest.approx(0.95 - 12.706 * 0.05, abs=1e-3)


@pytest.mark.parametrize(
    ("metric", "low", "high"),
    [
        ("accuracy", 0, 1),
        ("reward", 0, 1),
        ("state_fraction", 0, 1),
        ("step_seconds", 0, 4.3119),
        ("loss", -3.4119, 4.3119),
    ],
)
def test_an_interval_ends_where_its_metric_does(metric: str, low: float, high: float) -> None:
    # Mean 0.45, standard error 0.3039..., t(1) = 12.706: half of the interval is 3.8619.
    one = estimate([replace(measured(value, seed), metric=metric) for seed, value in enumerate((0.146, 0.754))])
    assert (one.low, one.high) == pytest.approx((low, high), abs=1e-2)


def test_one_seed_has_wilson_s_interval_of_its_answers() -> None:
    one, wilson = estimate([measured(0.75, right=96, total=128)]), wilson_interval(96, 128)
    assert (one.low, one.high, one.total, one.interval) == (wilson.low, wilson.high, 128, "Wilson")


def test_seeds_that_agree_do_not_look_certain() -> None:
    one, wilson = estimate([measured(1.0, seed, right=64, total=64) for seed in range(3)]), wilson_interval(192, 192)
    assert (one.low, one.high, one.seeds) == (wilson.low, 1.0, 3) and wilson.low < 1


def test_one_seed_of_a_number_that_is_no_rate_has_no_interval() -> None:
    one = estimate([measured(12.5)])
    assert (one.mean, one.low, one.high, one.interval) == (12.5, None, None, "none")


def test_several_values_of_a_seed_count_once() -> None:
    # Seed 0 was measured twice: its mean, 0.3, and seed 1's 0.5 are two values, not three.
    one = estimate([measured(0.2, 0), measured(0.4, 0), measured(0.5, 1)])
    assert one.seeds == 2 and one.mean == pytest.approx(0.4)


def test_the_gap_closed_is_0_at_lora_c_and_1_at_the_full_cache() -> None:
    assert gap_closed(0.2, low=0.2, high=0.7) == 0 and gap_closed(0.7, low=0.2, high=0.7) == 1
    assert gap_closed(0.6, low=0.2, high=0.7) == pytest.approx(0.8)
    assert gap_closed(0.6, low=0.7, high=0.7) is None


def test_the_knee_is_the_last_load_before_the_first_fall() -> None:
    assert knee({4: 1.0, 8: 0.95, 16: 0.5, 32: 0.93}) == 8, "a later recovery is no capacity"
    assert knee({4: 0.8}) is None
    assert knee({4: 0.9}) == 4


def test_a_running_mean_looks_back_only() -> None:
    assert running_mean([1, 3, 5, 7], 2) == [1, 2, 4, 6]
    assert running_mean([1, 3], 0) == [1, 3]


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=6))
def test_an_interpolated_curve_goes_through_its_points(values: list[float]) -> None:
    points = [(float(2 * place), value) for place, value in enumerate(values)]
    assert interpolated(points, [x for x, _ in points]) == pytest.approx(values)


def test_between_points_a_curve_is_a_straight_line_and_beyond_them_it_stays() -> None:
    assert interpolated([(0, 0), (4, 8)], [-1, 1, 2, 4, 9]) == [0, 2, 4, 8, 8]
