"""Statistics of an evaluation: scores, and how far chance could have moved them.

Decides: the estimators and the intervals. Does not know: problems, completions, models; it sees one table of right
and wrong, a row for each problem, a column for each sampled completion.

Paper: "AIME is scored pass@16"; the other sets by accuracy, which is avg@1.
The intervals treat the problems as a sample of the problems that could have been asked: repeated samples of one
problem narrow them only as far as the answers to one problem differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor


@dataclass(frozen=True)
class Interval:
    """A confidence interval of a rate."""

    low: float
    """At least 0."""
    high: float
    """At most 1."""


def avg_at_k(correct: Bool[Tensor, "problems samples"]) -> float:
    """Mean accuracy over problems and their k samples, the columns; at k = 1 plain accuracy.

    Raises:
        ValueError: No problems or no samples.
    """
    _check_not_empty(correct)
    return correct.double().mean().item()


def pass_at_k(correct: Bool[Tensor, "problems samples"], k: int) -> float:
    """The mean over problems of the unbiased estimate that one of k completions is right.

    For a problem with c right among n samples: 1 - C(n - c, k) / C(n, k), the share of the subsets of k samples that
    hold a right one. Computed as 1 - prod_{i = n - c + 1}^{n} (1 - k / i): no factorials, no cancellation.

    Args:
        correct: True where a sample answers right; n is the number of columns.
        k: From 1 to n. At k = n it is the share of problems with a right sample.

    Raises:
        ValueError: k outside 1 to n, no problems or no samples.

    Paper: pass@16 on AIME; the estimator is that of Chen et al. 2021 (arXiv 2107.03374), equation 1.
    """
    _check_not_empty(correct)
    num_samples = correct.shape[1]
    if not 1 <= k <= num_samples:
        raise ValueError(
            f"k must be between 1 and the number of samples ({num_samples}), got {k}; sample more completions"
        )
    num_correct = correct.sum(1)
    index = torch.arange(1, num_samples + 1, dtype=torch.float64, device=correct.device)
    factors = torch.where(index > (num_samples - num_correct)[:, None], 1 - k / index, 1.0)
    return (1 - factors.prod(1)).mean().item()


def wilson_interval(successes: float, trials: float, *, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a rate: right also for few trials and for rates of 0 and 1.

    Args:
        successes: From 0 to `trials`; a fraction where trials are an effective number.
        trials: Independent trials, above 0.
        confidence: Between 0 and 1.

    Raises:
        ValueError: An argument outside its range.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}; use 0.95")
    if not trials > 0:
        raise ValueError(f"trials must be above 0, got {trials}; evaluate at least one problem")
    if not 0 <= successes <= trials:
        raise ValueError(f"successes must be between 0 and trials ({trials}), got {successes}; count right answers")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    rate = successes / trials
    centre = (rate + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half_width = z * (rate * (1 - rate) / trials + z**2 / (4 * trials**2)) ** 0.5 / (1 + z**2 / trials)
    # The rate lies inside; rounding must not push a rate of 0 or 1 out.
    return Interval(low=max(0.0, min(centre - half_width, rate)), high=min(1.0, max(centre + half_width, rate)))


def avg_at_k_interval(correct: Bool[Tensor, "problems samples"], *, confidence: float = 0.95) -> Interval:
    """The interval of avg@k over problems: Wilson's, at the effective number of independent trials.

    Samples of one problem are no independent trials. With p the mean accuracy and s2 the variance of the problems'
    own accuracies, n problems are worth n p (1 - p) / s2 trials, between n (each problem always right or always
    wrong) and n k (all equally hard). Both p and s2 are taken with one all-right and one all-wrong problem added
    (after Agresti and Coull), without which a set that is all wrong would have s2 = 0 and look certain.

    Chosen over a bootstrap because it needs no random numbers, stays within 0 and 1, has a width above 0 where all
    answers are wrong, and at k = 1 is exactly `wilson_interval`.

    Raises:
        ValueError: No problems or no samples, or a confidence outside 0 to 1.
    """
    _check_not_empty(correct)
    num_problems, num_samples = correct.shape
    accuracies = correct.double().mean(1)
    padded: Float[Tensor, " problems"] = torch.cat([accuracies, accuracies.new_tensor([0.0, 1.0])])
    mean = padded.mean()
    worth = (mean * (1 - mean) / padded.var(correction=0)).item()
    trials = num_problems * min(max(worth, 1.0), float(num_samples))
    return wilson_interval(avg_at_k(correct) * trials, trials, confidence=confidence)


def _check_not_empty(correct: Tensor) -> None:
    if correct.ndim != 2 or correct.numel() == 0:
        raise ValueError(
            f"correct must have a row for each problem and a column for each sample, got shape {tuple(correct.shape)};"
            " evaluate at least one completion"
        )
