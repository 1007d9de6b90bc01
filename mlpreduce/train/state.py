"""Checkpoints of a training run: written whole or not at all, read without pickle, refused where they do not belong.

`checkpoint.pt` holds weights, optimizer, schedule, scaler, averaged weights and all past epochs; `rng<rank>-<epoch>.pt`
the random states of one worker. The epoch in the name ties the two together, so a run that is killed between the two writes
goes on from the epoch before.
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from mlpreduce.errors import ReductionError
from mlpreduce.train.settings import Run

__all__ = ["read_checkpoint", "restore_rng", "save_checkpoint", "seed_everything"]

FORMAT = 1


def seed_everything(seed: int) -> None:
    """Seed torch (all devices), numpy (timm's mixup draws from it) and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def save_checkpoint(
    run: Run, state: dict[str, Any], *, epoch: int, rank: int, world: int, device: torch.device
) -> None:
    """Write the state of a run after `epoch` epochs. Every worker calls it; worker 0 writes `state`.

    Args:
        run: gives the directory and the identity of the run.
        state: state dictionaries, numbers and JSON-like values only.
        epoch: epochs that are finished.
        rank: number of this worker.
        world: number of workers.
        device: whose random state is kept, besides the CPU's.
    """
    directory = Path(run.directory)
    directory.mkdir(parents=True, exist_ok=True)
    _write(_rng_state(device), directory / f"rng{rank}-{epoch}.pt")
    if world > 1:
        dist.barrier()  # checkpoint.pt may only name an epoch whose random states all lie on disk
    if rank == 0:
        _write(
            {"format": FORMAT, "config_hash": run.config_hash, "world": world, "epoch": epoch, **state},
            directory / "checkpoint.pt",
        )
    if world > 1:
        dist.barrier()
    for old in directory.glob(f"rng{rank}-*.pt"):
        if old.name != f"rng{rank}-{epoch}.pt":
            old.unlink()


def read_checkpoint(run: Run) -> dict[str, Any] | None:
    """The last checkpoint of a run, on the CPU; None where there is none.

    Raises:
        ReductionError: it was written with other settings, or by another version of the library.
    """
    path = Path(run.directory) / "checkpoint.pt"
    if not path.is_file():
        return None
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    if state["format"] != FORMAT:
        raise ReductionError(
            f"{path}: checkpoint format {state['format']}, this version reads {FORMAT}; start in another --output"
        )
    if state["config_hash"] != run.config_hash:
        raise ReductionError(
            f"{path}: written with other settings (hash {state['config_hash']} with {state['world']} worker(s), now "
            f"{run.config_hash} with {run.workers}); give the settings of that run, or start in another --output"
        )
    return state


def restore_rng(run: Run, *, epoch: int, rank: int, device: torch.device) -> None:
    """Set the random states of this worker as they were after `epoch` epochs.

    Raises:
        ReductionError: the file is missing, for instance because the directory is not shared by all nodes.
    """
    path = Path(run.directory) / f"rng{rank}-{epoch}.pt"
    if not path.is_file():
        raise ReductionError(
            f"{path}: missing, but checkpoint.pt is at epoch {epoch}; --output must lie on storage that all workers share"
        )
    state = torch.load(path, map_location="cpu", weights_only=True)
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


def _rng_state(device: torch.device) -> dict[str, Any]:
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # type: ignore[misc]
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": [str(name), np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "python": [version, list(internal), gauss],
    }


def _write(state: dict[str, Any], path: Path) -> None:
    draft = path.with_name(f"{path.name}.tmp")
    torch.save(state, draft)
    os.replace(draft, path)
