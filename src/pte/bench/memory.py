"""How much resident memory a piece of work needs at its peak, beyond what the process held before it.

Decides: the method. A fresh process for every reading; a short training step first (libraries loaded, optimizer state
made); then the growth of the step itself (`pte.plan.process_memory`), which can be read on Linux with glibc only;
elsewhere the memory figures are null. Readings of equal work differ by about 1 MB.

The allocator's environment is fixed (`ALLOCATOR`), for both sides alike: by default glibc raises the size from which
a block gets pages of its own as blocks are freed, then keeps freed blocks in its heap, and the same step reads up to
a third higher in some processes than in others.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Literal

import torch

from pte.bench.cpu_arms import our_step, plain_step
from pte.plan.process_memory import peak_growth_bytes

if TYPE_CHECKING:
    from pte.bench.presets import Preset

MemoryArm = Literal["chain", "horizon", "lora"]
ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
BYTES_PER_MB = 1e6


def step_growth_bytes(preset: Preset, arm: MemoryArm, *, tokens: int) -> int:
    """Growth during one training step of `tokens` tokens, in this process."""
    torch.set_num_threads(preset.threads)
    step = plain_step(preset) if arm == "lora" else our_step(preset, arm)
    step.run(preset.warmup_tokens, seed=0)
    return peak_growth_bytes(lambda: step.run(tokens, seed=1))


def isolated_growth_bytes(preset: Preset, arm: MemoryArm, *, tokens: int) -> int:
    """The same in a process of its own.

    Raises:
        RuntimeError: The process failed; its last lines are in the message.
    """
    request = json.dumps({"preset": preset.to_json(), "arm": arm, "tokens": tokens})
    return int(read_in_fresh_process("pte.bench.memory_process", request)["growth_bytes"])


def read_in_fresh_process(module: str, request: str) -> dict[str, float]:
    """Numbers that a module prints as its last line, one JSON object, run with the allocator's environment fixed.

    Args:
        module: Run as `python -m module request`.
        request: What to measure, JSON.

    Raises:
        RuntimeError: The process failed; its last lines are in the message.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, request],
        env={**os.environ, **ALLOCATOR},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(
            f"the process that measures memory ({module}) must end well, got status {done.returncode} for {request}; "
            f"its last words: {done.stderr[-2000:]}"
        )
    return json.loads(done.stdout.splitlines()[-1])
