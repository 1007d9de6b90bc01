"""Checkpoints of a training run: written whole or not at all, checked before they are believed, read without pickle.

    <run>/checkpoints/<epoch>/
      state.pt        weights, moving average, optimizer, schedule, scaler, all past epochs
      rng<rank>.pt    random states of one worker
      manifest.json   what it belongs to, size and SHA-256 of each file, and its own SHA-256

A checkpoint is written beside its place and renamed into it, so a run that is killed meanwhile goes on from the one
before; so does one whose last files are damaged, and says so.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError

from mlpreduce.errors import ReductionError
from mlpreduce.train.runtime import Runtime
from mlpreduce.train.settings import Run

__all__ = [
    "Saved",
    "all_do",
    "checkpoints",
    "read_checkpoint",
    "restore_rng",
    "rng_state",
    "save_checkpoint",
    "seed_everything",
]

FORMAT = 2


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was read.

    Attributes:
        epoch: whole epochs behind it.
        world: number of workers that wrote it.
        plans: the reductions of its model, as JSON.
        state: state dictionaries, numbers and JSON-like values, on the CPU.
        notes: what is to be told, such as a damaged one that was passed over.
        folder: where it lies.
    """

    epoch: int
    world: int
    plans: list[str]
    state: dict[str, Any]
    notes: tuple[str, ...]
    folder: Path


def seed_everything(seed: int) -> None:
    """Seed torch (all devices), numpy (timm's mixup draws from it) and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def checkpoints(directory: str | Path) -> dict[int, Path]:
    """The checkpoints of a run by epoch, the last first; none of them checked."""
    found = {int(path.name): path for path in (Path(directory) / "checkpoints").glob("*") if path.name.isdigit()}
    return dict(sorted(found.items(), reverse=True))


def save_checkpoint(
    run: Run, runtime: Runtime, state: dict[str, Any], *, epoch: int, best: int, plans: list[str]
) -> None:
    """Write the state of a run after `epoch` epochs. Every worker calls it; worker 0 writes `state`.

    The last `train.keep_checkpoints` and the best one stay, older ones are deleted.

    Args:
        run: gives the directory and the identity of the run.
        runtime: tells the worker, their number, and whose random state is kept besides the CPU's.
        state: state dictionaries, numbers and JSON-like values only.
        epoch: epochs that are finished.
        best: the epoch with the best top-1 so far.
        plans: the reductions of the model, as JSON.

    Raises:
        ReductionError: it cannot be written, here or by another worker; what was written before is kept.
    """
    folder = Path(run.directory) / "checkpoints" / str(epoch)
    draft = folder.with_name(f".{epoch}.partial")

    def prepare() -> None:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)

    def finish() -> None:
        _write(state, draft / "state.pt")
        files = {path.name: _fingerprint(path) for path in sorted(draft.iterdir())}
        identity = {"config_hash": run.config_hash, "world": runtime.world, "epoch": epoch, "plans": plans}
        _write_manifest(draft, {"format": FORMAT, **identity, "files": files})
        shutil.rmtree(folder, ignore_errors=True)  # of a worker group that was lost after it
        os.replace(draft, folder)
        kept = {*list(checkpoints(run.directory))[: run.train.keep_checkpoints], best}
        for number, old in checkpoints(run.directory).items():
            if number not in kept:
                shutil.rmtree(old)

    first = runtime.rank == 0
    doing = f"write the checkpoint after epoch {epoch}"
    all_do(run, runtime, doing, prepare if first else None)
    all_do(run, runtime, doing, lambda: _write(rng_state(runtime.device), draft / f"rng{runtime.rank}.pt"))
    all_do(run, runtime, doing, finish if first else None)


def read_checkpoint(run: Run, runtime: Runtime) -> Saved | None:
    """The last whole checkpoint of a run; None where there is none. Every worker calls it; worker 0 checks the files.

    Raises:
        ReductionError: it was written with other settings, or by another version of the library, or all are damaged.
    """
    chosen: list[Any] = [None, [], None]  # epoch, notes, what is wrong
    if runtime.rank == 0:
        try:
            chosen = [*_choose(run), None]
        except ReductionError as error:
            chosen[2] = str(error)
    if runtime.world > 1:
        dist.broadcast_object_list(chosen)
    epoch, notes, wrong = chosen
    if wrong is not None:
        raise ReductionError(wrong)
    if epoch is None:
        return None
    folder = Path(run.directory) / "checkpoints" / str(epoch)
    if not folder.is_dir():
        raise ReductionError(
            f"{folder}: worker 0 sees it, this one does not; --output must lie on storage that all share"
        )
    manifest = _read_manifest(folder)
    state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    return Saved(epoch, manifest["world"], manifest["plans"], state, tuple(notes), folder)


def restore_rng(saved: Saved, run: Run, runtime: Runtime) -> None:
    """Set the random states of this worker as they were; another number of workers begins with new ones."""
    if saved.world != runtime.world:
        seed_everything(run.seed + 1_000_003 * saved.epoch + runtime.rank)
        return
    state = torch.load(saved.folder / f"rng{runtime.rank}.pt", map_location="cpu", weights_only=True)
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and runtime.device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], runtime.device)
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


def _choose(run: Run) -> tuple[int | None, list[str]]:
    """The last checkpoint that is whole, and what is to be told of later ones."""
    notes: list[str] = []
    for epoch, folder in checkpoints(run.directory).items():
        problem = _problem(folder)
        if problem is None:
            _check_identity(folder, run)
            told = [f"checkpoint {note}; going on after epoch {epoch}" for note in notes]
            return epoch, told
        notes.append(f"{folder}: {problem}")
    if notes:
        raise ReductionError(
            f"resume({run.label}): no checkpoint is whole ({'; '.join(notes)}); delete {run.directory} to train it anew"
        )
    return None, []


def _problem(folder: Path) -> str | None:
    """What is wrong with the files of a checkpoint, if anything."""
    try:
        for name, known in _read_manifest(folder)["files"].items():
            found = _fingerprint(folder / name)
            if found["bytes"] != known["bytes"]:
                return f"{name} has {found['bytes']:,} of {known['bytes']:,} bytes"
            if found != known:
                return f"{name} is damaged: its SHA-256 is not that of the manifest"
    except OSError as error:
        return f"{Path(str(error.filename)).name} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # no JSON, or another document
        return f"manifest.json is damaged ({type(error).__name__}: {error})"
    return None


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    text = json.dumps({**manifest, "sha256": _seal(manifest)}, indent=1)
    (folder / "manifest.json").write_text(text, encoding="utf-8")


def _read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises:
        ValueError: it is not what was written.
    """
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    if manifest.pop("sha256") != _seal(manifest):
        raise ValueError("its SHA-256 is another")
    return manifest


def _seal(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _check_identity(folder: Path, run: Run) -> None:
    manifest = _read_manifest(folder)
    if manifest["format"] != FORMAT:
        raise ReductionError(
            f"{folder}: checkpoint format {manifest['format']}, this version reads {FORMAT}; start in another --output"
        )
    if manifest["config_hash"] != run.config_hash:
        raise ReductionError(
            f"{folder}: written with other settings (hash {manifest['config_hash']}, now {run.config_hash}); give the "
            f"settings of that run, or start in another --output"
        )


def all_do(run: Run, runtime: Runtime, doing: str, action: Callable[[], object] | None) -> None:
    """Let this worker write something, and stop all workers if one of them cannot, before they wait for each other.

    Args:
        run: names the directory.
        runtime: tells the worker and their number.
        doing: what it is, in words.
        action: what this worker does, if anything.

    Raises:
        ReductionError: the system refused, here or there.
    """
    wrong: str | None = None
    try:
        if action is not None:
            action()
    except OSError as error:
        wrong = f"{error.strerror or error} ({error.filename or run.directory})"
    except SafetensorError as error:
        wrong = str(error)
    except ReductionError as error:
        if not isinstance(error.__cause__, OSError | SafetensorError):
            raise
        wrong = str(error.__cause__)
    everyone: list[str | None] = [wrong]
    if runtime.world > 1:
        everyone = [None] * runtime.world
        dist.all_gather_object(everyone, wrong)
    for rank, told in enumerate(everyone):
        if told is not None:
            kept = ", ".join(str(number) for number in checkpoints(run.directory)) or "none"
            raise ReductionError(
                f"train({run.label}): worker {rank} cannot {doing}: {told}. Checkpoints that are kept: {kept}. Make room "
                f"there, or give another --output; --resume goes on"
            )


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def rng_state(device: torch.device) -> dict[str, Any]:
    """The random states of this process: torch's, on the CPU and on its GPU, numpy's and Python's; tensors and plain values."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # type: ignore[misc]
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": [str(name), np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "python": [version, list(internal), gauss],
    }


class _Watched:
    """A file that remembers what the system said: torch.save tells a full disk as an error of its own format."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("wb")
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _write(state: dict[str, Any], path: Path) -> None:
    watched = _Watched(path)
    with watched.file:
        try:
            torch.save(state, watched)  # type: ignore[arg-type]
            watched.file.flush()
        except RuntimeError:
            if watched.error is not None:
                raise watched.error from None
            raise
        os.fsync(watched.file.fileno())
