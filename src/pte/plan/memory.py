"""What is planned, what lies in memory for the whole of a run, and what a phase holds at its peak.

Decides: the inputs that every formula reads (`PlannedPolicy`, `Workload`), the bytes that are there before any work
(weights, adapter, optimizer), and how they are given names. What a phase adds is in `rollout_memory.py` and
`update_memory.py`. All bytes are those of live tensors; what an allocator keeps beyond them is not here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from pte.kernels.operands import padded_rank
from pte.method.adapter import INPUT_GROUPS, AdapterKind
from pte.method.float8 import FLOAT8
from pte.method.schedule import EvictionSchedule
from pte.plan.model_sizes import ModelSizes

FLOAT32_BYTES = 4
ADAMW_MOMENTS = 2

Row = Literal[
    "weights",
    "adapter",
    "optimizer",
    "gradients",
    "slots",
    "states",
    "records",
    "prompts",
    "decode step",
    "activations",
    "LM head",
    "evicted",
]


@dataclass(frozen=True)
class PlannedPolicy:
    """A bounded policy that nobody has made yet.

    Args:
        sizes: Of the base.
        dtype: Of everything that is computed, and of what is kept unless `float8` says otherwise.
        float8: Weights of the layers' linear maps, and keys and values of the rollout, are kept in float8.
        kind: Of the adapter.
        rank: Of A, B and S.
        targets: Adapted maps of every adapted layer.
        adapted_layers: How many layers are adapted.
        global_tokens: Of the thought encoder.
        schedule: Of the cache.
        segments_per_stretch: Of the eviction policy, as in `BoundedPolicy`.
        cuda: It runs on a GPU, where decode weights are fused and evicted keys wait in pinned host memory.
    """

    sizes: ModelSizes
    dtype: torch.dtype
    float8: bool
    kind: AdapterKind
    rank: int
    targets: tuple[str, ...]
    adapted_layers: int
    global_tokens: int
    schedule: EvictionSchedule
    segments_per_stretch: int
    cuda: bool

    @property
    def cache_dtype(self) -> torch.dtype:
        """Of keys and values in the rollout's slots."""
        return FLOAT8 if self.float8 else self.dtype

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token over all layers, outside of the rollout's slots."""
        return self.sizes.cache_shape.token_bytes(self.dtype)

    @property
    def has_state(self) -> bool:
        """True with an encoder, whose states the adapters read."""
        return self.kind != "lora"

    @property
    def state_bytes(self) -> int:
        """One state of one sequence over all layers."""
        return self.sizes.layers * self.rank**2 * FLOAT32_BYTES if self.has_state else 0

    @property
    def pair_parameters(self) -> int:
        """Of all A and B."""
        return self.adapted_layers * sum(self.rank * sum(self.sizes.maps[name]) for name in self.targets)

    @property
    def adapter_parameters(self) -> int:
        """Of the whole adapter, the encoder and its global tokens included."""
        if not self.has_state:
            return self.pair_parameters
        encoder = 4 * self.sizes.layers * self.rank * self.sizes.kv_dim
        return self.pair_parameters + encoder + self.global_tokens * self.sizes.hidden_size

    @property
    def adapter_bytes(self) -> int:
        """Float32 masters of the adapter: its gradients, and each moment of AdamW, take as much."""
        return self.adapter_parameters * FLOAT32_BYTES

    @property
    def working_bytes(self) -> int:
        """A and B as a forward multiplies with them: copies in the base's dtype."""
        return self.pair_parameters * self.dtype.itemsize

    @property
    def weights_bytes(self) -> int:
        """The base, and on a GPU the spare rows in which its fused matrices hold B, with the padded A beside them."""
        wide = (self.sizes.parameters + self.fused_numbers) * self.dtype.itemsize
        if not self.float8:
            return wide
        maps = self.sizes.maps.values()
        numbers = self.sizes.layers * sum(inputs * outputs for inputs, outputs in maps)
        scales = self.sizes.layers * sum(outputs for _, outputs in maps)
        return wide - numbers * (self.dtype.itemsize - FLOAT8.itemsize) + scales * FLOAT32_BYTES

    @property
    def fused_numbers(self) -> int:
        """Numbers that fusing adds to the base's own: every map gets rows for B, every adapted group an A."""
        if not self.cuda:
            return 0
        maps, padded = self.sizes.maps, padded_rank(self.rank)
        rows = padded * sum(inputs for inputs, _ in maps.values())
        ups = sum(
            padded * maps[name][1]
            for names in INPUT_GROUPS
            if any(name in self.targets for name in names)
            for name in names
        )
        return self.sizes.layers * rows + self.adapted_layers * ups

    @property
    def resident(self) -> dict[Row, int]:
        """What lies on the device for the whole of a run."""
        return {
            "weights": self.weights_bytes,
            "adapter": self.adapter_bytes,
            "optimizer": ADAMW_MOMENTS * self.adapter_bytes,
        }


@dataclass(frozen=True)
class Workload:
    """How much a policy is asked to do at once: the worst case, every sequence as long as it may be.

    Args:
        prompt_tokens: Of the longest prompt.
        completion_tokens: Of the longest completion.
        slots: Sequences that are sampled at once.
        sequences: Sequences of one training step.
        group_size: Sequences that share a prompt.
        micro_batch: Sequences that are replayed at once.
        gradient_mode: Of the replay.
        horizon: Evictions that gradients go through; read in mode `horizon` alone.
        reference: Cache of the frozen base in the KL term; None where there is no such term.
        gradient_checkpointing: Layers are computed again under a window, too.
    """

    prompt_tokens: int
    completion_tokens: int
    slots: int
    sequences: int
    group_size: int
    micro_batch: int
    gradient_mode: Literal["chain", "horizon", "exact"]
    horizon: int
    reference: Literal["full", "bounded"] | None
    gradient_checkpointing: bool


@dataclass(frozen=True)
class PhaseMemory:
    """What a phase holds at its peak, on top of what lies there for the whole of a run.

    Args:
        device: By kind; in a run on the CPU all of it, the waiting keys and values included.
        host: In host memory beside a GPU, by kind.
    """

    device: dict[Row, int]
    host: dict[Row, int]

    @property
    def device_bytes(self) -> int:
        """All of it on the device."""
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        """All of it beside the device."""
        return sum(self.host.values())
