"""Counts the bytes of tensors that are alive, operation by operation, and keeps their peak."""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """Bytes of every storage that an operation inside the block has made and that is still referenced.

    What existed before the block (the model, the adapter, the batch) is not counted; views count once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self.known: dict[int, weakref.ref] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the wrapper costs as much as the rest

    def __enter__(self) -> LiveBytes:
        super().__enter__()
        return self

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        before = {id(x.untyped_storage()) for x in arguments if isinstance(x, torch.Tensor)}
        result = function(*arguments, **(keywords or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, torch.Tensor):
                self.note(x, before)
        return result

    def note(self, x: torch.Tensor, before: set[int]) -> None:
        storage = x.untyped_storage()
        key = id(storage)
        if key in self.known or key in before:
            return
        size = storage.nbytes()

        def freed(_: weakref.ref) -> None:
            del self.known[key]
            self.live -= size

        self.known[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)
