"""Differentiable log-probs of completions under the bounded policy: exact, and flat in memory.

Decides: when a batch is walked and what a walk leaves behind. The forward pass walks without a graph; the backward
pass walks again, one stretch with a graph at a time, and returns all adapter gradients at once, so that any loss can
sit on top and DDP sees one forward. Where the log-probs are known (`recorded`: the policy that sampled is the policy
that learns) the forward pass does not walk at all. Gradient modes:

- `chain` (default): through every state, not through keys and values written before the stretch. Evicted keys and
  values wait in host memory.
- `horizon`: through the last h evictions only; strictly constant memory.
- `exact`: through everything in one walk, memory grows with the completion. A full cache, which evicts nothing, is
  walked like this in every mode: one stretch, whose layers are computed again one by one, linear in its tokens.

With `gradient_checkpointing` the layers of every stretch are computed again like this in all modes.

Paper: "gradients need not go back through the full-cache rollout". Ours: which gradients are kept, as named above.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pte.rollout.gradients import GradientSum, state_gradients
from pte.rollout.scores import ReplayOutput, WalkedScores, blank_scores, score
from pte.rollout.stretch import StretchInputs, run_stretch
from pte.rollout.walk import StretchStart, Walk
from pte.timing import timed

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from pte.model.policy import BoundedPolicy
    from pte.rollout.record import ReplayBatch

GradientMode = Literal["chain", "exact", "horizon"]


class Replay(nn.Module):
    """Log-probs of completions under a bounded policy, as one module forward.

    Args:
        policy: The same policy that made the rollouts.
        gradient_mode: `chain`, `horizon` or `exact`.
        horizon: Evictions that gradients go through; only with mode `horizon`, at least 1.
        gradient_checkpointing: A backward pass computes the layers of a stretch again, one by one. For updates that do
            not fit: of a stretch the graph of one layer is alive at once, beside the inputs of all, in place of the
            graphs of all layers. It costs one more forward of each stretch and changes no number: the gradients are
            the same, bit for bit on a CPU. A full cache is always walked like this.

    Raises:
        ValueError: A horizon without the mode, or the mode without a horizon of at least 1.
    """

    def __init__(
        self,
        policy: BoundedPolicy,
        *,
        gradient_mode: GradientMode = "chain",
        horizon: int | None = None,
        gradient_checkpointing: bool = False,
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
        self.gradient_checkpointing = gradient_checkpointing

    @timed("forward")
    def forward(self, batch: ReplayBatch, *, recorded: Float[Tensor, "batch completion"] | None = None) -> ReplayOutput:
        """Log-probs of a batch, and what its walk finds.

        With `recorded` the values are taken for granted and the gradient is that of this policy all the same: one walk
        instead of two. What the walk really finds is in the output after backward; compare it before an update. Where
        nothing can be differentiated, in mode `exact` and under a full cache it is there at once. A loss that is linear
        in the log-probs has the same gradient whatever is recorded.

        Args:
            batch: Prompts and completions on the policy's device.
            recorded: Known log-prob of each completion token; what stands on padding is not read.

        Raises:
            ValueError: `recorded` has another shape than the completions.
        """
        if recorded is not None and recorded.shape != batch.completion_ids.shape:
            raise ValueError(
                f"recorded must hold a log-prob for each completion token, shape {tuple(batch.completion_ids.shape)}, "
                f"got {tuple(recorded.shape)}; pad the rollouts' log-probs to the longest completion"
            )
        order = batch.completion_lengths.argsort(descending=True, stable=True)
        back = order.argsort()
        # Completions that come sorted, as those of one length do, are not copied.
        in_order = torch.equal(order, torch.arange(len(order), device=order.device))
        ordered, walked = batch if in_order else batch.take(order), WalkedScores(back)
        if recorded is not None:
            blank = blank_scores(self.policy, ordered)
            recorded = torch.where(ordered.completion_mask, recorded[order].to(blank), blank)
        trainable = () if self.adapter is None else tuple(self.adapter.parameters())
        differentiates = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in trainable)
        if differentiates and self.gradient_mode != "exact" and not self.policy.schedule.is_full:
            logprobs = _ReplayFunction.apply(self, ordered, recorded, walked, *trainable)
        else:
            with torch.set_grad_enabled(differentiates):
                found, entropies = self.walk_exact(ordered) if differentiates else self.walk(ordered)[:2]
            walked.fill(found, entropies)
            logprobs = found if recorded is None else recorded + (found - found.detach())
        return ReplayOutput(policy_logprobs=logprobs[back], walked=walked)

    @torch.no_grad()
    def walk(
        self, batch: ReplayBatch
    ) -> tuple[Float[Tensor, "batch completion"], Float[Tensor, "batch completion"], ReplayBatch]:
        """Log-probs and entropies, without a graph.

        The batch that comes back holds the evictions that were chosen here, so that a backward repeats them.
        """
        walk = Walk(self.policy, batch)
        logprobs, entropies = blank_scores(self.policy, batch), blank_scores(self.policy, batch)
        for stretch in walk.stretches:
            start = walk.enter(stretch)
            hidden, keys, values = run_stretch(
                self.policy,
                start.inputs,
                cache_keys=walk.cache.keys,
                cache_values=walk.cache.values,
                states=start.states,
            )
            walk.store(start, keys=keys, values=values)
            chosen, entropy = self.scores(start.inputs, hidden, temperature=batch.temperature)
            logprobs.view(-1)[start.inputs.places] = chosen
            entropies.view(-1)[start.inputs.places] = entropy
        return logprobs, entropies, walk.choices.followed()

    def walk_exact(
        self, batch: ReplayBatch
    ) -> tuple[Float[Tensor, "batch completion"], Float[Tensor, "batch completion"]]:
        """The walk with gradients through everything; a stretch's activations are computed again in the backward.

        Under a full cache, and with `gradient_checkpointing`, a layer at a time.
        """
        walk = Walk(self.policy, batch)
        logprobs, entropies = blank_scores(self.policy, batch), blank_scores(self.policy, batch)
        full = self.policy.schedule.is_full
        for stretch in walk.stretches:
            start = walk.enter(stretch)

            def run(
                keys: Tensor, values: Tensor, states: Tensor | None, start: StretchStart = start
            ) -> tuple[Tensor, ...]:
                hidden, *added = run_stretch(
                    self.policy,
                    start.inputs,
                    cache_keys=keys,
                    cache_values=values,
                    states=states,
                    recompute_layers=full or self.gradient_checkpointing,
                )
                return (*self.scores(start.inputs, hidden, temperature=batch.temperature), *added)

            given = (walk.cache.keys, walk.cache.values, start.states)
            # The one stretch of a full cache is as long as the completion: its layers are the unit there.
            chosen, entropy, keys, values = run(*given) if full else checkpoint(run, *given, use_reentrant=False)
            walk.store(start, keys=keys, values=values)
            logprobs = logprobs.view(-1).index_put((start.inputs.places,), chosen).view_as(logprobs)
            entropies.view(-1)[start.inputs.places] = entropy
        return logprobs, entropies

    @torch.no_grad()
    def walk_backward(
        self,
        batch: ReplayBatch,
        *,
        grad_logprobs: Float[Tensor, "batch completion"],
        parameters: list[Tensor],
        walked: WalkedScores | None,
    ) -> GradientSum:
        """The walk of the modes `chain` and `horizon`, a stretch with a graph at a time, and its gradients.

        Args:
            batch: Sorted by length.
            grad_logprobs: Gradient of the loss for every completion token.
            parameters: Those that are trained.
            walked: Is filled with what the walk finds, or None.
        """
        walk = Walk(self.policy, batch)
        collected = GradientSum(parameters)
        through = state_gradients(self.policy, walk, horizon=self.horizon, collected=collected)
        logprobs, entropies = blank_scores(self.policy, batch), blank_scores(self.policy, batch)
        for stretch in walk.stretches:
            start = walk.enter(stretch)
            places = start.inputs.places
            with torch.enable_grad():
                states = start.states
                leaves = [] if through is None or states is None else [states.detach().requires_grad_()]
                hidden, keys, values = run_stretch(
                    self.policy,
                    start.inputs,
                    cache_keys=walk.cache.keys,
                    cache_values=walk.cache.values,
                    states=leaves[0] if leaves else states,
                    recompute_layers=self.gradient_checkpointing,
                )
                chosen, entropy = self.scores(
                    start.inputs, hidden, temperature=batch.temperature, with_entropy=walked is not None
                )
                wanted = grad_logprobs.reshape(-1)[places].to(chosen.dtype)
                found = torch.autograd.grad(chosen, [*leaves, *parameters], wanted, allow_unused=True)
            of_states, of_parameters = found[: len(leaves)], found[len(leaves) :]
            collected.add(of_parameters)
            logprobs.view(-1)[places], entropies.view(-1)[places] = chosen.detach(), entropy
            walk.store(start, keys=keys.detach(), values=values.detach())
            # The next stretch is walked beside the sum of the gradients alone, not beside this stretch's as well.
            del hidden, keys, values, chosen, found, of_parameters
            if through is not None:
                through.add(start, *of_states)
            del of_states
        if through is not None:
            through.finish()
        if walked is not None:
            walked.fill(logprobs, entropies)
        return collected

    def scores(
        self,
        inputs: StretchInputs,
        hidden: Float[Tensor, "sequences tokens hidden"],
        *,
        temperature: float,
        with_entropy: bool = True,
    ) -> tuple[Float[Tensor, " scored"], Float[Tensor, " scored"]]:
        """Log-probs and entropies of the tokens that a stretch predicts."""
        return score(
            self.policy,
            hidden.flatten(0, 1)[inputs.scored],
            targets=inputs.targets,
            temperature=temperature,
            with_entropy=with_entropy,
        )


class _ReplayFunction(torch.autograd.Function):
    """Bridges the walks to autograd: parameters in, log-probs out, parameter gradients back."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def, override]
        ctx,
        replay: Replay,
        batch: ReplayBatch,
        recorded: Tensor | None,
        walked: WalkedScores,
        *parameters: Tensor,
    ):
        """The walk without a graph, or what is known already."""
        if recorded is None:
            logprobs, entropies, batch = replay.walk(batch)
            walked.fill(logprobs, entropies)
        else:
            logprobs = recorded.clone()
        ctx.replay, ctx.batch, ctx.parameters = replay, batch, parameters
        ctx.walked = None if recorded is None else walked
        ctx.versions = [parameter._version for parameter in parameters]
        return logprobs

    @staticmethod
    def backward(ctx, grad_logprobs: Tensor):  # type: ignore[no-untyped-def, override]
        """The walk with a graph, a stretch at a time."""
        if ctx.versions != [parameter._version for parameter in ctx.parameters]:
            raise RuntimeError(
                "the adapter must not change between a replay's forward and its backward, which walks again; call "
                "backward before the optimizer's step"
            )
        collected = ctx.replay.walk_backward(
            ctx.batch,
            grad_logprobs=grad_logprobs,
            parameters=[parameter for parameter in ctx.parameters if parameter.requires_grad],
            walked=ctx.walked,
        )
        return None, None, None, None, *collected.for_each(ctx.parameters)
