"""Log-probs and entropies of completion tokens: how they are computed, and what a replay says of a batch.

Decides: that hidden states are scored a chunk of tokens at a time, never as a (batch, tokens, vocab) tensor, and that
scores which a backward pass has yet to find cannot be read before it. Does not know: walks, gradients.

Paper: pi^D(y_t | C_t^D), per token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch.utils.checkpoint import checkpoint

from pte.rollout.sampling import token_logprobs

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from pte.model.policy import BoundedPolicy
    from pte.rollout.record import ReplayBatch

LOGITS_PER_CHUNK = 2**24


class WalkedScores:
    """Log-probs and entropies that a walk found, in the layout of the completions; 0 on padding, no gradient.

    Args:
        rows: Row of each sequence among those that are walked, which come sorted by length.
    """

    def __init__(self, rows: Int[Tensor, " batch"]) -> None:
        self.rows = rows
        self.found: tuple[Tensor, Tensor] | None = None

    def fill(self, logprobs: Float[Tensor, "batch completion"], entropies: Float[Tensor, "batch completion"]) -> None:
        """Takes what a walk found, in the order in which it was walked."""
        self.found = logprobs.detach()[self.rows], entropies[self.rows]

    def read(self) -> tuple[Float[Tensor, "batch completion"], Float[Tensor, "batch completion"]]:
        """Log-probs and entropies.

        Raises:
            RuntimeError: Nothing was walked yet.
        """
        if self.found is None:
            raise RuntimeError(
                "what a replay with recorded log-probs finds is known after its backward pass, which walks, and was "
                "asked for before; call backward first, or replay without `recorded`"
            )
        return self.found


@dataclass(frozen=True)
class ReplayOutput:
    """What a replay says of a batch.

    Args:
        policy_logprobs: Of every completion token; 0 on padding. Differentiable with respect to the adapter. The
            recorded ones where they were given.
        walked: What the walk found; with recorded log-probs it is filled in by the backward pass.
    """

    policy_logprobs: Float[Tensor, "batch completion"]
    walked: WalkedScores = field(repr=False)

    @property
    def replayed_logprobs(self) -> Float[Tensor, "batch completion"]:
        """Log-probs that the walk found, without gradient; with recorded ones there only after backward."""
        return self.walked.read()[0]

    @property
    def entropies(self) -> Float[Tensor, "batch completion"]:
        """Of the distribution at every completion token, nats; 0 on padding; no gradient; there when the walk is."""
        return self.walked.read()[1]


def score(
    policy: BoundedPolicy,
    hidden: Float[Tensor, "scored hidden"],
    *,
    targets: Int[Tensor, " scored"],
    temperature: float,
    with_entropy: bool,
) -> tuple[Float[Tensor, " scored"], Float[Tensor, " scored"]]:
    """Log-probs of target tokens and entropies, a chunk of tokens at a time: no (batch, tokens, vocab) tensor.

    Equals: token_logprobs(lm_head(hidden)) gathered at the targets. With gradients, a chunk's logits are computed
    again in the backward pass when there is more than one chunk.

    Args:
        policy: Whose language-model head is used.
        hidden: Final hidden states.
        targets: Token ids.
        temperature: Of the distribution.
        with_entropy: Compute entropies (nats, without gradient); zeros otherwise.
    """
    head = policy.base.get_output_embeddings()

    def score_chunk(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logprobs = token_logprobs(head(hidden), temperature)
        chosen = logprobs.gather(1, targets[:, None])[:, 0]
        if not with_entropy:
            return chosen, torch.zeros_like(chosen)
        plain = logprobs.detach()
        return chosen, -(plain.exp() * plain).sum(-1)

    size = max(1, LOGITS_PER_CHUNK // head.weight.shape[0])
    pieces = list(zip(hidden.split(size), targets.split(size), strict=True))
    if len(pieces) == 1 or not torch.is_grad_enabled():
        scores = [score_chunk(*piece) for piece in pieces]
    else:
        scores = [checkpoint(score_chunk, *piece, use_reentrant=False) for piece in pieces]
    return torch.cat([chosen for chosen, _ in scores]), torch.cat([entropy for _, entropy in scores])


def blank_scores(policy: BoundedPolicy, batch: ReplayBatch) -> Float[Tensor, "batch completion"]:
    """Zeros in the layout of the completions, float32 or wider."""
    dtype = torch.promote_types(policy.dtype, torch.float32)
    return torch.zeros(batch.completion_ids.shape, dtype=dtype, device=batch.completion_ids.device)
