"""The optimizer: its learning rate by hand, its refusals, and a round trip of its state."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from pte.checkpoint import load_training_state, save_training_state
from pte.learn.optimizer import AdapterOptimizer, TrainingStopped, check_finite_loss, learning_rate_factor


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def optimizer(adapter: nn.Module, **changes: object) -> AdapterOptimizer:
    settings = {
        "learning_rate": 0.1,
        "warmup_steps": 0,
        "total_steps": 10,
        "decay": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        **changes,
    }
    return AdapterOptimizer(adapter, **settings)


def backward(adapter: nn.Module, *, scale: float = 1.0) -> None:
    (scale * adapter(torch.ones(1, 3)).square().sum()).backward()


def test_the_learning_rate_rises_over_the_warm_up_and_then_stays() -> None:
    rates = [learning_rate_factor(step, warmup_steps=3, total_steps=9, decay="constant") for step in range(6)]
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_linear_decay_reaches_five_percent_where_the_stage_ends() -> None:
    # After 2 of warm-up, 8 steps: 1, 1 - 0.95/8, ..., and at step 10 what would follow the last one: 0.05.
    rates = [learning_rate_factor(step, warmup_steps=2, total_steps=10, decay="linear") for step in (2, 3, 6, 10, 99)]
    assert rates == pytest.approx([1.0, 0.88125, 0.525, 0.05, 0.05])


def test_cosine_decay_is_half_way_in_the_middle() -> None:
    rates = [learning_rate_factor(step, warmup_steps=0, total_steps=8, decay="cosine") for step in (0, 2, 4, 8)]
    # 0.05 + 0.95 * (1 + cos(pi * done)) / 2
    assert rates == pytest.approx([1.0, 0.05 + 0.95 * (1 + math.sqrt(0.5)) / 2, 0.525, 0.05])


def test_a_warm_up_longer_than_the_stage_is_no_division_by_zero() -> None:
    assert learning_rate_factor(5, warmup_steps=5, total_steps=5, decay="linear") == 1.0


def test_each_step_uses_and_returns_its_own_rate_and_the_norm_before_clipping() -> None:
    adapter = model()
    learner = optimizer(adapter, warmup_steps=1, decay="linear", total_steps=3)
    rates = []
    for _ in range(3):
        backward(adapter, scale=100.0)
        expected = torch.cat([parameter.grad.flatten() for parameter in adapter.parameters()]).norm().item()
        norm, rate = learner.step()
        assert norm == pytest.approx(expected, rel=1e-5)
        assert norm > 1.0
        assert all(parameter.grad is None for parameter in adapter.parameters())
        assert learner.adamw.param_groups[0]["lr"] == rate
        rates.append(rate)
    # Warm-up 1 of 2, then linear from 1 to 0.05 over two steps.
    assert rates == pytest.approx([0.05, 0.1, 0.1 * 0.525])


def test_gradients_are_scaled_down_to_the_largest_norm_and_never_up() -> None:
    # Adam's first moment after one step is 0.1 times the gradient that it saw.
    for scale, clipped in ((1e4, True), (1e-4, False)):
        adapter = model()
        learner = optimizer(adapter, max_grad_norm=0.5)
        backward(adapter, scale=scale)
        norm, _ = learner.step()
        seen = 10 * torch.cat([learner.adamw.state[one]["exp_avg"].flatten() for one in adapter.parameters()]).norm()
        assert seen.item() == pytest.approx(0.5 if clipped else norm, rel=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_leaves_the_parameters_alone_and_names_the_one_at_fault(bad: float) -> None:
    adapter = model()
    learner = optimizer(adapter)
    before = [parameter.detach().clone() for parameter in adapter.parameters()]
    backward(adapter)
    adapter[1].bias.grad[0] = bad
    with pytest.raises(TrainingStopped, match=r"gradient must be finite, got norm (nan|inf) \(in 1.bias\); lower the"):
        learner.step()
    assert all(torch.equal(one, two) for one, two in zip(before, adapter.parameters(), strict=True))
    assert learner.steps == 0 and not learner.adamw.state
    assert all(parameter.grad is None for parameter in adapter.parameters())


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    check_finite_loss(torch.tensor(3.0))
    for bad in (math.nan, math.inf):
        with pytest.raises(TrainingStopped, match="loss must be finite, got (nan|inf); lower the learning rate"):
            check_finite_loss(torch.tensor(bad))


def test_an_optimizer_that_was_saved_and_loaded_goes_on_bit_for_bit(tmp_path) -> None:
    def go_on(learner: AdapterOptimizer, adapter: nn.Module, steps: int) -> None:
        for _ in range(steps):
            backward(adapter)
            learner.step()

    settings = {"warmup_steps": 2, "decay": "cosine", "weight_decay": 0.1}
    whole = model()
    go_on(optimizer(whole, **settings), whole, 6)
    first = model()
    learner = optimizer(first, **settings)
    go_on(learner, first, 3)
    save_training_state(tmp_path, {"optimizer": learner.state()})
    second = model()
    second.load_state_dict(first.state_dict())
    resumed = optimizer(second, **settings)
    resumed.load_state(load_training_state(tmp_path)["optimizer"])
    assert resumed.steps == 3
    go_on(resumed, second, 3)
    assert all(torch.equal(one, two) for one, two in zip(whole.parameters(), second.parameters(), strict=True))


def test_weight_decay_moves_parameters_without_a_gradient_and_zero_decay_does_not() -> None:
    for decay in (0.0, 0.5):
        adapter = model()
        learner = optimizer(adapter, weight_decay=decay)
        before = adapter[0].weight.detach().clone()
        backward(adapter, scale=0.0)
        learner.step()
        # AdamW: w <- w (1 - rate * decay), here 1 - 0.1 * 0.5.
        torch.testing.assert_close(adapter[0].weight, before * (1 - 0.1 * decay))
