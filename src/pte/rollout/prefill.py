"""Prompts read once for all sequences that share them.

Decides: how many prompt tokens one forward reads, and how long what was read is kept: until the last sequence that
waits for it has been admitted. Does not know: slots, completions.

Paper: the prompt p in C_t^D, which is never pruned.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pte.method.attention import StretchAttention
from pte.model.segment import read_state, run_layers
from pte.rollout.record import right_pad
from pte.rollout.token_step import StateControl, controlled
from pte.timing import timed

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from pte.method.adapter import AdapterWeights
    from pte.model.policy import BoundedPolicy

PREFILL_TOKENS = 16384


@dataclass(frozen=True)
class Prefilled:
    """A prompt that has been read."""

    keys: Float[Tensor, "layers kv_heads tokens head_dim"]
    values: Float[Tensor, "layers kv_heads tokens head_dim"]
    logits: Float[Tensor, " vocab"]


class PromptReader:
    """Keys, values and next-token logits of prompts under the first state.

    Args:
        policy: The bounded policy.
        weights: `adapter_weights(policy)`.
        first: The state before any eviction, or None.
        state_control: As the engine's.
    """

    def __init__(
        self,
        policy: BoundedPolicy,
        *,
        weights: AdapterWeights | None,
        first: Float[Tensor, "layers rank rank"] | None,
        state_control: StateControl,
    ) -> None:
        self.policy = policy
        self.waiting: Counter[tuple[int, ...]] = Counter()
        self.weights = weights
        self.first = first
        self.state_control: StateControl = state_control
        self.prefilled: dict[tuple[int, ...], Prefilled] = {}

    def expect(self, prompt: tuple[int, ...]) -> None:
        """Notes that a sequence will take this prompt."""
        self.waiting[prompt] += 1

    def forget(self, prompt: tuple[int, ...]) -> None:
        """Notes that a sequence takes it no more; what was read goes with the last one that waits for it."""
        self.waiting[prompt] -= 1
        if not self.waiting[prompt]:
            del self.waiting[prompt]
            self.prefilled.pop(prompt, None)

    def read(self, prompts: Sequence[tuple[int, ...]]) -> None:
        """Reads prompts that have not been read yet, a bounded number of tokens at a time."""
        unread = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.prefilled]
        while unread:
            count = max(1, PREFILL_TOKENS // max(map(len, unread)))
            self.read_batch(unread[:count])
            unread = unread[count:]

    def take(self, prompt: tuple[int, ...]) -> Prefilled:
        """What was read of a prompt, for one sequence."""
        found = self.prefilled[prompt]
        self.forget(prompt)
        return found

    @timed("prefill")
    def read_batch(self, prompts: Sequence[tuple[int, ...]]) -> None:
        """Reads right-padded prompts in one forward."""
        policy, device = self.policy, self.policy.device
        tokens = right_pad(prompts).to(device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        positions = torch.arange(tokens.shape[1], device=device).expand_as(tokens)
        # Causal without a mask: padding comes after the prompt, so that no prompt token sees it.
        attention = StretchAttention(None, None, mask=None, segments=1, float8=policy.float8)
        first = None if self.first is None else self.first[:, None].expand(-1, len(prompts), -1, -1)
        reads = controlled(read_state(policy, first), self.state_control)
        hidden = run_layers(
            policy, tokens, positions=positions, attention=attention, states=reads, weights=self.weights
        )
        last = hidden[torch.arange(len(prompts), device=device), lengths - 1]
        logits = policy.base.get_output_embeddings()(last)
        keys, values = attention.take()
        for index, prompt in enumerate(prompts):
            end = len(prompt)
            # Copies: a view of one prompt that waits would keep the whole batch.
            self.prefilled[prompt] = Prefilled(
                keys=keys[:, index, :, :end].clone(),
                values=values[:, index, :, :end].clone(),
                logits=logits[index].clone(),
            )
