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
from pte.model.decode import DecodeStep, ShardedDecodeStep
from pte.model.fused_support import fused_refusal
from pte.rollout.sampling import token_logprobs

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float
    from torch import Tensor

    from pte.method.adapter import AdapterWeights
    from pte.model.fused import FusedDecodeStep
    from pte.model.policy import BoundedPolicy
    from pte.rollout.buffers import DecodeBuffers

StateControl = Literal["own", "zeroed", "shuffled"]


class TokenStep:
    """Advances every running row by one token.

    Args:
        policy: The bounded policy.
        buffers: Read and written in place.
        forward: `decode_forward(policy, ...)`.
        temperature: As the engine's; unused where the buffers hold one of each row.
        state_control: As the engine's.
    """

    def __init__(
        self,
        policy: BoundedPolicy,
        buffers: DecodeBuffers,
        *,
        forward: DecodeStep | FusedDecodeStep,
        temperature: float,
        state_control: StateControl,
    ) -> None:
        self.policy = policy
        self.buffers = buffers
        self.forward = forward
        self.temperature = temperature
        self.state_control: StateControl = state_control
        # Which layer of a sharded base is gathered next is agreed on the host.
        self.captures = policy.device.type == "cuda" and policy.sharded is None
        # By whether attention is observed.
        self.warm: set[bool] = set()
        self.replayed: dict[bool, Callable[[], None]] = {}
        self.observed_rows = [False] * buffers.rows
        self.observed = torch.zeros(buffers.rows, dtype=torch.bool, device=policy.device)

    def claim(self) -> None:
        """Makes the base's spare rows hold this adapter, where engines of several adapters take turns on one base."""
        if not isinstance(self.forward, DecodeStep):
            self.forward.claim()

    def __call__(self, *, longest: int, observed_rows: list[bool]) -> None:
        """One token.

        Args:
            longest: Reasoning tokens that have entered in the longest running sequence.
            observed_rows: True for each row whose attention counts.
        """
        cache, observes = self.buffers.cache, any(observed_rows)
        total = cache.positions.shape[1]
        if observed_rows != self.observed_rows:
            self.observed.copy_(torch.tensor(observed_rows))
            self.observed_rows = observed_rows
        if not self.captures:
            self.advance(attended_slots=min(cache.prompt_slots + longest + 1, total), observes=observes)
            return
        # Kernels are launched and graphs captured on the current device, whatever device their tensors lie on.
        with torch.cuda.device(self.policy.device):
            if observes not in self.warm:
                # The first step runs as it is: libraries set themselves up, kernels are compiled.
                self.advance(attended_slots=total, observes=observes)
                self.warm.add(observes)
                return
            if observes not in self.replayed:
                self.replayed[observes] = self.captured(total, observes=observes)
            self.replayed[observes]()

    def captured(self, attended_slots: int, *, observes: bool) -> Callable[[], None]:
        """The step as a CUDA graph; capturing runs nothing."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.policy.device)
        with torch.cuda.graph(graph):
            self.advance(attended_slots=attended_slots, observes=observes)
        return graph.replay

    def advance(self, *, attended_slots: int, observes: bool) -> None:
        """The work itself; every tensor that outlives it is written in place.

        Args:
            attended_slots: Slots looked at; all beyond are empty in every row.
            observes: Sum the attention that the eviction policy asks for, in the rows of `observed`.
        """
        policy, buffers, cache = self.policy, self.buffers, self.buffers.cache
        positions = cache.prompt_lengths + buffers.entered
        places = cache.take_slots(positions[:, None])[:, 0]
        states = controlled(buffers.reads, self.state_control)
        if isinstance(self.forward, DecodeStep):
            counts_low = policy.eviction.needs.below_average
            observer = AttentionObserver(below_average=counts_low) if observes else None
            attention = DecodeAttention(
                cache, places, attended_slots=attended_slots, dtype=policy.dtype, observer=observer
            )
            hidden = self.forward(buffers.current, positions=positions, attention=attention, states=states)
            if observer is not None:
                self.note(observer)
        else:
            hidden = self.forward(buffers.current, positions=positions, cache=cache, slots=places, states=states)
        temperature = self.temperature if buffers.temperatures is None else buffers.temperatures
        logprobs = token_logprobs(policy.base.get_output_embeddings()(hidden), temperature)
        buffers.record(logprobs, greedy=temperature == 0)

    def note(self, observer: AttentionObserver) -> None:
        """Adds what the window's tokens received from the queries that the eviction policy asks about."""
        cache = self.buffers.cache
        received = torch.where(self.observed[:, None], observer.take()[:, cache.prompt_slots :], 0)
        missing = cache.free_slots.shape[1] - received.shape[1]
        cache.add_attention(functional.pad(received, (0, missing)))


def decode_forward(
    policy: BoundedPolicy, weights: AdapterWeights | None, *, num_positions: int
) -> DecodeStep | FusedDecodeStep:
    """The forward of one token a row: fused kernels where they serve the policy, else torch's own operations.

    Args:
        policy: The bounded policy.
        weights: `adapter_weights(policy)`.
        num_positions: All positions are below this.
    """
    if policy.sharded is not None:
        return ShardedDecodeStep(policy, weights)
    if fused_refusal(policy) is not None:
        return DecodeStep(policy, weights, num_positions=num_positions)
    from pte.model.fused import FusedDecodeStep

    return FusedDecodeStep(policy, weights, num_positions=num_positions)


def decode_path(policy: BoundedPolicy) -> str:
    """What computes a policy's tokens on its device, and why not faster, for logs."""
    if policy.sharded is not None:
        return "eager, one layer whole at a time (a base in shards has no fused decode step)"
    if policy.device.type != "cuda":
        return f"eager, float8 emulated on {policy.device.type}" if policy.float8 else "eager"
    graph = "CUDA graph, float8" if policy.float8 else "CUDA graph"
    reason = fused_refusal(policy)
    return f"fused kernels, {graph}" if reason is None else f"eager, {graph} ({reason})"


def controlled(
    reads: Float[Tensor, "layers rows rank rank"] | None, control: StateControl
) -> Float[Tensor, "layers rows rank rank"] | None:
    """The states that the adapters read, under a control."""
    if reads is None or control == "own":
        return reads
    return torch.zeros_like(reads) if control == "zeroed" else reads.roll(1, dims=1)
