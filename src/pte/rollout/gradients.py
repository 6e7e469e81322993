"""How the gradient of what is read from the states reaches the encoder and the global tokens.

Decides: what a backward walk, which goes forwards, does with the gradient that each stretch's tokens have for the
states of its segments. Within a stretch the states are leaves; the folds that made them are differentiated here.
Does not know: tokens, attention, losses.

`ChainGradients` goes through every fold. With S_k the state after eviction k, g_k what the tokens that read S_k say
and G_k the whole gradient, G_k = g_k + (d fold_{k+1} / d S_k)^T G_{k+1}: it runs backwards, and needs each evicted
block again. A g for each segment would be as large as half of the block (rank 32, 16 tokens of 64 numbers); so
stretches are taken in groups. At the end of a group its folds are repeated with the g's of the group alone, which
leaves one gradient at the group's start. That is all of it for the last group; after the walk the others are folded
once more, from the last to the first, with what came in from behind alone: the gradient is linear in it. Between the
two a group keeps the state and the gradient at its start, and its blocks in host memory.

Paper: "gradients need not go back through the full-cache rollout".
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from pte.method.cache import EvictedTokens
from pte.model.segment import first_state, fold, fold_blocks
from pte.rollout.waiting import WaitingBlocks

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from pte.model.policy import BoundedPolicy
    from pte.rollout.walk import StretchStart, Walk

KEPT_BYTES_FRACTION = 0.01


class GradientSum:
    """Sums of gradients, one per parameter that is trained."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self.parameters = parameters
        self.sums: list[Tensor | None] = [None] * len(parameters)

    def add(self, gradients: tuple[Tensor | None, ...]) -> None:
        """Adds gradients in the order of the parameters; None stands for zero."""
        for index, gradient in enumerate(gradients):
            if gradient is not None:
                # In place, into tensors of our own: sums that move at every stretch leave holes in host memory.
                before = self.sums[index]
                self.sums[index] = gradient.clone() if before is None else before.add_(gradient)

    def for_each(self, parameters: tuple[Tensor, ...]) -> list[Tensor | None]:
        """The sums for a list that may hold untrained parameters as well."""
        sums = iter(self.sums)
        return [next(sums) if parameter.requires_grad else None for parameter in parameters]


class StateGradients(Protocol):
    """What a backward walk hands the gradients of the states to, stretch by stretch."""

    def add(self, start: StretchStart, gradient: Float[Tensor, "layers sequences segments rank rank"]) -> None:
        """Takes what the tokens of a stretch say of the states of its segments."""
        ...

    def finish(self) -> None:
        """Adds what is left to the parameters' gradients; once, after the last stretch."""
        ...


class FirstStateGradients:
    """Of states that no eviction has changed: what is said of them is said of the first state.

    Args:
        policy: With an encoder.
        collected: Sum of parameter gradients.
    """

    def __init__(self, policy: BoundedPolicy, *, collected: GradientSum) -> None:
        self.policy = policy
        self.collected = collected
        self.total: Float[Tensor, "layers rank rank"] | None = None

    def add(self, start: StretchStart, gradient: Float[Tensor, "layers sequences segments rank rank"]) -> None:
        """Takes a stretch's part."""
        self.add_first(gradient.sum(2))

    def add_first(self, gradient: Float[Tensor, "layers sequences rank rank"]) -> None:
        """Takes a gradient of the first state of the first sequences."""
        share = gradient.sum(1)
        self.total = share if self.total is None else self.total + share

    def finish(self) -> None:
        """Adds what the sum means for the encoder and the global tokens."""
        if self.total is None:
            return
        with torch.enable_grad():
            first = first_state(self.policy)
            assert first is not None
            found = torch.autograd.grad(first, self.collected.parameters, self.total, allow_unused=True)
        self.collected.add(found)


class HorizonGradients:
    """Through the last `horizon` evictions before each segment; nothing grows with the completion.

    Args:
        first: Takes what reaches the first state.
        horizon: Evictions, at least 1.
        block: Tokens evicted at once.
    """

    def __init__(self, first: FirstStateGradients, *, horizon: int, block: int) -> None:
        self.first = first
        self.horizon = horizon
        self.block = block
        self.folded = 0
        self.recent: deque[tuple[Tensor, EvictedTokens]] = deque()

    def add(self, start: StretchStart, gradient: Float[Tensor, "layers sequences segments rank rank"]) -> None:
        """Folds the last blocks before each segment again, and hands its gradient back through them."""
        if start.evicted is None or start.before is None or start.states is None:
            self.first.add(start, gradient)
            return
        rows, state, collected = gradient.shape[1], start.before, self.first.collected
        self.recent = deque((before[:, :rows], block.first(rows)) for before, block in self.recent)
        for index, block in enumerate(start.evicted.blocks(self.block)):
            self.recent.append((state, block))
            self.folded += 1
            if len(self.recent) > self.horizon:
                self.recent.popleft()
            with torch.enable_grad():
                leaf = self.recent[0][0].detach().requires_grad_()
                reached = leaf
                for _, past in self.recent:
                    reached = fold(self.first.policy, reached, past)
                wanted = [leaf, *collected.parameters]
                found = torch.autograd.grad(reached, wanted, gradient[:, :, index], allow_unused=True)
            collected.add(found[1:])
            if self.folded <= self.horizon:
                self.first.add_first(found[0])
            state = start.states[:, :, index]

    def finish(self) -> None:
        """Adds the first state's part."""
        self.first.finish()


@dataclass
class FoldGroup:
    """Consecutive stretches between whose ends only the state and the gradient at the first start are kept.

    Args:
        before: State before their first eviction.
        gradient: Of that state; from the group alone until those behind it have been added.
        waiting: What left in them; None in the last group, which is not folded again.
    """

    before: Float[Tensor, "layers sequences rank rank"]
    gradient: Float[Tensor, "layers sequences rank rank"]
    waiting: WaitingBlocks | None


class ChainGradients:
    """Through every eviction; evicted keys and values wait in host memory.

    A state and a gradient are kept for every `stride` stretches, so that both together take at most 1 % of the bytes
    of the keys and values; within a group, for each stretch a state and the gradients of its segments' states.

    Args:
        first: Takes what reaches the first state.
        walk: Whose stretches are counted.
        block: Tokens evicted at once.
    """

    def __init__(self, first: FirstStateGradients, walk: Walk, *, block: int) -> None:
        self.first = first
        self.block = block
        self.stretches = len(walk.stretches) - 1
        self.stride = group_stretches(first.policy)
        self.seen = 0
        self.groups: list[FoldGroup] = []
        self.current: list[tuple[Tensor, EvictedTokens, Tensor]] = []

    def add(self, start: StretchStart, gradient: Float[Tensor, "layers sequences segments rank rank"]) -> None:
        """Takes a stretch's part; at the end of a group, its folds are differentiated."""
        if start.evicted is None or start.before is None:
            self.first.add(start, gradient)
            return
        self.current.append((start.before.clone(), start.evicted, gradient))
        self.seen += 1
        last = self.seen == self.stretches
        if last or self.seen % self.stride == 0:
            waiting = None if last else WaitingBlocks([evicted for _, evicted, _ in self.current])
            first, behind = self.current[0][0], None
            while self.current:
                before, evicted, gradient = self.current.pop()
                behind = self.handed_back(before, evicted, gradient=gradient, behind=behind)
            assert behind is not None
            self.groups.append(FoldGroup(first, behind, waiting))

    @torch.no_grad()
    def finish(self) -> None:
        """Hands the gradient at each group's start back through the group before it, the last one first."""
        behind: Tensor | None = None
        while self.groups:
            group = self.groups.pop()
            if behind is not None and group.waiting is not None:
                sequences = behind.shape[1]
                evicted = [one.first(sequences) for one in group.waiting.on_device(behind.device)]
                states = [group.before[:, :sequences]]
                for one in evicted[:-1]:
                    states.append(fold_blocks(self.first.policy, states[-1], one, block=self.block)[:, :, -1])
                for before, one in zip(reversed(states), reversed(evicted), strict=True):
                    behind = self.handed_back(before, one, gradient=None, behind=behind)
                group.gradient[:, :sequences] += behind
            behind = group.gradient
        if behind is not None:
            self.first.add_first(behind)
        self.first.finish()

    def handed_back(
        self,
        before: Float[Tensor, "layers sequences rank rank"],
        evicted: EvictedTokens,
        *,
        gradient: Float[Tensor, "layers sequences segments rank rank"] | None,
        behind: Float[Tensor, "layers continuing rank rank"] | None,
    ) -> Float[Tensor, "layers sequences rank rank"]:
        """Gradient of the state before a stretch's evictions, which are folded again; adds the encoder's.

        Args:
            before: That state.
            evicted: What left.
            gradient: Of the states of the stretch's segments.
            behind: Of the state after the stretch, of the sequences that go on.
        """
        collected = self.first.collected
        with torch.enable_grad():
            leaf = before.detach().requires_grad_()
            states = fold_blocks(self.first.policy, leaf, evicted, block=self.block)
            outputs = [] if gradient is None else [(states, gradient)]
            if behind is not None:
                outputs.append((states[:, : behind.shape[1], -1], behind))
            found = torch.autograd.grad(
                [output for output, _ in outputs],
                [leaf, *collected.parameters],
                [wanted for _, wanted in outputs],
                allow_unused=True,
            )
        collected.add(found[1:])
        # A copy: the gradient may be part of what was handed in, and would keep all of it.
        return found[0].clone()


def group_stretches(policy: BoundedPolicy) -> int:
    """Stretches for which one state and one gradient are kept: their share of the bytes decides."""
    adapter, shape, block = policy.adapter, policy.cache_shape, policy.schedule.evict_tokens
    assert adapter is not None and block is not None
    kv_bytes = policy.segments_per_stretch * block * shape.token_bytes(policy.dtype)
    state_bytes = shape.layers * adapter.rank**2 * 4
    return math.ceil(2 * state_bytes / (KEPT_BYTES_FRACTION * kv_bytes))


def state_gradients(
    policy: BoundedPolicy, walk: Walk, *, horizon: int | None, collected: GradientSum
) -> StateGradients | None:
    """What takes the states' gradients on a backward walk; None where nothing makes a state that is trained.

    Args:
        policy: The bounded policy.
        walk: Before its first stretch.
        horizon: Evictions that gradients go through; None for all.
        collected: Sum of parameter gradients.
    """
    adapter = policy.adapter
    if adapter is None or adapter.encoder is None or not any(x.requires_grad for x in adapter.encoder.parameters()):
        return None
    first = FirstStateGradients(policy, collected=collected)
    block = policy.schedule.evict_tokens
    if not adapter.folds or block is None:
        return first
    if horizon is None:
        return ChainGradients(first, walk, block=block)
    return HorizonGradients(first, horizon=horizon, block=block)
