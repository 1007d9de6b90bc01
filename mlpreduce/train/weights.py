"""The trained weights that a run starts from: found, checked, loaded before anything is reduced. Nothing is unpickled."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from mlpreduce.building.checkpoint import DESCRIPTION, WEIGHTS, read_saved, read_tensors
from mlpreduce.errors import ReductionError, call_text
from mlpreduce.surgery.ties import full_state
from mlpreduce.train import digests
from mlpreduce.train.runtime import Runtime
from mlpreduce.train.settings import ModelSettings, Run

__all__ = ["inherit_weights", "is_pickle", "load_weights", "locate", "no_construction", "no_pickle", "start_digest"]

_GIVE = (
    'give "pretrained" (timm\'s weights), the folder of a run (runs/NAME/VARIANT/seedN), one written by mlpreduce.save, or a '
    ".safetensors file"
)
_SHOWN = 3  # names of a kind that an error lists


def no_construction(name: str) -> str:
    """Why trained weights and a transform that acts at construction do not go together, for messages."""
    return f"trained weights do not fit the narrower MLPs that {name} builds; slice them with shallow instead"


def is_pickle(path: Path) -> bool:
    """Whether a file has one of the usual endings of pickles."""
    return path.suffix.lower() in (".pth", ".pt", ".bin", ".tar", ".ckpt", ".pkl", ".pickle") and not path.is_dir()


def no_pickle(path: Path) -> str:
    """Why a pickle is refused and what to do, for messages."""
    return (
        f"it would be opened as a pickle, which can run any code; convert it once with safetensors.torch.save_file(state_dict, "
        f"{path.with_suffix('.safetensors').name!r}) where you trust it, and give model.weights that file"
    )


def locate(path: Path) -> Path:
    """The folder written by `mlpreduce.save`, or the .safetensors file, that a path of `model.weights` names.

    Args:
        path: such a folder or file, or the folder of a run, whose best model lies in `model/`.

    Raises:
        ReductionError: it is none of these.
    """
    call = f"model.weights={str(path)!r}"
    if is_pickle(path):
        raise ReductionError(f"{call}: {no_pickle(path)}")
    if not path.exists():
        raise ReductionError(f"{call}: there is no such file or folder; {_GIVE}{_trained_by(path)}")
    if path.is_dir():
        for folder in (path, path / "model"):
            if (folder / DESCRIPTION).is_file():
                return folder
        raise ReductionError(
            f"{call}: the folder has neither {DESCRIPTION} nor model/{DESCRIPTION}, which a run writes after its first epoch; "
            f"{_GIVE}{_trained_by(path)}"
        )
    if path.suffix != ".safetensors":
        raise ReductionError(f"{call}: it is no .safetensors file; {_GIVE}")
    # the weights of a saved model know their reduction only with the description beside them
    return path.parent if path.name == WEIGHTS and (path.parent / DESCRIPTION).is_file() else path


def load_weights(model: nn.Module, settings: ModelSettings, path: Path) -> None:
    """Fill a freshly built, unreduced model with the weights at `path`. Its own dtypes stay.

    Args:
        model: what `settings` describe; it is unchanged after an error.
        settings: what the model is, for messages.
        path: what `locate` takes.

    Raises:
        ReductionError: no such weights, those of a reduced model, or of one with other names or shapes.
    """
    place = locate(path)
    call = f"model.weights={settings.weights!r}"
    if place.is_dir():
        _, parts = read_saved(place, call)
        if plans := [plan for part in parts.values() for plan in part]:
            made = " then ".join(call_text(plan.transform, plan.config) for plan in plans)
            raise ReductionError(
                f"{call}: it holds a model that is reduced already, by {made}, and a run reduces after loading; give the "
                f"folder of the unreduced model, such as the baseline's of the same recipe (runs/NAME/baseline/seedN)"
            )
    given = read_tensors(place / WEIGHTS if place.is_dir() else place, call)
    state = full_state(model)
    if wrong := list(_misfits(given, state)):
        name = call_text(settings.name, settings.kwargs)
        raise ReductionError(
            f"{call}: these are not the weights of {name}: {'; '.join(wrong)}. Give the model.name and model.kwargs "
            f"(num_classes, img_size, ...) that the weights were trained with, or other weights"
        )
    with torch.no_grad():
        for key, tensor in state.items():
            tensor.copy_(given[key])


def inherit_weights(model: nn.Module, path: Path) -> None:
    """Copy the weights of another reduction of the same architecture, as far as they fit.

    Of a tensor of another size, the leading part that both have is copied: the first hidden units, where widths differ. A
    tied tensor takes that of its first use.

    Args:
        model: reduced already; changed in place.
        path: what `locate` takes.

    Raises:
        ReductionError: no such weights, or they have nothing in common with the model.
    """
    place = locate(path)
    call = f"inherit={str(path)!r}"
    theirs = read_tensors(place / WEIGHTS if place.is_dir() else place, call)
    done: set[int] = set()
    with torch.no_grad():
        for name, tensor in full_state(model).items():
            other = theirs.get(name)
            if other is None or id(tensor) in done or other.dim() != tensor.dim():
                continue
            part = tuple(slice(min(ours, given)) for ours, given in zip(tensor.shape, other.shape, strict=True))
            tensor[part] = other[part].to(tensor)
            done.add(id(tensor))
    if not done:
        raise ReductionError(
            f"{call}: none of its {len(theirs)} tensors has a name of this model; it is of another one"
        )


def start_digest(model: nn.Module, run: Run, runtime: Runtime) -> str:
    """The fingerprint of the weights before the reduction. Every worker calls it.

    Raises:
        ReductionError: the workers have read different ones.
    """
    digest = digests.of_tensors(full_state(model))
    every = [digest]
    if runtime.world > 1:
        every = [""] * runtime.world
        dist.all_gather_object(every, digest)
    if len(set(every)) > 1:
        raise ReductionError(
            f"train({run.label}): model.weights={run.model.weights!r} are not the same on all {runtime.world} workers (digests "
            f"{', '.join(every)}); they must lie on storage that all share"
        )
    return digest


def _misfits(given: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> Iterable[str]:
    """How names and shapes differ: one text for each kind of difference."""
    shapes = [
        f"{key} is {tuple(given[key].shape)} there and {tuple(state[key].shape)} here"
        for key in sorted(given.keys() & state.keys())
        if given[key].shape != state[key].shape
    ]
    kinds = {
        "of another shape": shapes,
        "missing": sorted(state.keys() - given.keys()),
        "unknown": sorted(given.keys() - state.keys()),
    }
    for kind, names in kinds.items():
        if names:
            more = ", ..." if len(names) > _SHOWN else ""
            yield f"{len(names)} of {len(state)} tensors {kind} ({', '.join(names[:_SHOWN])}{more})"


def _trained_by(path: Path) -> str:
    """The command that trains what is to lie below runs/NAME, where the path is of that form."""
    *_, name = ["", *(after for before, after in zip(path.parts, path.parts[1:], strict=False) if before == "runs")]
    return f". `python -m mlpreduce.recipe {name}` trains what lies in runs/{name}" if name else ""
