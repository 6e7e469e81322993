"""The policy loss: from per-token log-probs and advantages to the scalar that is minimised.

Decides: the importance ratio, its clipping, the KL term, and over what the per-token losses are averaged.
Does not know: models, caches, rewards, how log-probs were made, how many devices there are.

Paper: E_{y ~ pi^D}[r(y) - beta KL(pi^D || pi_ref)], the cache-aware GRPO objective.
Deviations: 1. `grpo` (arXiv 2402.03300), `dr_grpo` (2503.20783), `dapo` (2503.14476) and `gspo` (2507.18071) share
one formula and differ in the ratio and the divisor; 2. the ratio is taken against the log-probs recorded while
sampling, not against a recomputation; 3. the divisor is that of the whole optimizer batch, so that the losses of its
micro-batches add up to its loss exactly, whatever their lengths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

LossKind = Literal["grpo", "dr_grpo", "dapo", "gspo"]


@dataclass(frozen=True)
class PolicyObjective:
    """What is optimised; the same for every step of a run.

    Raises:
        ValueError: A field outside its range, or `dr_grpo` without `max_completion_tokens`.
    """

    kind: LossKind = "dapo"
    """`grpo`: mean over sequences of the mean over their tokens. `dapo`: sum over tokens / tokens of the batch.
    `dr_grpo`: sum over tokens / (sequences x max_completion_tokens). `gspo`: as `grpo`, with one ratio for a
    sequence, exp of the mean log ratio of its tokens."""
    clip_low: float = 0.2
    """The ratio is clipped below at 1 - clip_low, 0 < clip_low <= 1. GSPO's sequence ratio wants about 3e-4."""
    clip_high: float = 0.2
    """The ratio is clipped above at 1 + clip_high. DAPO's "clip-higher" takes 0.28; GSPO about 4e-4."""
    kl_beta: float = 0.0
    """beta, the weight of the KL term; 0 needs no reference."""
    max_completion_tokens: int | None = None
    """Longest completion that the rollout allows; only `dr_grpo` reads it."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(LossKind):
            raise ValueError(f"kind must be one of {', '.join(get_args(LossKind))}, got {self.kind!r}; try 'dapo'")
        if not 0 < self.clip_low <= 1:
            raise ValueError(f"clip_low must be above 0 and at most 1, got {self.clip_low}; use 0.2")
        if not self.clip_high > 0:
            raise ValueError(f"clip_high must be above 0, got {self.clip_high}; use 0.2, or 0.28 as DAPO")
        if not self.kl_beta >= 0:
            raise ValueError(f"kl_beta must not be negative, got {self.kl_beta}; use 0 for no KL term")
        if self.kind == "dr_grpo" and (self.max_completion_tokens is None or self.max_completion_tokens < 1):
            raise ValueError(
                f"max_completion_tokens must be at least 1 for dr_grpo, got {self.max_completion_tokens}; "
                "pass the rollout's limit of new tokens"
            )


@dataclass(frozen=True)
class BatchTotals:
    """Size of the whole optimizer batch, over all micro-batches (and devices) that add to one step.

    Raises:
        ValueError: Fewer than one sequence or token.
    """

    sequences: int
    """Completions in the batch."""
    tokens: int
    """Completion tokens in the batch, padding not counted."""

    def __post_init__(self) -> None:
        for name, value in (("sequences", self.sequences), ("tokens", self.tokens)):
            if value < 1:
                raise ValueError(
                    f"BatchTotals.{name} must be at least 1, got {value}; skip the step when no completion is left"
                )


@dataclass(frozen=True)
class PolicyLoss:
    """The loss, and what to log about it; averages are over the completion tokens of this call."""

    loss: Float[Tensor, ""]
    """This call's part of the batch loss, with its graph; the parts add up."""
    clip_fraction: Float[Tensor, ""]
    """Share of tokens whose gradient the clipping removed."""
    ratio_mean: Float[Tensor, ""]
    """Mean importance ratio; 1 when the policy is the one that sampled. `gspo`: the sequence's, at each token."""
    ratio_max: Float[Tensor, ""]
    """Largest importance ratio."""
    kl_mean: Float[Tensor, ""] | None
    """Mean KL estimate in nats per token; None without a reference."""


def policy_loss(
    policy_logprobs: Float[Tensor, "batch tokens"],
    rollout_logprobs: Float[Tensor, "batch tokens"],
    *,
    advantages: Float[Tensor, " batch"],
    completion_mask: Bool[Tensor, "batch tokens"],
    objective: PolicyObjective,
    totals: BatchTotals,
    reference_logprobs: Float[Tensor, "batch tokens"] | None = None,
) -> PolicyLoss:
    """The clipped policy loss plus beta times the KL estimate, averaged as `objective.kind` says.

    For one token with ratio w = exp(policy - rollout) and advantage A:
    -min(w A, clip(w, 1 - clip_low, 1 + clip_high) A) + beta * kl.

    Only positions where `completion_mask` is True are read; the others may hold anything, NaN included.

    Args:
        policy_logprobs: Log-probs of the completion tokens under the policy being trained, with their graph.
        rollout_logprobs: Log-probs recorded while sampling; never differentiated.
        advantages: One for each completion.
        completion_mask: True at tokens that the policy sampled, the end-of-sequence token included.
        objective: What is optimised.
        totals: Size of the whole optimizer batch. Where a wrapper averages gradients over devices, give the totals
            over all devices and multiply the loss by their number.
        reference_logprobs: Log-probs under the reference, needed where `kl_beta` is above 0.

    Raises:
        ValueError: Shapes that differ, totals smaller than this call's batch, a KL term without a reference.

    Paper: the cache-aware GRPO objective, E[r(y) - beta KL].
    """
    _check_inputs(policy_logprobs, rollout_logprobs, advantages, completion_mask, reference_logprobs)
    if totals.sequences < policy_logprobs.shape[0]:
        raise ValueError(
            f"totals.sequences must count the whole optimizer batch, got {totals.sequences} for a micro-batch of "
            f"{policy_logprobs.shape[0]}; pass the sum over the micro-batches"
        )
    if objective.kl_beta > 0 and reference_logprobs is None:
        raise ValueError(
            f"reference_logprobs must be given when kl_beta is above 0, got None with kl_beta "
            f"{objective.kl_beta}; score the completions under the reference, or set it to 0"
        )
    # Replaced before any arithmetic: a NaN that is masked only afterwards still makes the gradient NaN (0 * NaN).
    policy = torch.where(completion_mask, policy_logprobs, 0.0)
    rollout = torch.where(completion_mask, rollout_logprobs, 0.0).detach()
    lengths = completion_mask.sum(1).clamp(min=1)

    log_ratio = policy - rollout
    if objective.kind == "gspo":
        # One ratio for a sequence, repeated at its tokens: the mean over the tokens below gives it back.
        log_ratio = (log_ratio.sum(1) / lengths)[:, None].expand_as(policy)
    ratio = log_ratio.exp()
    weighted = ratio * advantages[:, None]
    clipped = ratio.clamp(1 - objective.clip_low, 1 + objective.clip_high) * advantages[:, None]
    token_losses = -torch.minimum(weighted, clipped)

    kl = None
    if reference_logprobs is not None:
        kl = kl_penalty(policy, torch.where(completion_mask, reference_logprobs, 0.0))
        if objective.kl_beta > 0:
            token_losses = token_losses + objective.kl_beta * kl
    token_losses = torch.where(completion_mask, token_losses, 0.0)
    loss = _average(token_losses, lengths, objective=objective, totals=totals)

    with torch.no_grad():
        num_tokens = completion_mask.sum().clamp(min=1)
        ratio_at_tokens = torch.where(completion_mask, ratio, 0.0)
        return PolicyLoss(
            loss=loss,
            clip_fraction=((clipped < weighted) & completion_mask).sum() / num_tokens,
            ratio_mean=ratio_at_tokens.sum() / num_tokens,
            ratio_max=ratio_at_tokens.max(),
            kl_mean=None if kl is None else kl.detach().sum() / num_tokens,
        )


def kl_penalty(
    policy_logprobs: Float[Tensor, "*shape"], reference_logprobs: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """A per-token estimate of KL(policy || reference): exp(d) - d - 1 with d = reference - policy.

    Known as k3. For tokens sampled from the policy its expectation is the KL divergence; it is never negative, and
    its gradient depends on the reference and points at it. (The plain d has a gradient free of the reference.)

    Args:
        policy_logprobs: Log-probs under the policy being trained.
        reference_logprobs: Log-probs of the same tokens under the reference; never differentiated.

    Paper: KL(pi^D_theta(.|p) || pi_ref(.|p)) in the objective, per token.
    """
    difference = reference_logprobs.detach() - policy_logprobs
    # expm1 keeps the digits that exp(d) - 1 loses near d = 0.
    return torch.expm1(difference) - difference


def _average(
    token_losses: Float[Tensor, "batch tokens"],
    lengths: Tensor,
    *,
    objective: PolicyObjective,
    totals: BatchTotals,
) -> Float[Tensor, ""]:
    """This call's share of the batch loss; `token_losses` are zero outside the completions."""
    if objective.kind == "dapo":
        return token_losses.sum() / totals.tokens
    if objective.kind == "dr_grpo":
        assert objective.max_completion_tokens is not None, "checked when the objective is made"
        return token_losses.sum() / (totals.sequences * objective.max_completion_tokens)
    return (token_losses.sum(1) / lengths).sum() / totals.sequences


def _check_inputs(
    policy_logprobs: Tensor,
    rollout_logprobs: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    reference_logprobs: Tensor | None,
) -> None:
    """Refuses shapes that broadcasting would accept."""
    shape = tuple(policy_logprobs.shape)
    named = {
        "rollout_logprobs": (rollout_logprobs, shape),
        "completion_mask": (completion_mask, shape),
        "advantages": (advantages, shape[:1]),
    }
    if reference_logprobs is not None:
        named["reference_logprobs"] = (reference_logprobs, shape)
    for name, (tensor, expected) in named.items():
        if tuple(tensor.shape) != expected:
            raise ValueError(
                f"{name} must have shape {expected} to match policy_logprobs, got {tuple(tensor.shape)}; "
                "log-probs and mask are (batch, tokens), advantages one number for each completion"
            )
