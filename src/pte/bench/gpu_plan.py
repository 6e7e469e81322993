"""What `--preset gpu` measures: batches, windows, lengths, and how long a part may take.

Decides: the settings, for real models and for the tiny one that goes through the same code on a CPU. Rows are asked for
in the order of their worth, since a part that runs out of time leaves out the last ones. Does not know how anything is
measured.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pte.method.schedule import EvictionSchedule


@dataclass(frozen=True)
class GpuPlan:
    """Settings of all parts.

    Args:
        dtype: Of weights, keys and values.
        prompt_tokens: Of every prompt. 128 + 1024 - 128 (half a block) is 1K attended tokens.
        blocks: Evictions that empty a window once: a block is window / blocks.
        rank: Of the adapters.
        global_tokens: Of the thought encoder.
        horizon: Evictions that gradients go through in mode `horizon`.
        windows: Reasoning tokens kept; the first one is the one that figures are about.
        batches: The first one is measured in every arm.
        lengths: Completion tokens of whole rollouts.
        long_batch: Sequences of bounded rollouts of whole completions.
        largest_batch: Sequences beyond which a full cache is not tried, though they fit.
        timed_steps: Decode steps that are timed from a filled cache.
        repeats: Readings of a row at most.
        row_seconds: A row that has taken as long gets no further reading.
        part_seconds: A part that would take longer leaves rows out.
        update_batch: Completions of an update whose memory is compared over lengths.
        update_lengths: Completion tokens of these updates; the figures compare the second with the last.
        dense_update: Completions and completion tokens of the update whose FLOPs are counted.
        step: Completions, completion tokens and micro-batch of a whole GRPO step.
        copy_bytes: Of the copy that measures bandwidth.
        square: Side of the product that measures the matrix rate.
        rate_repeats: Readings of each.
    """

    dtype: str = "bfloat16"
    prompt_tokens: int = 128
    blocks: int = 4
    rank: int = 32
    global_tokens: int = 32
    horizon: int = 4
    windows: tuple[int, ...] = (1024, 2048, 4096)
    batches: tuple[int, ...] = (128, 1, 64, 16, 256)
    lengths: tuple[int, ...] = (3072, 8192, 32_768, 65_536)
    long_batch: int = 256
    largest_batch: int = 512
    timed_steps: int = 64
    repeats: int = 3
    row_seconds: float = 60.0
    part_seconds: float = 480.0
    update_batch: int = 4
    update_lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16_384, 32_768, 65_536)
    dense_update: tuple[int, int] = (16, 4096)
    step: tuple[int, int, int] = (64, 3072, 8)
    copy_bytes: int = 4 * 2**30
    square: int = 8192
    rate_repeats: int = 9

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def window_tokens(self) -> int:
        """The window that figures are about."""
        return self.windows[0]

    def schedule(self, window_tokens: int | None) -> EvictionSchedule:
        """The budget of a window; the full cache for None."""
        if window_tokens is None:
            return EvictionSchedule(None)
        return EvictionSchedule(window_tokens, window_tokens // self.blocks)


GPU = GpuPlan()
TINY = GpuPlan(
    prompt_tokens=3,
    blocks=2,
    rank=4,
    global_tokens=3,
    horizon=2,
    windows=(8, 16),
    batches=(2, 1),
    lengths=(80, 96),
    long_batch=2,
    largest_batch=2,
    timed_steps=16,
    repeats=2,
    update_batch=2,
    update_lengths=(8, 16, 32),
    dense_update=(2, 16),
    step=(2, 24, 1),
    copy_bytes=2**20,
    square=64,
    rate_repeats=3,
)


def plan_for(model: str) -> GpuPlan:
    """The settings for a model: small ones for the tiny one."""
    return TINY if model == "tiny" else GPU
