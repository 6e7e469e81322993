"""What a run may take and how fast it can be: memory written as people write it, and what devices are sold as.

Decides: the figures of devices by name, from their vendors' data sheets (dense matrix products in bfloat16 with sums
in float32, no sparsity), and what of a GPU's memory is left to tensors. Measured rates are lower; the flags
`--bandwidth` and `--flops` take them.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from pte.plan.roofline import DeviceRates

UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}

CONTEXT_BYTES = 600 * 10**6
"""Of a CUDA process beside all tensors: context, libraries, loaded kernels. Assumed, not measured."""
FRAGMENTS_FRACTION = 0.05
"""Of a phase's tensors, which the caching allocator needs on top because freed blocks do not fit the next ones.
Assumed, not measured."""


@dataclass(frozen=True)
class Device:
    """A GPU as it is sold.

    Args:
        memory_bytes: Of the device.
        rates: Bandwidth of its memory, and dense products in bfloat16.
    """

    memory_bytes: int
    rates: DeviceRates


DEVICES = {
    # NVIDIA H200 SXM data sheet: 141 GB, 4.8 TB/s, 989 TFLOP/s.
    "h200": Device(141 * 10**9, DeviceRates(4.8e12, 989e12)),
    # NVIDIA H100 SXM data sheet: 80 GB, 3.35 TB/s, 989 TFLOP/s.
    "h100": Device(80 * 10**9, DeviceRates(3.35e12, 989e12)),
    # NVIDIA A100 SXM data sheet, 80 GB: 2,039 GB/s, 312 TFLOP/s.
    "a100-80gb": Device(80 * 10**9, DeviceRates(2.039e12, 312e12)),
    # NVIDIA A100 SXM data sheet, 40 GB: 1,555 GB/s, 312 TFLOP/s.
    "a100-40gb": Device(40 * 10**9, DeviceRates(1.555e12, 312e12)),
    # NVIDIA L40S data sheet: 48 GB, 864 GB/s, 362 TFLOP/s.
    "l40s": Device(48 * 10**9, DeviceRates(0.864e12, 362e12)),
    # NVIDIA Ada architecture paper, RTX 4090: 24 GB, 1,008 GB/s, 165.2 TFLOP/s.
    "rtx4090": Device(24 * 10**9, DeviceRates(1.008e12, 165.2e12)),
}


@dataclass(frozen=True)
class Machine:
    """Where a run is planned.

    Args:
        cuda: On a GPU; else all of it is host memory.
        device_bytes: Memory of the device.
        host_bytes: Memory beside a GPU; None where nobody said.
        rates: Of the device; None on a CPU.
        rates_of: Whose rates these are, in words.
    """

    cuda: bool
    device_bytes: int
    host_bytes: int | None
    rates: DeviceRates | None
    rates_of: str

    def taken(self, *, resident: int, phase: int) -> int:
        """Bytes of the device that are gone when a phase is at its peak.

        Args:
            resident: Tensors that lie there for the whole of a run.
            phase: Tensors of the phase.
        """
        if not self.cuda:
            return resident + phase
        return resident + phase + int(FRAGMENTS_FRACTION * phase) + CONTEXT_BYTES


def memory_bytes(name: str, text: str) -> int:
    """A size in bytes, from text such as 80GB (10^9 bytes) or 80GiB (2^30 bytes).

    Args:
        name: Of the setting, for the message.
        text: A number and a unit.

    Raises:
        ValueError: It is no such text, or not above 0.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B)\s*", text, re.IGNORECASE)
    size = int(float(found[1]) * UNITS.get(found[2].upper(), 0)) if found else 0
    if size <= 0:
        raise ValueError(
            f"{name} must be a number with one of the units MB, GB, TB (powers of 1000), MiB, GiB, TiB (of 1024), "
            f"above 0, got {text!r}; use for example 80GB"
        )
    return size


def planned_machine(
    *, gpu: str | None, gpu_memory: str | None, host_memory: str | None, bandwidth: float | None, flops: float | None
) -> Machine:
    """The machine that the flags describe.

    Args:
        gpu: One of `DEVICES`, which gives what is not said otherwise; unset for the one whose memory is nearest.
        gpu_memory: Of the GPU; unset for what it is sold with.
        host_memory: Beside the GPU; without any GPU, of the machine that trains on its CPU.
        bandwidth: Bytes that the GPU's memory moves in a second; unset for its data sheet's.
        flops: Operations of its matrix products in a second; unset for its data sheet's.

    Raises:
        ValueError: No memory is given, a size cannot be read, a rate is not above 0, or it is given without a GPU.
    """
    for name, rate in (("bandwidth", bandwidth), ("flops", flops)):
        if rate is not None and not 0 < rate < math.inf:
            raise ValueError(f"{name} must be a finite number above 0, got {rate}; use for example 3e12")
    host = None if host_memory is None else memory_bytes("host_memory", host_memory)
    if gpu is None and gpu_memory is None:
        if host is None:
            raise ValueError(
                "gpu_memory must say what there is, got none; use for example --gpu-memory 80GB, --gpu h100, or "
                "--host-memory 32GB for a run on the CPU"
            )
        if bandwidth is not None or flops is not None:
            raise ValueError(
                f"bandwidth and flops must be left out without a GPU, for which alone times are planned, got "
                f"{bandwidth} and {flops}; drop them, or say --gpu-memory"
            )
        return Machine(False, host, None, None, "")
    size = None if gpu_memory is None else memory_bytes("gpu_memory", gpu_memory)
    name = gpu or min(DEVICES, key=lambda known: abs(DEVICES[known].memory_bytes - (size or 0)))
    known = DEVICES[name]
    rates = DeviceRates(bandwidth or known.rates.bytes_per_second, flops or known.rates.flops_per_second)
    source = f"the data sheet of {name}" if gpu else f"the data sheet of {name}, whose memory is nearest (--gpu NAME)"
    return Machine(True, size or known.memory_bytes, host, rates, "as given" if bandwidth and flops else source)
