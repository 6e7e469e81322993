"""What the bounded policy says of given completions: their log-probs, and whether it would write them itself.

Decides: how completions that somebody else wrote are scored, without gradients: the walk of the replay, its logits a
chunk of tokens at a time. Does not know: text, tasks, rollouts.

Paper: pi^D(y|p) = prod_t pi(y_t | C_t^D); whether y_t is the token that greedy decoding would have taken is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pte.rollout.sampling import token_logprobs
from pte.rollout.scores import LOGITS_PER_CHUNK, blank_scores
from pte.rollout.stretch import run_stretch
from pte.rollout.walk import Walk

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

    from pte.model.policy import BoundedPolicy
    from pte.rollout.record import ReplayBatch


@dataclass(frozen=True)
class Likelihood:
    """What a policy says of the completions of a batch.

    Args:
        logprobs: Of every completion token; 0 on padding.
        likeliest: True where no token was likelier; False on padding.
    """

    logprobs: Float[Tensor, "batch completion"]
    likeliest: Bool[Tensor, "batch completion"]


@torch.no_grad()
def likelihood(policy: BoundedPolicy, batch: ReplayBatch) -> Likelihood:
    """Log-probs of completions, and which of their tokens greedy decoding would have drawn.

    Equals: `Replay(policy)(batch).policy_logprobs`, and the argmax of the same distributions.

    Args:
        policy: Under its budget; evictions are chosen anew unless the batch records them.
        batch: Prompts and completions on the policy's device.
    """
    order = batch.completion_lengths.argsort(descending=True, stable=True)
    back = order.argsort()
    walk = Walk(policy, batch.take(order))
    head = policy.base.get_output_embeddings()
    size = max(1, LOGITS_PER_CHUNK // head.weight.shape[0])
    logprobs = blank_scores(policy, walk.batch)
    likeliest = torch.zeros_like(logprobs, dtype=torch.bool)
    for stretch in walk.stretches:
        start = walk.enter(stretch)
        inputs = start.inputs
        hidden, keys, values = run_stretch(
            policy, inputs, cache_keys=walk.cache.keys, cache_values=walk.cache.values, states=start.states
        )
        walk.store(start, keys=keys, values=values)
        scored = hidden.flatten(0, 1)[inputs.scored]
        pieces = zip(scored.split(size), inputs.targets.split(size), inputs.places.split(size), strict=True)
        for piece, targets, places in pieces:
            found = token_logprobs(head(piece), batch.temperature)
            logprobs.view(-1)[places] = found.gather(1, targets[:, None])[:, 0]
            likeliest.view(-1)[places] = found.argmax(-1) == targets
    return Likelihood(logprobs[back], likeliest[back])
