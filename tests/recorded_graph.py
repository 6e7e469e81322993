"""A CUDA graph's contract on the CPU: operations are noted once, and replayed on the same tensors.

A replay runs the noted operations again, each with the tensors and numbers that it had, and writes into the tensors
that it made: what the host computed in between is frozen, as in a graph. Capturing changes nothing, as there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

Call = tuple[Callable[..., object], tuple[object, ...], dict[str, object], list[torch.Tensor]]


class RecordedGraph:
    """Stands where `torch.cuda.CUDAGraph` does."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def replay(self) -> None:
        """All operations once more."""
        for function, arguments, keywords, made in self.calls:
            again = [x for x in tree_iter(function(*arguments, **keywords)) if isinstance(x, torch.Tensor)]
            for old, new in zip(made, again, strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Recording(TorchDispatchMode):
    """Notes operations, and copies of what they are about to write to."""

    def __init__(self, calls: list[Call]) -> None:
        super().__init__()
        self.calls = calls
        self.before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        keywords = keywords or {}
        for x in tree_iter((arguments, keywords)):
            if isinstance(x, torch.Tensor):
                whole = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
                self.before.setdefault(whole.data_ptr(), (whole, whole.clone()))
        result = function(*arguments, **keywords)
        # What a caller does to the list of a result is no part of the graph.
        made = [x for x in tree_iter(result) if isinstance(x, torch.Tensor)]
        self.calls.append((function, tree_map_only(list, list, arguments), dict(keywords), made))
        return result


@contextmanager
def recorded(graph: RecordedGraph) -> Iterator[None]:
    """Stands where `torch.cuda.graph` does."""
    with Recording(graph.calls) as recording:
        yield
    for whole, before in recording.before.values():
        whole.copy_(before)
