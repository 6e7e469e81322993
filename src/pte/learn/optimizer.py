"""AdamW on an adapter, with warm-up, decay, clipping, and a refusal to step on anything that is not finite.

Decides: the learning rate at every step (a pure function of its index) and that a bad gradient never reaches the
parameters. Does not know what is optimised.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from pte.ranks import ALONE, Ranks
from pte.timing import timed

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from pte.checkpoint_files import StateTree

Decay = Literal["constant", "linear", "cosine"]
FINAL_FRACTION = 0.05


class TrainingStopped(RuntimeError):
    """A run that must not go on; the refused update was not made, the last checkpoint is kept."""


def learning_rate_factor(step: int, *, warmup_steps: int, total_steps: int, decay: Decay) -> float:
    """Share of the learning rate at a step, from 0: rises linearly over the warm-up, then decays to 5 %.

    Args:
        step: Index of the optimizer step.
        warmup_steps: Steps of the rise.
        total_steps: Steps of the whole stage.
        decay: `constant`, `linear` or `cosine`.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if decay == "constant":
        return 1.0
    done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    left = 1 - done if decay == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return FINAL_FRACTION + (1 - FINAL_FRACTION) * left


class AdapterOptimizer:
    """One stage's optimizer.

    Args:
        adapter: What is trained; float32.
        learning_rate: After the warm-up.
        warmup_steps: Optimizer steps of the rise.
        total_steps: Optimizer steps of the stage.
        decay: Of the learning rate.
        weight_decay: Of AdamW.
        max_grad_norm: Gradients are scaled down to this norm.
        ranks: Whose gradients add up; each then makes the same step.
    """

    def __init__(
        self,
        adapter: nn.Module,
        *,
        learning_rate: float,
        warmup_steps: int,
        total_steps: int,
        decay: Decay,
        weight_decay: float,
        max_grad_norm: float,
        ranks: Ranks = ALONE,
    ) -> None:
        self.names = [name for name, _ in adapter.named_parameters()]
        self.parameters = list(adapter.parameters())
        self.learning_rate = learning_rate
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps
        self.decay: Decay = decay
        self.max_grad_norm = max_grad_norm
        self.ranks = ranks
        self.adamw = torch.optim.AdamW(self.parameters, lr=learning_rate, weight_decay=weight_decay)
        self.steps = 0

    @timed("optimizer")
    def step(self) -> tuple[float, float]:
        """One step on the gradients that all ranks have accumulated, which are then cleared.

        Returns:
            Norm of the gradient before clipping, and the learning rate.

        Raises:
            TrainingStopped: The gradient is not finite; the parameters are untouched.
        """
        self.ranks.sum_gradients(self.parameters)
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        total = nn.utils.get_total_norm(gradients)
        norm = total.item()
        if not math.isfinite(norm):
            bad = [
                name
                for name, parameter in zip(self.names, self.parameters, strict=True)
                if parameter.grad is not None and not parameter.grad.isfinite().all()
            ]
            self.adamw.zero_grad()
            raise TrainingStopped(
                f"the gradient must be finite, got norm {norm} (in {', '.join(bad[:3]) or 'its sum'}); lower the "
                f"learning rate, or set adapter.update_rule to another rule"
            )
        nn.utils.clip_grads_with_norm_(self.parameters, self.max_grad_norm, total)
        rate = self.learning_rate * learning_rate_factor(
            self.steps, warmup_steps=self.warmup_steps, total_steps=self.total_steps, decay=self.decay
        )
        for group in self.adamw.param_groups:
            group["lr"] = rate
        self.adamw.step()
        self.adamw.zero_grad()
        self.steps += 1
        return norm, rate

    def state(self) -> dict[str, StateTree]:
        """What a checkpoint keeps."""
        return {"steps": self.steps, "adamw": self.adamw.state_dict()["state"]}

    def load_state(self, state: Mapping[str, StateTree]) -> None:
        """Puts back what `state` returned."""
        steps, moments = state["steps"], state["adamw"]
        assert isinstance(steps, int)
        self.steps = steps
        self.adamw.load_state_dict({"state": moments, "param_groups": self.adamw.state_dict()["param_groups"]})


@timed("backward")
def backpropagate(loss: Float[Tensor, ""]) -> None:
    """Adds the gradients of a loss to the adapter's parameters."""
    loss.backward()


def check_finite_loss(loss: torch.Tensor) -> None:
    """Raises TrainingStopped when a loss is not finite."""
    if not loss.isfinite():
        raise TrainingStopped(f"the loss must be finite, got {loss.item()}; lower the learning rate")
