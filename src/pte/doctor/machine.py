"""Devices and fast paths: what the machine offers, and which of it a rollout takes.

Decides: what is asked of a device. Whether a path is on, and why not, is said in the words of who decides it
(`kernels.available`, `method.float8`, `rollout.token_step.decode_path`), so that there is one wording.
"""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

from pte.doctor.findings import Finding

if TYPE_CHECKING:
    import torch

DEVICES = "devices"
FAST_PATHS = "fast paths"


def devices() -> list[torch.device]:
    """The CPU, then every CUDA device that torch sees."""
    import torch

    return [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]


def found_devices() -> list[Finding]:
    """The processor and the GPUs."""
    import torch

    from pte.run_record import hardware

    machine, gpus = hardware(), devices()[1:]
    memory = machine["memory_bytes"]
    assert isinstance(memory, int)
    findings = [
        Finding(
            DEVICES,
            "cpu",
            "ok",
            f"{machine['cpu']}, {machine['cores']} cores, {torch.get_num_threads()} threads in torch, "
            f"{memory / 2**30:.0f} GiB",
        )
    ]
    for device in gpus:
        seen = torch.cuda.get_device_properties(device)
        findings.append(
            Finding(
                DEVICES,
                str(device),
                "ok",
                f"{seen.name}, capability {seen.major}.{seen.minor}, {seen.total_memory / 2**30:.0f} GiB, "
                f"driver {driver_version() or 'unknown'}, CUDA {torch.version.cuda or torch.version.hip}",
            )
        )
    if not gpus:
        findings.append(without_gpu(driver_version(), cuda=torch.version.cuda))
    return findings


def without_gpu(driver: str | None, *, cuda: str | None) -> Finding:
    """Why torch sees no GPU.

    Args:
        driver: Version of NVIDIA's driver; None where none answers.
        cuda: CUDA version that torch was built for; None for a build for the CPU.
    """
    build = "a build for the CPU" if cuda is None else f"a build for CUDA {cuda}"
    if driver is None:
        return Finding(DEVICES, "cuda", "off", f"no NVIDIA driver answers; torch is {build}")
    says = f"torch sees no GPU, though driver {driver} is there; torch is {build}"
    if cuda is None:
        return Finding(DEVICES, "cuda", "warning", says, "install a build of torch for CUDA (pytorch.org)")
    return Finding(DEVICES, "cuda", "warning", says, "unset CUDA_VISIBLE_DEVICES, or install a newer driver")


def driver_version() -> str | None:
    """Version of NVIDIA's driver, as nvidia-smi says it; None where it does not answer."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.split()
    return lines[0] if lines else None


def fast_paths() -> list[Finding]:
    """Kernels, number formats and pinned memory of each device; captured steps are part of the decode path."""
    import torch

    from pte.kernels.available import why_no_kernels
    from pte.method.float8 import float8_refusal

    findings = []
    for device in devices():
        reason = why_no_kernels(device)
        says = "on" if reason is None else reason
        findings.append(Finding(FAST_PATHS, f"kernels on {device}", "ok" if reason is None else "off", says))
        if device.type != "cuda":
            continue
        no_bfloat16 = None if torch.cuda.is_bf16_supported() else "not multiplied by the device; use dtype float16"
        for name, reason in (("bfloat16", no_bfloat16), ("float8", float8_refusal(device))):
            says = "on" if reason is None else reason
            findings.append(Finding(FAST_PATHS, f"{name} on {device}", "ok" if reason is None else "off", says))
    pinned = torch.cuda.is_available() and torch.empty(1, pin_memory=True).is_pinned()
    says = "on: evicted keys and values wait in it" if pinned else "nothing to copy from: no CUDA device"
    findings.append(Finding(FAST_PATHS, "pinned host memory", "ok" if pinned else "off", says))
    return findings
