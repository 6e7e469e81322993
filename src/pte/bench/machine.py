"""Where and with what a benchmark ran: hardware, versions, commit, load.

Decides: what a kept result says about its origin. Nothing here needs a network; what is not known is null.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import torch
import transformers

Facts = dict[str, str | int | float | None]


def hardware() -> Facts:
    """The processor by its model name, cores, memory, and the load when asked."""
    memory = None
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "memory_bytes": memory,
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def cpu_model() -> str:
    """The processor's name as the system tells it."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions() -> Facts:
    """Of what the figures depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "libc": " ".join(platform.libc_ver()) or None,
        "platform": sys.platform,
    }


def commit() -> str | None:
    """Of the checkout that holds this file, with "-dirty" where tracked files differ; None outside of one."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
        )
    except OSError:
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
