"""Save and load reduced models: safetensors and JSON, no pickle.

A directory holds `model.safetensors`, in which a tied tensor lies once and the metadata names its aliases, and
`mlpreduce.json`: how the model is built and which plans gave it its structure. Version 2 also has the plans of the parts
that were reduced on their own, by path: of a detector with a reduced backbone, those of the backbone.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from mlpreduce.edits import Plan
from mlpreduce.errors import ReductionError
from mlpreduce.files import replacing
from mlpreduce.graph import below, module_at, refuse_wrapped, structural_copy, unwrapped
from mlpreduce.reduction.applying import broken_ties, remember
from mlpreduce.reduction.builds import built, how_built
from mlpreduce.registry import origin
from mlpreduce.surgery.operation import carry_out
from mlpreduce.surgery.ties import distinct_parts, full_state, plans_of, reduced_parts, tangled_parts

__all__ = ["DESCRIPTION", "WEIGHTS", "load", "read_saved", "read_tensors", "save"]

VERSIONS = (1, 2)  # the second where parts have plans of their own
WEIGHTS, DESCRIPTION = "model.safetensors", "mlpreduce.json"


def save(model: nn.Module, directory: str | Path, build: dict[str, Any] | Literal[False] | None = None) -> None:
    """Write a model, reduced or not, to a directory.

    A model that holds a reduced one, such as a detector with a reduced backbone, is saved as a whole; `load` then needs the
    whole as it was built, with the unreduced part.

    Args:
        model: the model.
        directory: where to; it is created, and an earlier model in it is replaced once the new one is written.
        build: `{"name": timm architecture, "kwargs": {...}}` if the library cannot tell how the model was built;
            False to record nothing, `load` then needs `model=`. It can tell for models of `mlpreduce.create_model`
            and for timm models that a build from their architecture and settings reproduces. Of models from
            elsewhere nothing is recorded.

    Raises:
        ReductionError: the model is wrapped or has no weights, a tie is gone, a timm model is one that a build does not
            reproduce, the model and a part of it were both reduced, in an order that is not known, or the directory
            cannot be written to.
    """
    call = f"save({type(model).__name__}, {str(directory)!r})"
    if isinstance(model, nn.Module) and unwrapped(model) is not model:
        inside = next(iter(model._modules))
        raise ReductionError(
            f"{call}: the model is wrapped in {type(model).__name__}; save what is inside, mlpreduce.save(model.{inside}, ...)"
        )
    refuse_wrapped(model, call)
    plans = {
        path: [json.loads(made.to_json()) for made in plans_of(part)] for path, part in _parts(model, call).items()
    }
    tensors, aliases = _unique_tensors(model, call)
    whole = plans.pop("", [])
    version = VERSIONS[bool(plans)]
    description: dict[str, Any] = {
        "format": "mlpreduce",
        "version": version,
        "class": type(model).__name__,
        "build": how_built(model, build, call),
        "plans": whole,
        **({"parts": plans} if plans else {}),
    }
    source = origin("model", description["build"]["name"]) if description["build"] else None
    if source is not None and source.kind == "plug-in":
        description["plugin"] = f"{Path(source.name).name} (sha256 {source.digest[:12]})"
    metadata = {"format": "pt", "mlpreduce": str(version), "aliases": json.dumps(aliases)}
    try:
        with replacing(Path(directory), WEIGHTS, DESCRIPTION) as (weights, text):
            save_file(tensors, weights, metadata=metadata)
            description["sha256"] = _digest(weights)
            text.write_text(json.dumps(description, indent=1), encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise ReductionError(f"{call}: cannot write there: {error}; give a directory that can be written to") from error


def load(directory: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Read a model written by `save`: build it, tie and slice it, load its weights.

    Args:
        directory: where it lies.
        model: a freshly built model to use instead of building one; it is changed in place. It stays as it is when
            its structure does not fit.

    Returns:
        The model on the CPU (or where `model` is), with the dtypes it was saved with and its history.

    Raises:
        ReductionError: no such directory, damaged files, another version, or a model that the plans do not fit.
    """
    directory = Path(directory)
    call = f"load({str(directory)!r})"
    description, plans = read_saved(directory, call)
    if model is None:
        model = built(description["build"], call, plugin=description.get("plugin"))
    else:
        _check_given(model, call)
    rehearsal = structural_copy(model, device="meta")
    try:
        for path, part in plans.items():
            inside = _part(rehearsal, path, model, call)
            for made in part:
                carry_out(inside, made, weights=False)
        with safe_open(directory / WEIGHTS, framework="pt") as file:
            _check_fit(rehearsal, file, call)
            for path, part in plans.items():
                inside = _part(model, path, model, call)
                for made in part:
                    carry_out(inside, made, weights=False)
                    remember(inside, made)
            _fill(model, file)
    except SafetensorError as error:
        raise ReductionError(f"{call}: {WEIGHTS} is damaged: {error}") from error
    except ReductionError as error:
        if str(error).startswith(call):
            raise
        raise ReductionError(f"{call}: the saved plans do not fit {type(model).__name__}: {error}") from error
    if description["build"] is not None:
        model.mlpreduce_build = description["build"]
    return model


def _check_given(model: nn.Module, call: str) -> None:
    """Refuse a given model whose structure or tensors cannot be changed, before anything is."""
    refuse_wrapped(model, call)
    if reduced := reduced_parts(model):
        which = f"{next(iter(reduced))} of the given model" if "" not in reduced else "the given model"
        raise ReductionError(f"{call}: {which} is reduced already; give one as it was built")
    tensors = [value for value in model.state_dict(keep_vars=True).values() if isinstance(value, torch.Tensor)]
    if any(tensor.is_meta for tensor in tensors):
        raise ReductionError(f"{call}: the given model is on the meta device; move it with .to_empty(device=...) first")
    if any(tensor.is_inference() for tensor in tensors) and not torch.is_inference_mode_enabled():
        raise ReductionError(
            f"{call}: the given model was built under torch.inference_mode(), so its tensors cannot change; build it outside"
        )


def _parts(model: nn.Module, call: str) -> dict[str, nn.Module]:
    """The reduced modules of a model by path, each once, the model itself as ""; nothing about them is doubtful."""
    for outer, inner in tangled_parts(model):
        raise ReductionError(
            f"{call}: {outer or 'the model'} was reduced as a whole, and its {inner} also on its own, in an order that is not "
            f"known; build it again and apply all steps either to the whole model or to {inner}"
        )
    parts = distinct_parts(model)
    for path, part in reduced_parts(model).items():
        for share in broken_ties(part):
            raise ReductionError(
                f"{call}: {below(path, share.target)} is no longer tied to {below(path, share.source)}, as its history "
                f"tells; it was replaced or copied after apply: tie it again by assigning the module, or "
                f"mlpreduce.untie(model) before changing it"
            )
    return parts


def _part(tree: nn.Module, path: str, model: nn.Module, call: str) -> nn.Module:
    part = module_at(tree, path)
    if part is None:
        raise ReductionError(
            f"{call}: {type(model).__name__} has no module {path!r}, which was reduced on its own when the model was saved; "
            f"give a model that is built as that was"
        )
    return part


def read_saved(directory: Path, call: str) -> tuple[dict[str, Any], dict[str, list[Plan]]]:
    """The description of a saved model, and plans by the path of what they reduce, after a check of its weights.

    The path of the model itself is "".
    """
    description = _read_description(directory, call)
    if _digest(directory / WEIGHTS) != description["sha256"]:
        raise ReductionError(f"{call}: {WEIGHTS} is damaged or from another save: its SHA-256 is not the recorded one")
    entries = {"": description["plans"], **description.get("parts", {})}
    try:
        return description, {path: [Plan.from_json(json.dumps(e)) for e in plans] for path, plans in entries.items()}
    except ReductionError as error:
        raise ReductionError(f"{call}: a plan in {DESCRIPTION} cannot be read: {error}") from error


def read_tensors(path: Path, call: str) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file; one that `save` wrote as tied stands under each of its names."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ReductionError(f"{call}: {path.name} cannot be read as safetensors: {error}") from error
    aliases = json.loads(metadata["aliases"]) if "mlpreduce" in metadata else {}
    return tensors | {alias: tensors[name] for alias, name in aliases.items()}


def _unique_tensors(model: nn.Module, call: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The state dict with every tensor once, and the names of the others."""
    tensors: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    names: dict[int, str] = {}
    storages: set[int] = set()
    for name, value in full_state(model).items():
        if not isinstance(value, torch.Tensor):
            raise ReductionError(f"{call}: {name} is a {type(value).__name__}, not a tensor; it cannot be saved")
        if value.is_meta:
            raise ReductionError(f"{call}: {name} is on the meta device and has no values to save")
        if id(value) in names:
            aliases[name] = names[id(value)]
            continue
        names[id(value)] = name
        tensor = value.detach().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if storage in storages and tensor.numel() else tensor
        storages.add(storage)
    return tensors, aliases


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_description(directory: Path, call: str) -> dict[str, Any]:
    for name in (DESCRIPTION, WEIGHTS):
        if not (directory / name).is_file():
            raise ReductionError(f"{call}: there is no {name}; mlpreduce.save did not write this directory")
    try:
        description = json.loads((directory / DESCRIPTION).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ReductionError(f"{call}: {DESCRIPTION} is damaged: {error}") from error
    if not isinstance(description, dict) or description.get("format") != "mlpreduce":
        raise ReductionError(f"{call}: {DESCRIPTION} is foreign: its format is not 'mlpreduce'")
    if description.get("version") not in VERSIONS:
        raise ReductionError(
            f"{call}: version {description.get('version')!r}; this mlpreduce reads versions {' and '.join(map(str, VERSIONS))}"
        )
    missing = [key for key in ("class", "build", "plans", "sha256") if key not in description]
    if missing or not isinstance(description["plans"], list):
        raise ReductionError(f"{call}: {DESCRIPTION} is damaged: no {', '.join(missing) or 'list of plans'}")
    parts = description.get("parts", {})
    if not isinstance(parts, dict) or not all(path and isinstance(plans, list) for path, plans in parts.items()):
        raise ReductionError(
            f"{call}: {DESCRIPTION} is damaged: its parts are {type(parts).__name__}, no lists of plans"
        )
    return description


def _check_fit(rehearsal: nn.Module, file: Any, call: str) -> None:
    """Whether the file has just the tensors of the model, in its shapes and ties."""
    state = rehearsal.state_dict(keep_vars=True)
    try:
        aliases: dict[str, str] = json.loads((file.metadata() or {})["aliases"])
    except (KeyError, json.JSONDecodeError) as error:
        raise ReductionError(f"{call}: {WEIGHTS} is foreign: it has no alias map") from error
    stored = set(file.keys())
    missing, unknown = sorted(state.keys() - stored - aliases.keys()), sorted((stored | aliases.keys()) - state.keys())
    if missing or unknown:
        names = f"{len(missing)} tensors are missing ({missing[:1]}), {len(unknown)} unknown ({unknown[:1]})"
        raise ReductionError(f"{call}: the weights are those of another model: {names}")
    for name in stored:
        shape = tuple(file.get_slice(name).get_shape())
        if shape != tuple(state[name].shape):
            raise ReductionError(
                f"{call}: {name} has shape {shape} in the file, {tuple(state[name].shape)} in the model"
            )
    for alias, name in aliases.items():
        if state[alias] is not state.get(name):
            raise ReductionError(f"{call}: {alias} is tied to {name} in the file, but not in the model")
    first: dict[int, str] = {}
    for name in sorted(stored):
        other = first.setdefault(id(state[name]), name)
        if other != name:
            raise ReductionError(f"{call}: {name} is tied to {other} in the model, but not in the file")


def _fill(model: nn.Module, file: Any) -> None:
    state = full_state(model)
    for name in file.keys():  # noqa: SIM118  (not a dict)
        value = file.get_tensor(name)
        target = state[name]
        if target.dtype != value.dtype:
            target.data = target.data.to(value.dtype)
        with torch.no_grad():
            target.copy_(value)
