"""Where the wall time of a step goes: named spans in the library's own code, read by a clock while one runs.

Decides: the names of the spans, and that times are exclusive: a moment belongs to the innermost span that is open, so
the times of all spans and of `other` sum to the time of the clock, to the nanosecond. Without a clock a span is one
comparison (0.1 µs). What autograd does later for tensors that a span returned (`fold`, `read`) belongs to that span as
well, not to `backward`: the nodes that the span made report when they run.
On a GPU the clock waits for the device where a span opens and closes: the shares are right, the step is slower.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, ParamSpec, TypeVar, get_args

import torch

if TYPE_CHECKING:
    from torch.autograd.graph import Node

Span = Literal["prefill", "decode", "fold", "read", "reward", "forward", "backward", "optimizer"]
"""prefill, decode: reading prompts, one token of a rollout; fold, read: making a state of keys and values, and
normalising it and multiplying with it, wherever that happens; reward; forward, backward: of the replay; optimizer."""
SPANS: tuple[Span, ...] = get_args(Span)

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class StepClock:
    """Exclusive wall time of each span.

    Args:
        synchronize: Waits for the device; called where a span opens and closes.

    `nanoseconds` holds the time by path, the names of the open spans from the outermost to the innermost; the empty
    path is what lies in no span.
    """

    def __init__(self, synchronize: Callable[[], None] | None = None) -> None:
        self.synchronize = synchronize
        self.nanoseconds: dict[tuple[Span, ...], int] = {}
        self.path: tuple[Span, ...] = ()
        self.since = 0

    def tick(self, path: tuple[Span, ...]) -> None:
        """Books the time since the last tick on the path that was open, and opens another."""
        if self.synchronize is not None:
            self.synchronize()
        now = time.perf_counter_ns()
        self.nanoseconds[self.path] = self.nanoseconds.get(self.path, 0) + now - self.since
        self.path, self.since = path, now

    def enter(self, name: Span) -> None:
        """Opens a span."""
        self.tick((*self.path, name))

    def leave(self) -> None:
        """Closes the innermost span."""
        self.tick(self.path[:-1])

    def seconds(self) -> dict[str, float]:
        """Exclusive time of every span, and `other`."""
        times: dict[str, int] = dict.fromkeys((*SPANS, "other"), 0)
        for path, nanoseconds in self.nanoseconds.items():
            times[path[-1] if path else "other"] += nanoseconds
        return {name: nanoseconds / 1e9 for name, nanoseconds in times.items()}

    @property
    def total_nanoseconds(self) -> int:
        """All of it."""
        return sum(self.nanoseconds.values())

    def follow_backward(self, name: Span, tensor: torch.Tensor, *, first_node: int) -> None:
        """Books what autograd does for a tensor on a span.

        Args:
            name: Of the span.
            tensor: What the span returned.
            first_node: Sequence number that autograd was to give next when the span opened: the nodes that the span
                made have this one or later ones, all that they lead to have earlier ones.
        """
        last_node = torch._C._autograd._get_sequence_nr()
        waiting = [tensor.grad_fn]
        known: set[Node] = set()
        while waiting:
            node = waiting.pop()
            # Nodes of leaves have the largest number of all.
            if node is None or node in known or not first_node <= node._sequence_nr() < last_node:
                continue
            known.add(node)
            node.register_prehook(lambda _gradients: self.enter(name))
            node.register_hook(lambda _results, _gradients: self.leave())
            waiting.extend(following for following, _ in node.next_functions)


_running: StepClock | None = None


@contextmanager
def step_clock(device: torch.device | None = None) -> Iterator[StepClock]:
    """A clock that runs within the block, over everything that this process does.

    Args:
        device: Whose work is waited for; None for the CPU.

    Raises:
        RuntimeError: A clock is running already.
    """
    global _running
    if _running is not None:
        raise RuntimeError("one clock can run at a time, got a second; end the first block before")
    waits = device is not None and device.type == "cuda"
    clock = StepClock((lambda: torch.cuda.synchronize(device)) if waits else None)
    clock.tick(())
    clock.nanoseconds.clear()
    _running = clock
    try:
        yield clock
        clock.tick(())
    finally:
        _running = None


def timed(name: Span) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
    """Makes a function a span.

    Args:
        name: Of the span.
    """

    def decorate(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        @functools.wraps(function)
        def spanned(*arguments: Parameters.args, **keywords: Parameters.kwargs) -> Result:
            clock = _running
            # What is captured in a CUDA graph runs later, and waiting for the device is no part of a graph.
            if clock is None or (clock.synchronize is not None and torch.cuda.is_current_stream_capturing()):
                return function(*arguments, **keywords)
            clock.enter(name)
            try:
                first_node = torch._C._autograd._get_sequence_nr()
                result = function(*arguments, **keywords)
                if isinstance(result, torch.Tensor):
                    clock.follow_backward(name, result, first_node=first_node)
                return result
            finally:
                clock.leave()

        return spanned

    return decorate
