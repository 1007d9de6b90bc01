"""How fast this library is, beside a peer that does the same job on the same machine, in turns: `python -m mlpreduce bench`.

Jobs: `apply` (planning and applying a reduction), `train` (the training loop), `search` (the driver of a search). Each is a
module with `main`, which takes the arguments that follow the job.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from mlpreduce.errors import ReductionError, require

__all__ = ["JOBS", "main"]

JOBS = {
    "apply": "plan and apply shallow(ratio=0.5)",
    "train": "images per second of the training loop",
    "search": "what the driver of a search adds to a trial",
    "criteria": "accuracy after slicing by each criterion",
    "gram_schmidt": "the order of gram_schmidt",
    "latency": "latency that a table predicts, and that is measured",
    "layers": "layers with fewer weights beside dense ones",
    "calibration": "what criteria and repairs cost, in forward passes",
    "trained": "quality of trained models that are reduced without training",
    "tune": "what a search on a trained model brings",
}
NEEDS = {
    "search": ("optuna", "mlflow", "matplotlib", "ray"),
    "tune": ("optuna", "mlflow"),
}  # packages of an extra, before a job is imported


def main(argv: Sequence[str] | None = None) -> int:
    """Run a job and return its exit status: 0, or 2 after a ReductionError."""
    words = list(sys.argv[1:] if argv is None else argv)
    job = next((word for word in words if word in JOBS), None)  # options may stand before it
    if job is None:
        parser = argparse.ArgumentParser(
            prog="mlpreduce bench", description="Time mlpreduce on this machine, beside a peer that does the same job."
        )
        text = "; ".join(f"{name}: {does}" for name, does in JOBS.items())
        parser.add_argument("job", choices=list(JOBS), help=f"{text}; mlpreduce bench JOB --help tells more")
        parser.parse_known_args(words)
        parser.error("no job")  # not reached: argparse has exited
    words.remove(job)
    try:
        require(f"mlpreduce bench {job}", *NEEDS.get(job, ()))
    except ReductionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    status: int = importlib.import_module(f"mlpreduce.bench.{job}").main(words)
    return status
