"""Our training script: `ours.py RUN` carries out one run, written as JSON, with `mlpreduce.train.fit`.

The process group is that of `torch.distributed.run`, as for any other script, and not Ray's: what is measured is the loop,
which knows of its surroundings only a `Runtime`, and the same launcher for both leaves nothing else to differ.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from mlpreduce.train import Run, Runtime, fit

__all__ = ["main"]


def main(path: str) -> None:
    """Train the run in the file `path`, as one worker of the group that the environment names."""
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    run = Run.model_validate_json(Path(path).read_text(encoding="utf-8"))
    fit(run, Runtime(rank=rank, world=world, device=device))
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
