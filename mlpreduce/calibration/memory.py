"""How much memory sums over calibration data may take."""

from __future__ import annotations

import os
from pathlib import Path

import torch

__all__ = ["allowed"]

_PART = 0.5  # of what is free
_MIB = 1 << 20


def allowed(device: torch.device, given: float | None) -> float:
    """Bytes that sums may take on a device: `given` in MiB, or half of what is free there."""
    if given is not None:
        return given * _MIB
    if device.type == "cuda":
        return _PART * torch.cuda.mem_get_info(device)[0]
    return _PART * _available()


def _available() -> float:
    """Bytes that this machine can still give, what it holds of files counted as free where the system says how much that is."""
    told = Path("/proc/meminfo")
    for line in told.read_text().splitlines() if told.is_file() else ():
        if line.startswith("MemAvailable:"):
            return float(line.split()[1]) * 1024
    return float(os.sysconf("SC_PHYS_PAGES")) * os.sysconf("SC_PAGE_SIZE") / 2
