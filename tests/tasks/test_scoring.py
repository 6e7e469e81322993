"""Scores and intervals: against enumeration, by hand, and by how often they cover the truth."""

import inspect
from itertools import combinations
from math import comb

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pte.tasks.scoring import Interval, avg_at_k, avg_at_k_interval, pass_at_k, wilson_interval


def table(*rows):
    return torch.tensor(rows, dtype=torch.bool)


TABLES = st.integers(1, 7).flatmap(
    lambda samples: st.lists(st.lists(st.booleans(), min_size=samples, max_size=samples), min_size=1, max_size=5)
)


def test_avg_at_k_is_the_share_of_right_samples():
    assert avg_at_k(table([1, 0, 0, 0], [1, 1, 1, 0])) == 0.5


@given(TABLES, st.data())
def test_pass_at_k_is_the_share_of_the_subsets_of_k_with_a_right_sample(rows, data):
    k = data.draw(st.integers(1, len(rows[0])))
    shares = []
    for row in rows:
        subsets = list(combinations(row, k))
        shares.append(sum(any(subset) for subset in subsets) / len(subsets))
    assert pass_at_k(table(*rows), k) == pytest.approx(sum(shares) / len(shares), abs=1e-12)


@pytest.mark.parametrize(("num_correct", "k"), [(1, 16), (3, 100), (511, 2), (512, 512), (0, 512), (2, 511)])
def test_pass_at_k_equals_the_binomial_formula_for_many_samples(num_correct, k):
    correct = torch.arange(512)[None] < num_correct
    # integers of any size: exact up to the division
    expected = 1 - comb(512 - num_correct, k) / comb(512, k)
    assert pass_at_k(correct, k) == pytest.approx(expected, abs=1e-12)


@given(TABLES)
def test_pass_at_1_is_avg_at_k(rows):
    assert pass_at_k(table(*rows), 1) == pytest.approx(avg_at_k(table(*rows)), abs=1e-12)


def test_wilson_interval_by_hand():
    # z = 1.96, n = 10, p = 0.5: centre 0.5, half width 1.96 sqrt(0.025 + 3.8416 / 400) / 1.38416 = 0.26341
    interval = wilson_interval(5, 10)
    assert interval.low == pytest.approx(0.23659, abs=1e-5)
    assert interval.high == pytest.approx(0.76341, abs=1e-5)
    # p = 0: high = (z^2 / n) / (1 + z^2 / n) = 3.8415 / 13.8415
    assert wilson_interval(0, 10) == Interval(low=0.0, high=pytest.approx(0.27754, abs=1e-5))


@given(st.integers(1, 200), st.data())
def test_wilson_interval_holds_the_rate_mirrors_and_widens_with_confidence(trials, data):
    successes = data.draw(st.integers(0, trials))
    interval, mirrored = wilson_interval(successes, trials), wilson_interval(trials - successes, trials)
    assert 0 <= interval.low <= successes / trials <= interval.high <= 1
    assert interval.low == pytest.approx(1 - mirrored.high, abs=1e-12)
    wide = wilson_interval(successes, trials, confidence=0.99)
    assert wide.low <= interval.low + 1e-12
    assert interval.high <= wide.high + 1e-12


@given(st.lists(st.booleans(), min_size=1, max_size=60))
def test_with_one_sample_a_problem_the_interval_is_wilsons(answers):
    interval, wilson = avg_at_k_interval(table(answers).T), wilson_interval(sum(answers), len(answers))
    assert interval.low == pytest.approx(wilson.low, abs=1e-9)
    assert interval.high == pytest.approx(wilson.high, abs=1e-9)


@given(TABLES)
def test_the_interval_lies_between_independent_samples_and_one_sample_a_problem(rows):
    correct = table(*rows)
    problems, samples = correct.shape
    rate = avg_at_k(correct)
    width = {trials: wilson_interval(rate * trials, trials) for trials in (problems, problems * samples)}
    interval = avg_at_k_interval(correct)
    assert width[problems].low - 1e-9 <= interval.low <= width[problems * samples].low + 1e-9
    assert width[problems * samples].high - 1e-9 <= interval.high <= width[problems].high + 1e-9


def test_copied_samples_are_worth_no_more_than_one():
    once = table([1], [0], [1], [1], [0])
    copied = avg_at_k_interval(once.expand(5, 16))
    assert copied.low == pytest.approx(avg_at_k_interval(once).low)
    assert copied.high == pytest.approx(avg_at_k_interval(once).high)


def test_unequal_problems_are_worth_fewer_trials_than_samples_by_hand():
    # Accuracies 0.5 and 0.5, with 0 and 1 added: p = 0.5, s2 = (0.25 + 0.25) / 4 = 0.125, worth 0.25 / 0.125 = 2.
    correct = (torch.arange(16) < 8).expand(2, 16)
    assert avg_at_k_interval(correct) == wilson_interval(2, 4)


def test_equally_hard_problems_are_worth_their_samples_and_no_more():
    # Accuracy 0.5 each: p (1 - p) / s2 = 0.25 / (0.5 / 32) = 16 for two samples, cut to 2.
    assert avg_at_k_interval(table(*[[1, 0]] * 30)) == wilson_interval(30, 60)


def test_a_set_that_is_all_wrong_is_not_certain():
    # 30 problems, 16 samples each: worth 30 trials, not 480. high = z^2 / (30 + z^2) = 3.8415 / 33.8415
    interval = avg_at_k_interval(torch.zeros(30, 16, dtype=torch.bool))
    assert interval.low == 0
    assert interval.high == pytest.approx(0.11351, abs=1e-5)


@pytest.mark.parametrize(("alpha", "beta"), [(0.4, 0.8), (2.0, 2.0), (0.2, 3.0)])
def test_the_interval_covers_the_true_rate_about_as_often_as_it_says(alpha, beta):
    # 30 problems of unequal difficulty as in AIME, 16 samples; 95 % of 2000 evaluations should be covered.
    torch.manual_seed(0)
    difficulty = torch.distributions.Beta(alpha, beta).sample((2000, 30))
    correct = torch.rand(2000, 30, 16) < difficulty[..., None]
    intervals = [avg_at_k_interval(one) for one in correct]
    covered = sum(interval.low <= alpha / (alpha + beta) <= interval.high for interval in intervals) / 2000
    assert 0.93 <= covered <= 0.99
    # Taking the samples for independent covers far less.
    naive = [wilson_interval(one.sum().item(), 480) for one in correct]
    assert sum(interval.low <= alpha / (alpha + beta) <= interval.high for interval in naive) / 2000 < covered - 0.1


@pytest.mark.parametrize("k", [0, -1, 5])
def test_k_outside_the_samples_is_refused(k):
    with pytest.raises(ValueError, match=rf"k must be between 1 and the number of samples \(4\), got {k}"):
        pass_at_k(table([1, 0, 0, 1]), k)


@pytest.mark.parametrize(("function", "arguments"), [(avg_at_k, ()), (pass_at_k, (1,)), (avg_at_k_interval, ())])
@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (4,)])
def test_a_table_without_problems_or_samples_is_refused(function, arguments, shape):
    # Without the shape checks of the tests, which would refuse the last shape first.
    with pytest.raises(ValueError, match="correct must have a row for each problem"):
        inspect.unwrap(function)(torch.zeros(shape, dtype=torch.bool), *arguments)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((1, 0, 0.95), "trials must be above 0, got 0"),
        ((3, 2, 0.95), r"successes must be between 0 and trials \(2\), got 3"),
        ((-1, 2, 0.95), r"successes must be between 0 and trials \(2\), got -1"),
        ((1, 2, 1.0), "confidence must be between 0 and 1, got 1.0"),
        ((1, 2, 0.0), "confidence must be between 0 and 1, got 0.0"),
    ],
)
def test_wilson_arguments_out_of_range_are_refused(arguments, text):
    successes, trials, confidence = arguments
    with pytest.raises(ValueError, match=text):
        wilson_interval(successes, trials, confidence=confidence)


def test_a_confidence_out_of_range_is_refused_over_problems_too():
    with pytest.raises(ValueError, match="confidence must be between 0 and 1, got 95"):
        avg_at_k_interval(table([1, 0]), confidence=95)
