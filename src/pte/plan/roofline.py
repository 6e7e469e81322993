"""What the hardware allows: the shortest a decode step can take, and the FLOPs of an update.

Decides: the arithmetic. A decode step reads every weight once and every attended key and value once; weights and
attention take turns within a layer, so their times add, and each is the larger of its reading and its multiplying:

    bound = max(weight bytes / bandwidth, 2 P batch / rate) + max(KV bytes / bandwidth, attention FLOPs / rate)

with P the parameters of all matrices that a token is multiplied with, the head among them. Left out, all far below a
hundredth: biases, norms, embeddings looked up, adapters and states (so that PTE is held against the plain base).
An update's model FLOPs: forward 2 P a token and backward 2 P a token, as a frozen base has no gradients of weights;
attention 4 heads head_dim layers an attended token forward and twice that backward. What is computed twice counts once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pte.method.cache import CacheShape
from pte.method.float8 import FLOAT8

if TYPE_CHECKING:
    from pte.method.schedule import EvictionSchedule
    from pte.plan.model_sizes import ModelSizes
    from pte.plan.shapes import ModelShape


@dataclass(frozen=True)
class DecodeWork:
    """What a token of a model reads and multiplies.

    Args:
        layer_parameters: Of the linear maps of all layers.
        head_parameters: Of the language-model head.
        weight_bytes: Read in every decode step.
        kv_token_bytes: Keys and values of one token over all layers.
        attention_flops: Per token and attended token: its products with a key and with a value, in all heads.
    """

    layer_parameters: int
    head_parameters: int
    weight_bytes: int
    kv_token_bytes: int
    attention_flops: int

    @classmethod
    def of(cls, shape: ModelShape | ModelSizes, dtype: torch.dtype, *, float8: bool = False) -> DecodeWork:
        """The work of a shape.

        Args:
            shape: Of the base, written down or read from its configuration.
            dtype: Of weights, keys and values.
            float8: The linear maps of the layers, keys and values are float8 instead; the head is not.
        """
        kept = FLOAT8 if float8 else dtype
        attention = 2 * shape.hidden_size * (shape.heads + shape.kv_heads) * shape.head_dim
        layers = shape.layers * (attention + 3 * shape.hidden_size * shape.intermediate_size)
        head = shape.vocab * shape.hidden_size
        return cls(
            layer_parameters=layers,
            head_parameters=head,
            weight_bytes=layers * kept.itemsize + head * dtype.itemsize,
            kv_token_bytes=CacheShape(shape.layers, shape.kv_heads, shape.head_dim).token_bytes(kept),
            attention_flops=4 * shape.heads * shape.head_dim * shape.layers,
        )


@dataclass(frozen=True)
class DeviceRates:
    """What a device was measured to do.

    Args:
        bytes_per_second: Memory bandwidth, bytes read and bytes written together.
        flops_per_second: Of a large square matrix product.
    """

    bytes_per_second: float
    flops_per_second: float


def weights_bound_seconds(work: DecodeWork, rates: DeviceRates, *, batch: int) -> float:
    """The least time for the matrix products of one step."""
    flops = 2 * (work.layer_parameters + work.head_parameters) * batch
    return max(work.weight_bytes / rates.bytes_per_second, flops / rates.flops_per_second)


def attention_bound_seconds(work: DecodeWork, rates: DeviceRates, *, batch: int, attended_tokens: float) -> float:
    """The least time for the attention of one step.

    Args:
        work: Of the model.
        rates: Of the device.
        batch: Sequences.
        attended_tokens: Keys that each sequence attends to, on average.
    """
    attended = batch * attended_tokens
    return max(
        attended * work.kv_token_bytes / rates.bytes_per_second,
        attended * work.attention_flops / rates.flops_per_second,
    )


def step_bound_seconds(work: DecodeWork, rates: DeviceRates, *, batch: int, attended_tokens: float) -> float:
    """The least time for one decode step, as the module says."""
    return weights_bound_seconds(work, rates, batch=batch) + attention_bound_seconds(
        work, rates, batch=batch, attended_tokens=attended_tokens
    )


def attended_sum(schedule: EvictionSchedule, tokens: range) -> int:
    """Reasoning tokens that reasoning tokens attend to, themselves included, summed.

    Args:
        schedule: Of the cache.
        tokens: Indices of the attending tokens.
    """
    evict = schedule.evict_tokens or 0
    return sum(index - evict * schedule.evictions_before(index) + 1 for index in tokens)


def update_flops(
    work: DecodeWork, schedule: EvictionSchedule, *, sequences: int, prompt_tokens: int, tokens: int
) -> float:
    """Model FLOPs of one update on completions of one length.

    Args:
        work: Of the model.
        schedule: Of the cache under which they are replayed.
        sequences: Completions.
        prompt_tokens: Of each prompt; prompts pass the layers and not the head.
        tokens: Of each completion; its last token is scored and never enters.
    """
    entering = tokens - 1
    products = 4 * (work.layer_parameters * (prompt_tokens + entering) + work.head_parameters * tokens)
    attended = prompt_tokens * (prompt_tokens + 1) / 2
    attended += entering * prompt_tokens + attended_sum(schedule, range(entering))
    return sequences * (products + 3 * work.attention_flops * attended)


@dataclass(frozen=True)
class StepLine:
    """Seconds of a decode step as a straight line over the position, as they are under a full cache.

    Args:
        positions: Two positions.
        seconds: Of a step there.
    """

    positions: tuple[float, float]
    seconds: tuple[float, float]

    def at(self, position: float) -> float:
        """Seconds of the step at a position."""
        (first, last), (start, end) = self.positions, self.seconds
        return start + (end - start) * (position - first) / (last - first)

    def completion_seconds(self, tokens: int) -> float:
        """Seconds of all steps from 0 to `tokens`: of a line, as many as of the middle one each."""
        return tokens * self.at(tokens / 2)
