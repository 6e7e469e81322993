"""The clock's own claims: times are exclusive, sum to the whole, and a clock changes nothing but the time."""

from __future__ import annotations

import pytest
import torch

import pte.timing
from pte.rollout.record import collate
from pte.rollout.replay import Replay
from pte.timing import SPANS, StepClock, step_clock, timed
from tiny import random_sequences, tiny_policy


class Hands:
    """A clock face whose hands move only when they are pushed."""

    def __init__(self) -> None:
        self.now = 0

    def perf_counter_ns(self) -> int:
        return self.now


@pytest.fixture
def hands(monkeypatch: pytest.MonkeyPatch) -> Hands:
    hands = Hands()
    monkeypatch.setattr(pte.timing, "time", hands)
    return hands


def test_a_moment_belongs_to_the_innermost_open_span(hands: Hands) -> None:
    @timed("fold")
    def fold() -> None:
        hands.now += 5

    @timed("decode")
    def decode() -> None:
        hands.now += 2
        fold()
        hands.now += 3

    hands.now = 1000
    with step_clock() as clock:
        hands.now += 7
        decode()
        decode()
        fold()
    # Outside of all spans 7; decode 2 + 3, twice; fold 5 in each decode and 5 by itself: 7 + 10 + 15 = 32.
    assert clock.nanoseconds == {(): 7, ("decode",): 10, ("decode", "fold"): 10, ("fold",): 5}
    assert clock.total_nanoseconds == 32
    expected = dict.fromkeys((*SPANS, "other"), 0.0) | {"other": 7e-9, "decode": 10e-9, "fold": 15e-9}
    assert clock.seconds() == expected


def test_the_backward_of_what_a_span_returned_is_the_span_s(hands: Hands) -> None:
    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, seconds):
            ctx.seconds = seconds
            hands.now += 1
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            hands.now += ctx.seconds
            return grad, None

    @timed("fold")
    def fold(x: torch.Tensor) -> torch.Tensor:
        return Slow.apply(Slow.apply(x, 10), 20)

    @timed("backward")
    def backward(x: torch.Tensor) -> None:
        x.sum().backward()

    leaf = torch.ones(3, requires_grad=True)
    with step_clock() as clock:
        # 100 before the span and 1000 behind it are nobody's but backward's.
        backward(Slow.apply(fold(Slow.apply(leaf, 100)), 1000))
    assert clock.nanoseconds == {(): 2, ("fold",): 2, ("backward", "fold"): 30, ("backward",): 1100}


def test_a_span_that_fails_is_closed_and_the_next_clock_can_run() -> None:
    @timed("reward")
    def fail() -> None:
        raise KeyError("no answer")

    with pytest.raises(KeyError), step_clock() as clock:
        fail()
    assert clock.path == ()
    with step_clock() as clock, pytest.raises(RuntimeError, match="one clock can run at a time"), step_clock():
        pass
    assert clock.total_nanoseconds > 0


def test_nothing_is_timed_without_a_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    def tick(*_: object) -> None:
        raise AssertionError("a clock ran")

    monkeypatch.setattr(StepClock, "tick", tick)
    assert timed("read")(lambda x: x + 1)(2) == 3


@pytest.mark.parametrize("mode", ["chain", "exact", "horizon"])
def test_a_clock_leaves_log_probs_and_gradients_as_they_are_and_sees_the_state_in_the_backward(mode: str) -> None:
    policy = tiny_policy()
    prompts, completions = random_sequences(3)
    batch = collate(prompts, completions, stream_seeds=range(3), temperature=1.0)
    replay = Replay(policy, gradient_mode=mode, horizon=2 if mode == "horizon" else None)
    parameters = list(policy.adapter.parameters())

    def run() -> tuple[torch.Tensor, ...]:
        logprobs = replay(batch).policy_logprobs
        found = timed("backward")(torch.autograd.grad)(logprobs.square().sum(), parameters)
        return logprobs.detach(), *found

    without = run()
    with step_clock() as clock:
        under = run()
    assert all(torch.equal(*pair) for pair in zip(without, under, strict=True))
    assert all(clock.nanoseconds[path] > 0 for path in (("forward",), ("forward", "fold"), ("forward", "read")))
    assert all(clock.nanoseconds[path] > 0 for path in (("backward",), ("backward", "fold"), ("backward", "read")))
    # Time goes by in no other combination, and nothing is left open.
    assert all(
        len(path) <= 2 and path[-1:] in ((), ("forward",), ("backward",), ("fold",), ("read",))
        for path in clock.nanoseconds
    )
    assert clock.path == ()
