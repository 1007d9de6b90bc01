"""How much memory may be taken by what is kept of calibration data."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch

__all__ = ["allowed"]

_FREE = Path("/proc/meminfo")  # of Linux
_PART = 0.5  # of what is free
_MIB = 1 << 20


def allowed(device: torch.device, given: float | None) -> float:
    """Bytes that what is kept of data may take on a device: `given` in MiB, or half of what is free there.

    Processes of one machine that were started together, as by torchrun, share half of its memory. There is no limit where
    nobody knows what is free.
    """
    if given is not None:
        return given * _MIB
    if device.type == "cuda":
        return _PART * torch.cuda.mem_get_info(device)[0]
    return _PART * _available() / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _available() -> float:
    """Bytes of this machine's memory that are free, or are used for files alone; half of all where the system does not say."""
    for line in _FREE.read_text().splitlines() if _FREE.is_file() else ():
        if line.startswith("MemAvailable:"):
            return float(line.split()[1]) * 1024
    if not hasattr(os, "sysconf"):  # Windows
        return math.inf
    return float(os.sysconf("SC_PHYS_PAGES")) * os.sysconf("SC_PAGE_SIZE") / 2
