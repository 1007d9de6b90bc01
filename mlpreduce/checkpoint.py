"""Save and load reduced models: safetensors and JSON, no pickle.

A directory holds `model.safetensors`, in which a tied tensor lies once and the metadata names its aliases, and
`mlpreduce.json`: how the model is built and which plans gave it its structure.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from mlpreduce.construction import NOT_RECORDED
from mlpreduce.edits import Plan
from mlpreduce.errors import ReductionError
from mlpreduce.graph import refuse_wrapped, structural_copy
from mlpreduce.reduction import broken_ties, history, remember
from mlpreduce.registry import origin
from mlpreduce.surgery import carry_out
from mlpreduce.ties import full_state

__all__ = ["DESCRIPTION", "WEIGHTS", "load", "read_saved", "read_tensors", "save"]

VERSION = 1
WEIGHTS, DESCRIPTION = "model.safetensors", "mlpreduce.json"


def save(model: nn.Module, directory: str | Path, build: dict[str, Any] | Literal[False] | None = None) -> None:
    """Write a model, reduced or not, to a directory.

    Args:
        model: the model.
        directory: where to; it is created, and an earlier model in it is replaced once the new one is written.
        build: `{"name": timm architecture, "kwargs": {...}}` if the library cannot tell how the model was built;
            False to record nothing, `load` then needs `model=`. It can tell for models of `mlpreduce.create_model`
            and for timm models that a build from their architecture and settings reproduces. Of models from
            elsewhere nothing is recorded.

    Raises:
        ReductionError: the model has no weights, or is a timm model that a build does not reproduce.
    """
    call = f"save({type(model).__name__}, {str(directory)!r})"
    refuse_wrapped(model, call)
    for share in broken_ties(model):
        raise ReductionError(
            f"{call}: {share.target} is no longer tied to {share.source}, as its history tells; it was replaced or copied "
            f"after apply: tie it again by assigning the module, or mlpreduce.untie(model) before changing it"
        )
    description: dict[str, Any] = {
        "format": "mlpreduce",
        "version": VERSION,
        "class": type(model).__name__,
        "build": _how_built(model, build, call),
        "plans": [json.loads(made.to_json()) for made in history(model)],
    }
    source = origin("model", description["build"]["name"]) if description["build"] else None
    if source is not None and source.kind == "plug-in":
        description["plugin"] = f"{Path(source.name).name} (sha256 {source.digest[:12]})"
    tensors, aliases = _unique_tensors(model, call)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    weights = directory / f"{WEIGHTS}.new"
    metadata = {"format": "pt", "mlpreduce": str(VERSION), "aliases": json.dumps(aliases)}
    save_file(tensors, weights, metadata=metadata)
    description["sha256"] = _digest(weights)
    text = directory / f"{DESCRIPTION}.new"
    text.write_text(json.dumps(description, indent=1), encoding="utf-8")
    os.replace(weights, directory / WEIGHTS)
    os.replace(text, directory / DESCRIPTION)


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
        model = _build(description["build"], call, plugin=description.get("plugin"))
    elif history(model):
        raise ReductionError(f"{call}: the given model is reduced already; give one as it was built")
    refuse_wrapped(model, call)
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise ReductionError(f"{call}: the given model is on the meta device; move it with .to_empty(device=...) first")
    rehearsal = structural_copy(model, device="meta")
    try:
        for made in plans:
            carry_out(rehearsal, made, weights=False)
        with safe_open(directory / WEIGHTS, framework="pt") as file:
            _check_fit(rehearsal, file, call)
            for made in plans:
                carry_out(model, made, weights=False)
                remember(model, made)
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


def read_saved(directory: Path, call: str) -> tuple[dict[str, Any], list[Plan]]:
    """The description of a saved model and its plans, after a check of its weights."""
    description = _read_description(directory, call)
    if _digest(directory / WEIGHTS) != description["sha256"]:
        raise ReductionError(f"{call}: {WEIGHTS} is damaged or from another save: its SHA-256 is not the recorded one")
    return description, [Plan.from_json(json.dumps(entry)) for entry in description["plans"]]


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
            raise ReductionError(f"{call}: there is no {name}; it is no directory written by mlpreduce.save")
    try:
        description = json.loads((directory / DESCRIPTION).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ReductionError(f"{call}: {DESCRIPTION} is damaged: {error}") from error
    if not isinstance(description, dict) or description.get("format") != "mlpreduce":
        raise ReductionError(f"{call}: {DESCRIPTION} is foreign: its format is not 'mlpreduce'")
    if description.get("version") != VERSION:
        raise ReductionError(f"{call}: version {description.get('version')!r}; this mlpreduce reads version {VERSION}")
    missing = [key for key in ("class", "build", "plans", "sha256") if key not in description]
    if missing or not isinstance(description["plans"], list):
        raise ReductionError(f"{call}: {DESCRIPTION} is damaged: no {', '.join(missing) or 'list of plans'}")
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


def _how_built(model: nn.Module, build: dict[str, Any] | Literal[False] | None, call: str) -> dict[str, Any] | None:
    """A checked build of the model, or None if none is to be recorded."""
    if build is False:
        return None
    if build is not None:
        candidates = [_checked(build, call)]
    elif "architecture" in (getattr(model, "pretrained_cfg", None) or {}) or hasattr(model, "mlpreduce_build"):
        candidates = _guesses(model)
    else:
        return None
    reasons = []
    for candidate in candidates:
        try:
            json.dumps(candidate)
        except TypeError as error:
            raise ReductionError(
                f"{call}: how it was built is not JSON ({error}); save with build=False and load with model="
            ) from error
        reason = _difference(model, candidate, call)
        if reason is None:
            return candidate
        reasons.append(reason)
    raise ReductionError(
        f"{call}: a build of {candidates[-1]['name']} with {candidates[-1]['kwargs']} is another model: {reasons[-1]}; "
        f'give build={{"name": ..., "kwargs": {{...}}}}, or build=False and load with model='
    )


def _guesses(model: nn.Module) -> list[dict[str, Any]]:
    """Builds of a timm model: the recorded one, or its architecture, then with more and more that is read off it."""
    start: Any = getattr(model, "mlpreduce_build", None)
    start = start or {"name": model.pretrained_cfg["architecture"], "kwargs": {}}  # type: ignore[index]
    settings: dict[str, Any] = dict(start["kwargs"])
    guesses: list[dict[str, Any]] = [start]
    if isinstance(classes := getattr(model, "num_classes", None), int):
        settings["num_classes"] = classes
    convolution = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if convolution is not None and convolution.in_channels != 3:
        settings["in_chans"] = convolution.in_channels
    guesses.append({"name": start["name"], "kwargs": dict(settings)})
    if isinstance(pool := getattr(model, "global_pool", None), str):
        settings["global_pool"] = pool
    guesses.append({"name": start["name"], "kwargs": dict(settings)})
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if isinstance(size, tuple):
        settings["img_size"] = list(size)
    guesses.append({"name": start["name"], "kwargs": settings})
    return guesses


def _difference(model: nn.Module, build: dict[str, Any], call: str) -> str | None:
    """What tells a build, after the plans, from the model; None if nothing does."""
    try:
        built = _build(build, call, device="meta")
        for made in history(model):
            carry_out(built, made, weights=False)
    except (ReductionError, TypeError, RuntimeError, ValueError, AssertionError) as error:
        return str(error)
    theirs = {name: tuple(t.shape) for name, t in built.state_dict().items()}
    ours = {name: tuple(t.shape) for name, t in full_state(model).items()}
    if theirs != ours:
        name = next(iter(sorted(theirs.items() ^ ours.items())))[0]
        return f"{name} is {theirs.get(name, 'missing')} there and {ours.get(name, 'missing')} here"
    others = dict(model.named_modules(remove_duplicate=False))
    for path, module in built.named_modules(remove_duplicate=False):
        other = others.get(path)
        if other is None or type(other) is not type(module):
            return f"{path} is a {type(module).__name__} there and a {type(other).__name__} here"
        here, there = _settings(other), _settings(module)
        for name in sorted(here.keys() & there.keys()):
            if here[name] != there[name]:
                return f"{path}.{name} is {there[name]!r} there and {here[name]!r} here".lstrip(".")
    return None


_MODES = {"training", "grad_checkpointing"}  # how a model is run, not what it computes


def _settings(module: nn.Module) -> dict[str, Any]:
    """The plain attributes of a module: what its forward may depend on beside its tensors."""
    values = {name: value for name, value in vars(module).items() if not name.startswith(("_", "mlpreduce"))}
    return {name: value for name, value in values.items() if name not in _MODES and _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(entry) for entry in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _checked(build: Any, call: str) -> dict[str, Any]:
    if (
        not isinstance(build, dict)
        or not isinstance(build.get("name"), str)
        or not isinstance(build.get("kwargs"), dict)
    ):
        raise ReductionError(f'{call}: build is {build!r}; it must be {{"name": architecture, "kwargs": {{...}}}}')
    return build


def _build(build: Any, call: str, device: str = "cpu", plugin: object = None) -> nn.Module:
    if build is None:
        raise ReductionError(f"{call}: how the model was built is not recorded; build it and give it as model=")
    build = _checked(build, call)
    import timm

    from mlpreduce.models import is_model

    if not is_model(build["name"]):
        own = f": it is of the plug-in {plugin}; run that first by mlpreduce.plugins.load_plugins" if plugin else ""
        raise ReductionError(f"{call}: timm {timm.__version__} has no architecture {build['name']!r}{own}")
    forbidden = [key for key in build["kwargs"] if key in ("pretrained", *NOT_RECORDED)]
    if forbidden:
        raise ReductionError(
            f"{call}: the build has {', '.join(forbidden)}, which would read other files; it is refused"
        )
    with torch.random.fork_rng(devices=[]), torch.device(device):
        try:
            model: nn.Module = timm.create_model(build["name"], pretrained=False, **build["kwargs"])
        except (TypeError, ValueError, RuntimeError, AssertionError) as error:
            raise ReductionError(f"{call}: timm cannot build {build}: {error}") from error
    return model
