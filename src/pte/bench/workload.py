"""The same work for both sides: prompts, completions, a GRPO loss, a reward and an optimizer step.

Decides: what both arms share, so that a ratio compares nothing else. Does not know rollouts or adapters.
Paper: Section 3, one cache-aware GRPO step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from pte.learn.loss import BatchTotals, PolicyObjective, policy_loss
from pte.timing import timed

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor, nn

LEARNING_RATE = 1e-5
MAX_GRADIENT_NORM = 1.0
UP_STD = 0.02


def random_ids(vocab: int, *, batch: int, tokens: int, seed: int = 1) -> list[tuple[int, ...]]:
    """Random token ids; as prompts all are different: nothing is gained by a shared prefill."""
    generator = torch.Generator().manual_seed(seed)
    return [tuple(row) for row in torch.randint(vocab, (batch, tokens), generator=generator).tolist()]


def randomize_ups(ups: Iterable[nn.Parameter]) -> None:
    """Gives every A values other than zero: the adapter of a run that has begun."""
    generator = torch.Generator().manual_seed(2)
    for up in ups:
        up.data = (torch.randn(up.shape, generator=generator) * UP_STD).to(up.device)


def make_optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW in its fused form."""
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)


@timed("reward")
def parity_rewards(completions: Sequence[Sequence[int]]) -> list[float]:
    """1 for a completion whose ids add up to an odd number: a reward that reads every token and knows no task."""
    return [float(sum(completion) % 2) for completion in completions]


def fixed_advantages(completions: int) -> Float[Tensor, " completions"]:
    """+1 and -1 in turns, as if half of a group were right: every completion has a gradient."""
    return torch.tensor([1.0, -1.0]).repeat(completions)[:completions]


def grpo_loss(
    policy_logprobs: Float[Tensor, "batch tokens"],
    rollout_logprobs: Float[Tensor, "batch tokens"],
    *,
    advantages: Float[Tensor, " batch"],
    completion_mask: Bool[Tensor, "batch tokens"],
    totals: BatchTotals,
) -> Float[Tensor, ""]:
    """The clipped policy loss."""
    return policy_loss(
        policy_logprobs,
        rollout_logprobs,
        advantages=advantages.to(policy_logprobs.device),
        completion_mask=completion_mask,
        objective=PolicyObjective(),
        totals=totals,
    ).loss


@timed("optimizer")
def optimizer_step(optimizer: torch.optim.Optimizer) -> None:
    """Clipping, one step, gradients freed."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
