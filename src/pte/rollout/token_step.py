"""One token of every running sequence as one piece of device work: forward, draw, record.

Decides: which program computes it, and, on CUDA, that its kernels are captured once and replayed: all tensors lie still
(`DecodeBuffers`), so that a step costs the host one launch and the device no wait. `path` names what runs.
Does not know: requests, evictions, which rows stop (the device knows, the host looks later).

Paper: pi^D_theta(y_t | C_t^D) for one t of every sequence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch.nn import functional

from pte.method.attention import DecodeAttention
from pte.method.observe import AttentionObserver
from pte.model.decode import DecodeStep
from pte.rollout.sampling import token_logprobs

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Bool, Float
    from torch import Tensor

    from pte.model.policy import BoundedPolicy
    from pte.rollout.buffers import DecodeBuffers

StateControl = Literal["own", "zeroed", "shuffled"]


class TokenStep:
    """Advances every running row by one token.

    Args:
        policy: The bounded policy.
        buffers: Read and written in place.
        forward: The new tokens' hidden states.
        temperature: As the engine's.
        state_control: As the engine's.
        observes: Sum the attention that the eviction policy asks for.
    """

    def __init__(
        self,
        policy: BoundedPolicy,
        buffers: DecodeBuffers,
        *,
        forward: DecodeStep,
        temperature: float,
        state_control: StateControl,
        observes: bool,
    ) -> None:
        self.policy = policy
        self.buffers = buffers
        self.forward = forward
        self.temperature = temperature
        self.state_control: StateControl = state_control
        self.observes = observes
        # Sums of observed attention are tensors of their own at every step: nothing to replay.
        self.captures = policy.device.type == "cuda" and not observes
        self.replayed: Callable[[], None] | None = None
        self.warm = False

    @property
    def path(self) -> str:
        """What computes a step, for the log."""
        return "eager, CUDA graph" if self.captures else "eager"

    def __call__(self, *, longest: int, observed: Bool[Tensor, " rows"] | None) -> None:
        """One token.

        Args:
            longest: Reasoning tokens that have entered in the longest running sequence.
            observed: Rows whose attention counts; None for none.
        """
        cache = self.buffers.cache
        total = cache.positions.shape[1]
        if not self.captures:
            self.advance(attended_slots=min(cache.prompt_slots + longest + 1, total), observed=observed)
        elif self.replayed is not None:
            self.replayed()
        elif not self.warm:
            # The first step runs as it is: libraries set themselves up, kernels are compiled.
            self.advance(attended_slots=total)
            self.warm = True
        else:
            self.replayed = self.captured(total)
            self.replayed()

    def captured(self, attended_slots: int) -> Callable[[], None]:
        """The step as a CUDA graph; capturing runs nothing."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.policy.device)
        with torch.cuda.graph(graph):
            self.advance(attended_slots=attended_slots)
        return graph.replay

    def advance(self, *, attended_slots: int, observed: Bool[Tensor, " rows"] | None = None) -> None:
        """The work itself; every tensor that outlives it is written in place.

        Args:
            attended_slots: Slots looked at; all beyond are empty in every row.
            observed: As in a call.
        """
        policy, buffers, cache = self.policy, self.buffers, self.buffers.cache
        positions = cache.prompt_lengths + buffers.entered
        places = cache.take_slots(positions[:, None])[:, 0]
        counts_low = policy.eviction.needs.below_average
        observer = None if observed is None else AttentionObserver(below_average=counts_low)
        attention = DecodeAttention(cache, places, attended_slots=attended_slots, dtype=policy.dtype, observer=observer)
        hidden = self.forward(
            buffers.current,
            positions=positions,
            attention=attention,
            states=controlled(buffers.reads, self.state_control),
        )
        if observer is not None and observed is not None:
            received = torch.where(observed[:, None], observer.take()[:, cache.prompt_slots :], 0)
            missing = cache.free_slots.shape[1] - received.shape[1]
            cache.add_attention(functional.pad(received, (0, missing)))
        logprobs = token_logprobs(policy.base.get_output_embeddings()(hidden), self.temperature)
        buffers.record(logprobs, greedy=self.temperature == 0)


def controlled(
    reads: Float[Tensor, "layers rows rank rank"] | None, control: StateControl
) -> Float[Tensor, "layers rows rank rank"] | None:
    """The states that the adapters read, under a control."""
    if reads is None or control == "own":
        return reads
    return torch.zeros_like(reads) if control == "zeroed" else reads.roll(1, dims=1)
