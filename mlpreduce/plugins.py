"""Files of your own code: transforms, criteria, layers and models that a recipe, a search or a command needs.

A plug-in is one Python file that registers names when it is run. It is read once, in the process that starts the work. Its
text then travels with the recipe and with every run, so workers need no copy of the file, also on other machines. Each process
runs a text once. What the file imports must be installed wherever it is run.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlpreduce.errors import ReductionError
from mlpreduce.registry import Origin, forget, origin, origins, registering, remember

__all__ = ["Plugin", "add_option", "load_plugins", "read_plugin", "run_plugins"]


@dataclass(frozen=True)
class Plugin:
    """A file of your own code, as it was read.

    Attributes:
        path: absolute, where it was read.
        source: its text.
        digest: SHA-256 of the file, 64 hexadecimal digits; follows from the text.

    Raises:
        ReductionError: the digest is not that of the text.
    """

    path: str
    source: str
    digest: str = ""

    def __post_init__(self) -> None:
        found = hashlib.sha256(self.source.encode()).hexdigest()
        if self.digest not in ("", found):
            raise ReductionError(
                f"plug-in {self.path}: its text has the SHA-256 {found[:12]}, not {self.digest[:12]} as noted; it was changed"
            )
        object.__setattr__(self, "digest", found)

    def __str__(self) -> str:
        return str(self.origin)

    @property
    def origin(self) -> Origin:
        """What the names that it registers come from."""
        return Origin("plug-in", self.path, self.digest)

    @property
    def module(self) -> str:
        """The name under which it is run as a module."""
        return f"mlpreduce_plugin_{Path(self.path).stem}_{self.digest[:12]}"


_ran: dict[str, Plugin] = {}  # what this process has run, by digest
_texts: dict[str, str] = {}  # the digest of the text that each path had last; two files may have the same text
_exported: dict[str, list[tuple[str, list[str]]]] = {}  # by digest: names that timm added to `__all__` of other modules


def read_plugin(path: str | Path, base: str | Path = ".") -> Plugin:
    """Read a plug-in file without running it.

    Args:
        path: the file, absolute or relative to `base`.
        base: a folder.

    Raises:
        ReductionError: it is missing, a folder, not a .py, or not text in UTF-8.
    """
    try:
        place = (Path(base) / path).resolve()
        place.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass  # said below
    except (OSError, ValueError) as error:  # a name too long, or with a null character
        raise ReductionError(
            f"plug-in {str(path)!r}: no file can be opened by this name ({error}); rename it"
        ) from error
    if place.is_dir() or place.suffix != ".py":
        fact = "it is a folder; name a file in it" if place.is_dir() else "a plug-in must be a .py file"
        raise ReductionError(f"plug-in {str(path)!r}: {fact}")
    if not place.is_file():
        raise ReductionError(f"plug-in {str(path)!r}: there is no such file; looked at {place}")
    try:
        return Plugin(str(place), place.read_bytes().decode("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ReductionError(f"plug-in {place}: it cannot be read as text in UTF-8: {error}") from error


def load_plugins(paths: Sequence[str | Path], base: str | Path = ".") -> tuple[Plugin, ...]:
    """Read plug-in files and run them in this process.

    Args:
        paths: the files, absolute or relative to `base`.
        base: a folder.

    Raises:
        ReductionError: as `read_plugin` and `run_plugins`.
    """
    plugins = [read_plugin(path, base) for path in paths]
    run_plugins(plugins)
    return tuple({plugin.digest: plugin for plugin in reversed(plugins)}.values())[::-1]


def run_plugins(plugins: Iterable[Plugin]) -> None:
    """Run plug-ins that this process has not run yet. A changed text replaces what the same file registered before.

    Raises:
        ReductionError: one of them fails; the message has file, line and reason. Nothing that it registered is left, and
            what the file registered before is still there.
    """
    for plugin in plugins:
        earlier = _ran.get(_texts.get(plugin.path, ""))
        if plugin.digest not in _ran:
            put_back = None if earlier is None else _undo(earlier)
            try:
                _run(plugin)
            except BaseException:
                if put_back is not None:
                    put_back()
                raise
        elif (
            earlier is not None and list(_texts.values()).count(earlier.digest) == 1 and earlier.digest != plugin.digest
        ):
            _undo(earlier)  # the file has the text of another one now, and no file has its former text
        _texts[plugin.path] = plugin.digest


def add_option(parser: argparse.ArgumentParser) -> None:
    """Add `--plugin FILE`, which may be repeated, to a command; the files are its `plugins`."""
    text = "a file of your own transforms, criteria or models, which is run first; may be repeated"
    parser.add_argument("--plugin", dest="plugins", action="append", default=[], metavar="FILE", help=text)


class _Loader(importlib.abc.ExecutionLoader):
    """Gives Python the text of a plug-in; tracebacks show its lines where the file is not."""

    def __init__(self, plugin: Plugin) -> None:
        self._plugin = plugin

    def get_filename(self, fullname: str) -> str:
        return self._plugin.path

    def get_source(self, fullname: str) -> str:
        return importlib.util.decode_source(self._plugin.source.encode())


def _run(plugin: Plugin) -> None:
    from timm.models import _registry

    import mlpreduce.building.registration  # noqa: F401  (before: what a plug-in registers by it is the plug-in's)

    loader = _Loader(plugin)
    spec = importlib.machinery.ModuleSpec(plugin.module, loader, origin=plugin.path)
    spec.has_location = True
    module = importlib.util.module_from_spec(spec)
    before, exports = set(_registry._model_entrypoints), _exports()
    sys.modules[plugin.module] = module
    try:
        with registering(plugin.origin, plugin.module), warnings.catch_warnings():
            warnings.filterwarnings("error", "Overwriting .* in registry")  # timm would replace a model of its own
            try:
                loader.exec_module(module)
            finally:
                models = _registry._model_entrypoints.keys() - before  # `list_models` leaves out deprecated names
                for name in models:
                    if origin("model", name) is None:
                        remember("model", name, _registry._model_entrypoints[name])
                now = _exports()
                grown = [name for name in exports if len(now.get(name, ())) > len(exports[name])]
                added = [(name, [key for key in now[name] if key in models - set(exports[name])]) for name in grown]
                _exported[plugin.digest] = [(name, keys) for name, keys in added if keys]
    except BaseException as error:
        _undo(plugin)
        if isinstance(error, Exception | SystemExit):
            raise ReductionError(_complaint(plugin, error)) from error
        raise
    _ran[plugin.digest] = plugin


def _complaint(plugin: Plugin, error: BaseException) -> str:
    """File, line and reason of what a plug-in raised."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == plugin.path]
    line = error.lineno if isinstance(error, SyntaxError) and error.filename == plugin.path else (lines or [None])[-1]
    reason = f"{type(error).__name__}: {error.msg if isinstance(error, SyntaxError) else error}"
    if isinstance(error, ReductionError):
        reason = str(error)
    elif isinstance(error, UserWarning) and " in registry with " in str(error):
        reason = f"timm has a model of the name {str(error).split()[1]!r} already; choose another name"
    return f"plug-in {plugin.path}{'' if line is None else f', line {line}'}: {reason}"


def _exports() -> dict[str, list[str]]:
    """What each module exports that is imported now."""
    lists = {
        name: vars(module).get("__all__") for name, module in list(sys.modules.items()) if hasattr(module, "__dict__")
    }
    return {name: list(names) if isinstance(names, list) else [] for name, names in lists.items()}


def _undo(plugin: Plugin) -> Callable[[], None]:
    """Take back what a plug-in has registered. The result is a function that puts it all there again."""
    from timm.models import _registry  # timm has no public call that forgets a model

    from mlpreduce import criteria, layers, transforms
    from mlpreduce.building import registration

    kinds: dict[str, dict[str, Any]] = {
        "transform": transforms.registry._TRANSFORMS,
        "criterion": criteria.registry._CRITERIA,
        "layer": layers.LAYERS,
    }
    ours: list[dict[Any, Any]] = [*kinds.values(), origins(), vars(registration), registration.default_cfgs]
    timms: list[dict[Any, Any]] = [
        *(_registry._model_entrypoints, _registry._model_to_module, _registry._model_default_cfgs),
        *(_registry._model_pretrained_cfgs, _registry._model_with_tags, _registry._deprecated_models),
    ]
    tables = [*ours, *timms, sys.modules, _ran, _exported]
    before = [dict(table) for table in tables]
    weights = set(_registry._model_has_pretrained)
    modules = {name: set(names) for name, names in _registry._module_to_models.items()}
    deprecated = {name: dict(names) for name, names in _registry._module_to_deprecated_models.items()}
    names = forget(plugin.origin)
    models = set(names.pop("model", ()))
    for kind, found in names.items():
        for name in found:
            kinds[kind].pop(name, None)
    for name in models:
        if _registry._model_entrypoints.pop(name).__module__ == registration.__name__:
            registration.forget_model(name)
        _registry._clear_model_entries(name)
    exported = _exported.pop(plugin.digest, [])
    for module, added in exported:
        _export(module, added, there=False)
    sys.modules.pop(plugin.module, None)
    _ran.pop(plugin.digest, None)
    removed = [{key: was[key] for key in was.keys() - table.keys()} for was, table in zip(before, tables, strict=True)]
    weights -= _registry._model_has_pretrained

    def put_back() -> None:
        for table, entries in zip(tables, removed, strict=True):
            table.update(entries)
        _registry._model_has_pretrained.update(weights)
        for module, names in modules.items():
            if found := names & models:
                _registry._module_to_models[module].update(found)
        for module, mapped in deprecated.items():
            if found := models & mapped.keys():
                _registry._module_to_deprecated_models[module].update({name: mapped[name] for name in found})
        for module, added in exported:
            _export(module, added, there=True)

    return put_back


def _export(module: str, added: list[str], *, there: bool) -> None:
    """Add names to the `__all__` of a module that is still imported, or take them away."""
    if module not in sys.modules:
        return
    place = vars(sys.modules[module])
    names = place.setdefault("__all__", [])
    names[:] = [name for name in names if name not in added] + (added if there else [])
    if not names:  # timm made the list
        del place["__all__"]
