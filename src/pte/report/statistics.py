"""Means and how far chance could have moved them.

Decides: what the interval of a mean is. Over two or more seeds, Student's t over the seeds' values; with one seed,
Wilson's interval of its right answers; where all seeds agree to the last digit, t would claim certainty, and Wilson's
interval of all answers together stands instead. Nothing is said where nothing is known: one seed of a number that is no
rate has no interval. An interval of t ends where its metric does: a rate at 0 and 1, seconds, bytes and counts at 0.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pte.report.measurements import grouped
from pte.report.style import is_amount, is_percent
from pte.tasks.scoring import wilson_interval

if TYPE_CHECKING:
    from pte.report.measurements import Measurement

IntervalKind = Literal["t over seeds", "Wilson", "none"]
KNEE = 0.9


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval.

    Args:
        mean: Over seeds.
        low: Of the interval; None without one.
        high: Likewise.
        seeds: How many.
        interval: How it was computed.
        total: Answers behind it, over all seeds; None where it is no rate of answers.
    """

    mean: float
    low: float | None
    high: float | None
    seeds: int
    interval: IntervalKind
    total: int | None = None


def t_quantile(probability: float, degrees: int) -> float:
    """The quantile of Student's t distribution.

    Its distribution function has a closed form for whole degrees of freedom: with theta = atan(t / sqrt(n)), the
    probability of |T| < t is a finite sum of powers of cos(theta) (Abramowitz and Stegun, 26.7.3 and 26.7.4); it is
    inverted by bisection over theta.

    Args:
        probability: Above 0.5, below 1.
        degrees: n, at least 1.

    Raises:
        ValueError: An argument outside its range.
    """
    if not 0.5 < probability < 1:
        raise ValueError(f"probability must be between 0.5 and 1, got {probability}; use 0.975 for a 95 % interval")
    if degrees < 1:
        raise ValueError(f"degrees of freedom must be at least 1, got {degrees}; use two seeds or more")
    inside = 2 * probability - 1
    low, high = 0.0, math.pi / 2
    for _ in range(200):
        theta = (low + high) / 2
        if probability_within(theta, degrees) < inside:
            low = theta
        else:
            high = theta
    return math.sqrt(degrees) * math.tan((low + high) / 2)


def probability_within(theta: float, degrees: int) -> float:
    """P(|T| < sqrt(n) tan(theta)) for Student's t with n degrees of freedom."""
    cosine, sine = math.cos(theta), math.sin(theta)
    odd = degrees % 2
    term = cosine if odd else 1.0
    total = term if degrees > 1 or not odd else 0.0
    for power in range(2 + odd, degrees - 1, 2):
        term *= cosine**2 * (power - 1) / power
        total += term
    return 2 / math.pi * (theta + sine * total) if odd else sine * total


def estimate(measurements: Sequence[Measurement]) -> Estimate:
    """The mean of measurements of one thing, each seed's values averaged first.

    Args:
        measurements: At least one; they differ in nothing but seed and value.
    """
    by_seed = grouped(measurements, lambda one: one.seed)
    values = [statistics.fmean(one.value for one in group) for group in by_seed.values()]
    mean = statistics.fmean(values)
    counted = [one for one in measurements if one.right is not None and one.total]
    total = sum(one.total or 0 for one in counted) if len(counted) == len(measurements) else None
    if len(values) > 1 and statistics.stdev(values) > 0:
        half = t_quantile(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
        lowest, highest = limits(measurements[0].metric, values, counted=total is not None)
        low, high = max(lowest, mean - half), min(highest, mean + half)
        return Estimate(mean, low, high, len(values), "t over seeds", total)
    if total is not None:
        interval = wilson_interval(sum(one.right or 0 for one in counted), total)
        return Estimate(mean, interval.low, interval.high, len(values), "Wilson", total)
    return Estimate(mean, None, None, len(values), "none")


def limits(metric: str, values: Sequence[float], *, counted: bool) -> tuple[float, float]:
    """What the mean of a metric cannot be below or above.

    Args:
        metric: Its name.
        values: Of the seeds; a metric of which one is outside its limits has none.
        counted: Whether they are shares of counted answers.
    """
    if (counted or is_percent(metric) or metric == "reward") and all(0 <= value <= 1 for value in values):
        return 0.0, 1.0
    return 0.0 if is_amount(metric) and min(values) >= 0 else -math.inf, math.inf


def gap_closed(value: float, *, low: float, high: float) -> float | None:
    """(value - low) / (high - low): 0 at LoRA under the window, 1 at LoRA with the full cache; None without a gap."""
    return (value - low) / (high - low) if high > low else None


def knee(accuracies: Mapping[float, float], *, at_least: float = KNEE) -> float | None:
    """The largest load at which, and at every smaller measured one, the accuracy is `at_least`; None if none is."""
    reached = None
    for load, accuracy in sorted(accuracies.items()):
        if accuracy < at_least:
            break
        reached = load
    return reached


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """The mean of the last `width` values at each place, of fewer at the start."""
    width = max(1, width)
    return [statistics.fmean(values[max(0, end - width) : end]) for end in range(1, len(values) + 1)]


def interpolated(points: Sequence[tuple[float, float]], grid: Sequence[float]) -> list[float]:
    """Values of a curve at the places of a grid, on straight lines between its points.

    Args:
        points: (x, y), ascending in x, at least one.
        grid: Ascending, within the curve's range; outside it the nearest end counts.
    """
    values, place = [], 0
    for x in grid:
        while place + 1 < len(points) and points[place + 1][0] <= x:
            place += 1
        (left, below), (right, above) = points[place], points[min(place + 1, len(points) - 1)]
        share = 0.0 if right <= left or x <= left else min(1.0, (x - left) / (right - left))
        values.append(below + share * (above - below))
    return values
