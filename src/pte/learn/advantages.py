"""Advantages: how much better a completion is than the others of its group.

Decides: what is subtracted and what is divided by, which groups teach nothing, which groups dynamic sampling keeps.
Does not know: where rewards come from, log-probs, the loss.

Paper: "advantages normalised in the group" of the cache-aware GRPO objective, as in GRPO (arXiv 2402.03300).
Deviations: 1. `scale="none"` is Dr. GRPO (arXiv 2503.20783), which does not divide by the standard deviation;
2. a group of equal rewards gets exact zeros, where the formula leaves rounding errors of the mean.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

AdvantageScale = Literal["std", "none"]
STD_FLOOR = 1e-4
"""Added to the standard deviation, so that nearly equal rewards do not become large advantages; TRL's value."""


def group_advantages(
    rewards: Float[Tensor, "groups group"], *, scale: AdvantageScale = "std"
) -> Float[Tensor, "groups group"]:
    """The rewards relative to their group: (r - mean) / (std + 1e-4), or r - mean.

    The standard deviation is the unbiased one (divisor group - 1).

    Args:
        rewards: One row for each prompt, one column for each of its completions; at least two columns.
        scale: "std" is GRPO, "none" is Dr. GRPO.

    Raises:
        ValueError: A group of fewer than two completions, or an unknown scale.

    Paper: the advantages in E_y[r(y)] of the cache-aware GRPO objective.
    """
    if scale not in ("std", "none"):
        raise ValueError(f'scale must be "std" or "none", got {scale!r}; "std" is GRPO, "none" is Dr. GRPO')
    _check_group_size(rewards)
    advantages = rewards - rewards.mean(1, keepdim=True)
    if scale == "std":
        advantages = advantages / (rewards.std(1, keepdim=True) + STD_FLOOR)
    return torch.where(tied_groups(rewards)[:, None], 0.0, advantages)


def tied_groups(rewards: Float[Tensor, "groups group"]) -> Bool[Tensor, " groups"]:
    """True for groups whose rewards are all equal: their advantages are zero and their completions teach nothing.

    Raises:
        ValueError: A group of fewer than two completions.
    """
    _check_group_size(rewards)
    return (rewards == rewards[:, :1]).all(1)


def mixed_accuracy_groups(accuracies: Float[Tensor, "groups group"]) -> Bool[Tensor, " groups"]:
    """True for groups that dynamic sampling keeps: 0 < mean accuracy < 1.

    It looks at accuracy and not at the reward: a shaped reward (length, format) differs inside a group in which
    every answer is right, and would keep it.

    Args:
        accuracies: For each completion how right its answer is, from 0 to 1.

    Raises:
        ValueError: An accuracy outside 0 to 1, or a group of fewer than two completions.

    Paper: not in it; DAPO (arXiv 2503.14476), equation 11.
    """
    _check_group_size(accuracies)
    outside = ~((accuracies >= 0) & (accuracies <= 1))
    if outside.any():
        raise ValueError(
            f"accuracies must be between 0 and 1, got {accuracies[outside][0].item()}; "
            "pass whether the answer is right, not the shaped reward"
        )
    # Equal to 0 < mean < 1 for values in [0, 1], without the rounding of a mean.
    return (accuracies > 0).any(1) & (accuracies < 1).any(1)


def _check_group_size(values: Float[Tensor, "groups group"]) -> None:
    group_size = values.shape[1]
    if group_size < 2:
        raise ValueError(
            f"group_size must be at least 2, got {group_size}: "
            "one completion has nothing to be compared with; sample 8 or more for each prompt"
        )
