"""Where the kernels run, and why not elsewhere.

Decides: which devices are served. Does not know: models, shapes; it imports no kernel, so that asking costs nothing
on a machine without triton.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

FIRST_CAPABILITY = (8, 0)
"""The oldest GPUs whose matrix units multiply bfloat16."""


def kernels_available(device: torch.device) -> bool:
    """True where the kernels run."""
    return why_no_kernels(device) is None


def why_no_kernels(device: torch.device) -> str | None:
    """What stands in the way of the kernels on a device, with the remedy; None where nothing does.

    On the CPU they run in triton's interpreter, which is for tests.
    """
    if find_spec("triton") is None:
        return "triton is not installed; install triton, which comes with torch for CUDA on Linux"
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return "kernels need a CUDA device, got cpu; use a GPU, or set TRITON_INTERPRET=1 to test them"
    if device.type != "cuda" or torch.version.cuda is None:
        return f"kernels need a CUDA device, got {device.type}; use an NVIDIA GPU"
    if torch.cuda.get_device_capability(device) < FIRST_CAPABILITY:
        return (
            f"kernels need compute capability 8.0 or newer, got {torch.cuda.get_device_name(device)}; use a newer GPU"
        )
    return None
