"""What a `chain` backward needs of the forward walk, in host memory.

Decides: what is kept (every reasoning token's keys and values before the last stretch, the prompt's, which tokens each
window held, and a state now and then) and how the walk is put back to the start of any stretch.
Does not know gradients: `replay` drives it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from pte.rollout.walk import StretchInputs, Walk, batch_stretches, segment_states

if TYPE_CHECKING:
    from torch import Tensor

    from pte.method.schedule import Stretch
    from pte.model.policy import BoundedPolicy
    from pte.rollout.record import ReplayBatch

STATE_BYTES_FRACTION = 0.02


class History:
    """What a `chain` backward needs of the forward walk: keys and values in host memory, and a few states.

    A state is kept at the start of every `stride`-th stretch, so that states take at most about 2 % of the bytes of
    the keys and values; the ones between are folded again.

    Args:
        policy: The bounded policy.
        batch: Sorted by completion length, longest first. The forward walk replaces it by one that records the
            evictions that it chose.
    """

    def __init__(self, policy: BoundedPolicy, batch: ReplayBatch) -> None:
        self.policy = policy
        self.batch = batch
        self.stretches = stretches = batch_stretches(policy, batch)
        shape = policy.cache_shape
        on_gpu = batch.prompt_ids.device.type == "cuda"
        size = (shape.layers, batch.prompt_ids.shape[0], shape.kv_heads, stretches[-1].start, shape.head_dim)
        self.keys, self.values = (torch.empty(size, dtype=policy.dtype, pin_memory=on_gpu) for _ in range(2))
        self.prompt: tuple[Tensor, Tensor] | None = None
        self.token_indices: list[Tensor] = []
        self.states: dict[int, Tensor] = {}
        assert policy.adapter is not None
        stretch_tokens = max((stretch.stop - stretch.start for stretch in stretches[1:]), default=1)
        kv_bytes = stretch_tokens * shape.token_bytes(policy.dtype)
        state_bytes = shape.layers * policy.adapter.rank**2 * 4
        self.stride = max(1, round(state_bytes / (STATE_BYTES_FRACTION * kv_bytes)))

    def record_start(self, walk: Walk, state: Tensor | None) -> None:
        """Notes, before a stretch, which tokens the window holds and, now and then, the state."""
        index = len(self.token_indices)
        self.token_indices.append(walk.cache.token_indices().to("cpu", torch.int32))
        if index % self.stride == 0:
            assert state is not None
            self.states[index] = state.clone()

    def record_tokens(self, stretch: Stretch, inputs: StretchInputs, *, keys: Tensor, values: Tensor) -> None:
        """Copies what a stretch added to host memory; the prompt's stays where it is."""
        if stretch == self.stretches[-1]:
            return
        prompt, rows = inputs.prompt_tokens, keys.shape[1]
        if prompt:
            self.prompt = keys[:, :, :, :prompt].clone(), values[:, :, :, :prompt].clone()
        where = slice(stretch.start, stretch.stop)
        self.keys[:, :rows, :, where].copy_(keys[:, :, :, prompt:], non_blocking=True)
        self.values[:, :rows, :, where].copy_(values[:, :, :, prompt:], non_blocking=True)

    def restored(self, index: int) -> Walk:
        """The walk as it stood at the start of a stretch."""
        walk = Walk(self.policy, self.batch)
        if index == 0:
            return walk
        assert self.prompt is not None
        if self.keys.is_pinned():
            torch.cuda.synchronize(self.batch.prompt_ids.device)
        indices = self.token_indices[index].long()
        rows = indices.shape[0]
        walk.cache = cache = walk.cache.first(rows)
        prompt, device = cache.prompt_slots, cache.keys.device
        cache.keys[:, :, :, :prompt], cache.values[:, :, :, :prompt] = (part[:, :rows] for part in self.prompt)
        where = indices[None, :, None, :, None].expand(
            self.keys.shape[0], -1, self.keys.shape[2], -1, self.keys.shape[4]
        )
        cache.keys[:, :, :, prompt:] = self.keys[:, :rows].gather(3, where).to(device)
        cache.values[:, :, :, prompt:] = self.values[:, :rows].gather(3, where).to(device)
        slot = torch.arange(prompt, device=device)
        cache.positions[:, :prompt] = torch.where(slot < cache.prompt_lengths[:, None], slot, -1)
        cache.positions[:, prompt:] = indices.to(device) + cache.prompt_lengths[:, None]
        return walk

    def starts_backwards(self) -> Iterator[tuple[int, Tensor]]:
        """(stretch, state at its start), last stretch first; at most `stride` states exist at once."""
        last = len(self.token_indices) - 1
        for first in range(last - last % self.stride, -1, -self.stride):
            states = [self.states[first]]
            for index in range(first, min(first + self.stride, last + 1) - 1):
                walk = self.restored(index)
                with torch.no_grad():
                    blocks = walk.evict(walk.enter(self.stretches[index]))
                    after = segment_states(self.policy, states[-1], blocks)[-1]
                states.append(after[:, : self.token_indices[index + 1].shape[0]])
            for offset in range(len(states) - 1, -1, -1):
                yield first + offset, states[offset]
