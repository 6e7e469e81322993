"""What `--preset cpu` measures: the shape of a model, the sizes of a batch, the lengths, how often.

Decides: the settings. Does not know how anything is measured. A preset is plain data, so that it can be handed to a
fresh process as JSON. What `--preset gpu` measures stands in `gpu_plan.py`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from pte.plan.shapes import ModelShape


@dataclass(frozen=True)
class Preset:
    """One benchmark.

    Args:
        name: Of the preset.
        shape: Of the base.
        batch: Sequences at once, each with a prompt of its own.
        prompt_tokens: Tokens of every prompt.
        window_tokens: Reasoning tokens kept.
        evict_tokens: Reasoning tokens evicted at once.
        rank: Of the adapters.
        global_tokens: Of the thought encoder.
        horizon: Evictions that gradients go through in mode `horizon`.
        threads: Of torch.
        lengths: Completion lengths that are timed; memory is read at these and at `long_tokens`.
        figure_tokens: The length, one of `lengths`, that the figures are about.
        long_tokens: The length at which memory must still be flat.
        warmup_tokens: Completion length of the step before each memory reading.
        rollout_repeats: Pairs (ours, theirs) of timed rollouts.
        step_repeats: Pairs of timed training steps.
        memory_repeats: Processes for each memory reading that enters a figure.
    """

    name: str
    shape: ModelShape
    batch: int
    prompt_tokens: int
    window_tokens: int
    evict_tokens: int
    rank: int
    global_tokens: int
    horizon: int
    threads: int
    lengths: tuple[int, ...]
    figure_tokens: int
    long_tokens: int
    warmup_tokens: int
    rollout_repeats: int
    step_repeats: int
    memory_repeats: int

    def __post_init__(self) -> None:
        if self.figure_tokens not in self.lengths:
            raise ValueError(
                f"figure_tokens must be one of lengths {self.lengths}, got {self.figure_tokens}; add it to them"
            )
        if self.prompt_tokens + self.long_tokens > self.shape.max_positions:
            raise ValueError(
                f"max_positions must hold prompt and long_tokens ({self.prompt_tokens + self.long_tokens}), got "
                f"{self.shape.max_positions}; raise it"
            )

    def to_json(self) -> str:
        """The preset as one line, for `from_json`."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Preset:
        """The preset that `to_json` wrote."""
        fields = json.loads(text)
        fields["shape"] = ModelShape(**fields["shape"])
        fields["lengths"] = tuple(fields["lengths"])
        return cls(**fields)


CPU = Preset(
    name="cpu",
    # The intermediate size is ours: 4 x hidden, which the compared table leaves open. So are untied embeddings.
    shape=ModelShape(
        hidden_size=128,
        intermediate_size=512,
        layers=4,
        heads=4,
        kv_heads=2,
        vocab=512,
        tied=False,
        max_positions=8192,
    ),
    batch=4,
    prompt_tokens=32,
    window_tokens=64,
    evict_tokens=16,
    rank=32,
    global_tokens=32,
    horizon=4,
    threads=1,
    lengths=(128, 256, 512, 1024),
    figure_tokens=1024,
    long_tokens=4096,
    warmup_tokens=128,
    rollout_repeats=5,
    step_repeats=3,
    memory_repeats=3,
)
