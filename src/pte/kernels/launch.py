"""What every launch asks: the device's multiprocessors, and whether the matrix units have the dtype."""

from __future__ import annotations

from functools import cache

import torch

INTERPRETED_MULTIPROCESSORS = 4
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a few for the interpreter, so that tests see splits and loops."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return INTERPRETED_MULTIPROCESSORS


def check_dtype(dtype: torch.dtype) -> None:
    """Refuses dtypes that the kernels do not compute in.

    Raises:
        ValueError: Not one of bfloat16, float16 and float32.
    """
    if dtype not in DTYPES:
        names = ", ".join(str(known).removeprefix("torch.") for known in DTYPES)
        raise ValueError(f"kernels compute in {names}, got {dtype}; load the base in one of them or use DecodeStep")
