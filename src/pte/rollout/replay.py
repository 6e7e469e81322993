"""Differentiable log-probs of completions under the bounded policy: exact, and flat in memory.

Decides: how gradients travel. The forward pass walks without a graph; the backward pass walks again, one stretch
with a graph at a time, and returns all adapter gradients at once, so that any loss can sit on top and DDP sees one
forward. Gradient modes:

- `chain` (default): through every state, not through keys and values written before the stretch. Keys and values
  wait in host memory; the backward pass goes from the last stretch to the first and hands the gradient of S back.
- `horizon`: through the last h evictions only; strictly constant memory, the backward pass goes forwards.
- `exact`: through everything, memory grows with the completion.

Paper: "gradients need not go back through the full-cache rollout". Ours: which gradients are kept, as named above.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pte.method.cache import EvictedTokens
from pte.model.segment import first_state, fold
from pte.rollout.history import History
from pte.rollout.walk import StretchInputs, Walk, run_stretch, score, segment_states
from pte.timing import timed

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from pte.model.policy import BoundedPolicy
    from pte.rollout.record import ReplayBatch

GradientMode = Literal["chain", "exact", "horizon"]


@dataclass(frozen=True)
class ReplayOutput:
    """What a replay says of a batch.

    Args:
        policy_logprobs: Of every completion token; 0 on padding. Differentiable with respect to the adapter.
        entropies: Of the distribution at every completion token, nats; 0 on padding; no gradient.
    """

    policy_logprobs: Float[Tensor, "batch completion"]
    entropies: Float[Tensor, "batch completion"]


class Replay(nn.Module):
    """Log-probs of completions under a bounded policy, as one module forward.

    Args:
        policy: The same policy that made the rollouts.
        gradient_mode: `chain`, `horizon` or `exact`.
        horizon: Evictions that gradients go through; only with mode `horizon`, at least 1.

    Raises:
        ValueError: A horizon without the mode, or the mode without a horizon of at least 1.
    """

    def __init__(
        self, policy: BoundedPolicy, *, gradient_mode: GradientMode = "chain", horizon: int | None = None
    ) -> None:
        super().__init__()
        if (gradient_mode == "horizon") != (horizon is not None) or (horizon is not None and horizon < 1):
            raise ValueError(
                f"horizon must be at least 1 with gradient_mode 'horizon' and absent otherwise, got {horizon} with "
                f"{gradient_mode!r}; use gradient_mode='horizon', horizon=4"
            )
        self.policy = policy
        self.adapter = policy.adapter
        self.gradient_mode: GradientMode = gradient_mode
        self.horizon = horizon

    @timed("forward")
    def forward(self, batch: ReplayBatch) -> ReplayOutput:
        """Log-probs and entropies of a batch.

        Args:
            batch: Prompts and completions on the policy's device.
        """
        order = batch.completion_lengths.argsort(descending=True, stable=True)
        back = order.argsort()
        ordered = batch.take(order)
        trainable = () if self.adapter is None else tuple(self.adapter.parameters())
        if not torch.is_grad_enabled() or not any(parameter.requires_grad for parameter in trainable):
            with torch.no_grad():
                logprobs, entropies, _ = self.walk_forward(ordered, history=None)
        elif self.gradient_mode == "exact":
            logprobs, entropies = self.walk_exact(ordered)
        else:
            logprobs, entropies = _ReplayFunction.apply(self, ordered, *trainable)
        return ReplayOutput(policy_logprobs=logprobs[back], entropies=entropies[back])

    @property
    def chains(self) -> bool:
        """True when gradients of the state travel back over all evictions."""
        return self.gradient_mode == "chain" and self.adapter is not None and self.adapter.folds

    def walk_forward(
        self, batch: ReplayBatch, *, history: History | None
    ) -> tuple[Float[Tensor, "batch completion"], Float[Tensor, "batch completion"], ReplayBatch]:
        """The walk without a graph; `history` records what a `chain` backward needs.

        The batch that comes back holds the evictions that were chosen here, so that a backward repeats them.
        """
        walk = Walk(self.policy, batch)
        logprobs, entropies = blank_scores(walk), blank_scores(walk)
        state = expanded_first_state(self.policy, walk.cache.batch)
        for stretch in walk.stretches:
            inputs = walk.enter(stretch)
            state = None if state is None else state[:, : walk.cache.batch]
            if history is not None:
                history.record_start(walk, state)
            evicted = walk.evict(inputs)
            states = None if state is None else segment_states(self.policy, state, evicted)
            hidden, keys, values = run_stretch(
                self.policy,
                inputs,
                cache_keys=walk.cache.keys,
                cache_values=walk.cache.values,
                states=None if states is None else torch.stack(states, dim=2),
            )
            state = None if states is None else states[-1]
            walk.store(stretch, inputs, keys=keys, values=values, graph=False)
            if history is not None:
                history.record_tokens(stretch, inputs, keys=keys, values=values)
            chosen, entropy = self.scores(inputs, hidden, batch=batch, with_entropy=True)
            logprobs.view(-1)[inputs.places] = chosen
            entropies.view(-1)[inputs.places] = entropy
        followed = walk.choices.followed()
        if history is not None:
            history.batch = followed
        return logprobs, entropies, followed

    def walk_exact(
        self, batch: ReplayBatch
    ) -> tuple[Float[Tensor, "batch completion"], Float[Tensor, "batch completion"]]:
        """The walk with gradients through everything; a stretch's activations are computed again in the backward."""
        walk = Walk(self.policy, batch)
        logprobs, entropies = blank_scores(walk), blank_scores(walk)
        state = expanded_first_state(self.policy, walk.cache.batch)
        for stretch in walk.stretches:
            inputs = walk.enter(stretch)
            state = None if state is None else state[:, : walk.cache.batch]
            cache_keys, cache_values = walk.cache.keys, walk.cache.values
            evicted = walk.evict(inputs)
            states = None if state is None else segment_states(self.policy, state, evicted)

            def run(
                keys: Tensor,
                values: Tensor,
                states: Tensor | None,
                inputs: StretchInputs = inputs,
            ) -> tuple[Tensor, ...]:
                hidden, new_keys, new_values = run_stretch(
                    self.policy, inputs, cache_keys=keys, cache_values=values, states=states
                )
                return (*self.scores(inputs, hidden, batch=batch, with_entropy=True), new_keys, new_values)

            stacked = None if states is None else torch.stack(states, dim=2)
            chosen, entropy, keys, values = checkpoint(run, cache_keys, cache_values, stacked, use_reentrant=False)
            state = None if states is None else states[-1]
            walk.store(stretch, inputs, keys=keys, values=values, graph=True)
            logprobs = logprobs.view(-1).index_put((inputs.places,), chosen).view_as(logprobs)
            entropies.view(-1)[inputs.places] = entropy
        return logprobs, entropies

    def scores(
        self,
        inputs: StretchInputs,
        hidden: Float[Tensor, "sequences tokens hidden"],
        *,
        batch: ReplayBatch,
        with_entropy: bool,
    ) -> tuple[Float[Tensor, " scored"], Float[Tensor, " scored"]]:
        """Log-probs and entropies of the tokens that a stretch predicts."""
        return score(
            self.policy,
            hidden.flatten(0, 1)[inputs.scored],
            targets=inputs.targets,
            temperature=batch.temperature,
            with_entropy=with_entropy,
        )

    def stretch_gradients(
        self,
        batch: ReplayBatch,
        inputs: StretchInputs,
        *,
        walk: Walk,
        state: Float[Tensor, "layers sequences rank rank"] | None,
        states: list[Tensor] | None,
        grad_logprobs: Float[Tensor, " places"],
        grad_after: Float[Tensor, "layers sequences rank rank"] | None,
        collected: GradientSum,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """One stretch with a graph: adds its parameter gradients, returns new keys and values and the state's gradient.

        Args:
            batch: The sorted batch.
            inputs: Of the stretch.
            walk: Holds the cache at the start of the stretch.
            state: Leaf from which `states` were computed with a graph, or None.
            states: Running state of each segment.
            grad_logprobs: Gradient of the loss for every completion token, flat.
            grad_after: Gradient for the state after the stretch, or None.
            collected: Sum of parameter gradients.
        """
        hidden, keys, values = run_stretch(
            self.policy,
            inputs,
            cache_keys=walk.cache.keys,
            cache_values=walk.cache.values,
            states=None if states is None else torch.stack(states, dim=2),
        )
        chosen, _ = self.scores(inputs, hidden, batch=batch, with_entropy=False)
        outputs, gradients = [chosen], [grad_logprobs[inputs.places].to(chosen.dtype)]
        if states is not None and grad_after is not None and states[-1].requires_grad:
            outputs.append(states[-1])
            gradients.append(grad_after)
        leaves = [] if state is None else [state]
        found = torch.autograd.grad(outputs, leaves + collected.parameters, gradients, allow_unused=True)
        collected.add(found[len(leaves) :])
        return keys.detach(), values.detach(), found[0] if leaves else None

    def backward_chain(
        self,
        batch: ReplayBatch,
        history: History,
        *,
        grad_logprobs: Float[Tensor, " places"],
        collected: GradientSum,
    ) -> None:
        """From the last stretch to the first, the gradient of S handed back along the chain."""
        grad_state: Tensor | None = None
        for index, state in history.starts_backwards():
            stretch = history.stretches[index]
            walk = history.restored(index)
            inputs = walk.enter(stretch)
            grad_state = padded_rows(grad_state, walk.cache.batch)
            with torch.enable_grad():
                leaf = state.detach().requires_grad_()
                states = segment_states(self.policy, leaf, walk.evict(inputs))
                _, _, grad_state = self.stretch_gradients(
                    batch,
                    inputs,
                    walk=walk,
                    state=leaf,
                    states=states,
                    grad_logprobs=grad_logprobs,
                    grad_after=grad_state,
                    collected=collected,
                )
        self.first_state_gradients(grad_state, collected)

    def backward_forwards(
        self, batch: ReplayBatch, *, grad_logprobs: Float[Tensor, " places"], collected: GradientSum
    ) -> None:
        """From the first stretch to the last; states carry gradients over the last `horizon` evictions only."""
        policy = self.policy
        walk = Walk(policy, batch)
        with torch.no_grad():
            first = expanded_first_state(policy, walk.cache.batch)
        horizon = self.horizon or 0
        recent: deque[tuple[Tensor, EvictedTokens]] = deque()
        state, grad_first, folded = first, None, 0
        for stretch in walk.stretches:
            inputs = walk.enter(stretch)
            rows = walk.cache.batch
            blocks = walk.evict(inputs)
            evicted = blocks if self.adapter is not None and self.adapter.folds else []
            with torch.enable_grad():
                leaf = None if first is None else first[:, :rows].detach().requires_grad_()
                states = None if leaf is None else [leaf] * inputs.segments
                if evicted and leaf is not None and state is not None:
                    recent = deque((before[:, :rows], take_rows(block, rows)) for before, block in recent)
                    state, states = state[:, :rows], []
                    for block in evicted:
                        recent.append((state, block))
                        folded += 1
                        if len(recent) > horizon:
                            recent.popleft()
                        reached = leaf if folded <= horizon else recent[0][0]
                        for _, past in recent:
                            reached = fold(policy, reached, past)
                        states.append(reached)
                        state = reached.detach()
                keys, values, grad = self.stretch_gradients(
                    batch,
                    inputs,
                    walk=walk,
                    state=leaf,
                    states=states,
                    grad_logprobs=grad_logprobs,
                    grad_after=None,
                    collected=collected,
                )
            if grad is not None:
                assert first is not None
                total = padded_rows(grad, first.shape[1])
                grad_first = total if grad_first is None or total is None else grad_first + total
            walk.store(stretch, inputs, keys=keys, values=values, graph=False)
        self.first_state_gradients(grad_first, collected)

    def first_state_gradients(
        self, grad_state: Float[Tensor, "layers batch rank rank"] | None, collected: GradientSum
    ) -> None:
        """Adds what the first state's gradient means for the encoder and the global tokens."""
        if grad_state is None:
            return
        with torch.enable_grad():
            first = first_state(self.policy)
            assert first is not None
            found = torch.autograd.grad(first, collected.parameters, grad_state.sum(1), allow_unused=True)
        collected.add(found)


class _ReplayFunction(torch.autograd.Function):
    """Bridges the two walks to autograd: parameters in, log-probs out, parameter gradients back."""

    @staticmethod
    def forward(ctx, replay: Replay, batch: ReplayBatch, *parameters: Tensor):  # type: ignore[no-untyped-def, override]
        """The walk without a graph."""
        history = History(replay.policy, batch) if replay.chains else None
        logprobs, entropies, batch = replay.walk_forward(batch, history=history)
        ctx.replay, ctx.batch, ctx.history, ctx.parameters = replay, batch, history, parameters
        ctx.versions = [parameter._version for parameter in parameters]
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx, grad_logprobs: Tensor, _: Tensor):  # type: ignore[no-untyped-def, override]
        """The walk with a graph, a stretch at a time."""
        if ctx.versions != [parameter._version for parameter in ctx.parameters]:
            raise RuntimeError(
                "the adapter must not change between a replay's forward and its backward, which walks again; call "
                "backward before the optimizer's step"
            )
        if ctx.replay.chains and ctx.history is None:
            raise RuntimeError(
                "a replay in mode 'chain' can be differentiated once, its keys and values are freed; run it again"
            )
        collected = GradientSum([parameter for parameter in ctx.parameters if parameter.requires_grad])
        flat = grad_logprobs.reshape(-1)
        if ctx.history is not None:
            ctx.replay.backward_chain(ctx.batch, ctx.history, grad_logprobs=flat, collected=collected)
        else:
            ctx.replay.backward_forwards(ctx.batch, grad_logprobs=flat, collected=collected)
        ctx.history = None
        return None, None, *collected.for_each(ctx.parameters)


class GradientSum:
    """Sums of gradients, one per parameter that is trained."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self.parameters = parameters
        self.sums: list[Tensor | None] = [None] * len(parameters)

    def add(self, gradients: tuple[Tensor | None, ...]) -> None:
        """Adds gradients in the order of the parameters; None stands for zero."""
        for index, gradient in enumerate(gradients):
            if gradient is not None:
                before = self.sums[index]
                self.sums[index] = gradient if before is None else before + gradient

    def for_each(self, parameters: tuple[Tensor, ...]) -> list[Tensor | None]:
        """The sums for a list that may hold untrained parameters as well."""
        sums = iter(self.sums)
        return [next(sums) if parameter.requires_grad else None for parameter in parameters]


def expanded_first_state(policy: BoundedPolicy, batch: int) -> Float[Tensor, "layers batch rank rank"] | None:
    """The first state for every sequence."""
    first = first_state(policy)
    return None if first is None else first[:, None].expand(-1, batch, -1, -1)


def blank_scores(walk: Walk) -> Float[Tensor, "batch completion"]:
    """Zeros in the layout of the completions, float32 or wider."""
    dtype = torch.promote_types(walk.policy.dtype, torch.float32)
    return torch.zeros(walk.batch.completion_ids.shape, dtype=dtype, device=walk.batch.completion_ids.device)


def padded_rows(x: Tensor | None, rows: int) -> Tensor | None:
    """Zero rows behind a gradient of the sequences that were still running later."""
    if x is None or x.shape[1] == rows:
        return x
    return torch.cat((x, x.new_zeros(x.shape[0], rows - x.shape[1], *x.shape[2:])), dim=1)


def take_rows(block: EvictedTokens, rows: int) -> EvictedTokens:
    """The evicted tokens of the first sequences."""
    return EvictedTokens(keys=block.keys[:, :rows], values=block.values[:, :rows], positions=block.positions[:rows])
