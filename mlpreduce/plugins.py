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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlpreduce.errors import ReductionError
from mlpreduce.registry import Origin, forget, origin, registering, remember

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


def read_plugin(path: str | Path, base: str | Path = ".") -> Plugin:
    """Read a plug-in file without running it.

    Args:
        path: the file, absolute or relative to `base`.
        base: a folder.

    Raises:
        ReductionError: it is missing, a folder, not a .py, or not text in UTF-8.
    """
    place = (Path(base) / path).resolve()
    if place.is_dir() or place.suffix != ".py":
        fact = "it is a folder; name a file in it" if place.is_dir() else "the name of a Python file ends in .py"
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
    plugins = tuple({plugin.digest: plugin for plugin in (read_plugin(path, base) for path in paths)}.values())
    run_plugins(plugins)
    return plugins


def run_plugins(plugins: Iterable[Plugin]) -> None:
    """Run plug-ins that this process has not run yet. A changed text replaces what the same file registered before.

    Raises:
        ReductionError: one of them fails; the message has file, line and reason. Nothing that it registered is left.
    """
    for plugin in plugins:
        if plugin.digest in _ran:
            continue
        earlier = [other for other in _ran.values() if other.path == plugin.path]
        for other in earlier:
            _undo(other)
        try:
            _run(plugin)
        except BaseException:
            for other in earlier:
                _run(other)
            raise


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
    import timm

    import mlpreduce.registration  # noqa: F401  (before: what a plug-in registers by it is the plug-in's)

    loader = _Loader(plugin)
    spec = importlib.machinery.ModuleSpec(plugin.module, loader, origin=plugin.path)
    spec.has_location = True
    module = importlib.util.module_from_spec(spec)
    before = set(timm.list_models())
    sys.modules[plugin.module] = module
    try:
        with registering(plugin.origin, plugin.module), warnings.catch_warnings():
            warnings.filterwarnings("error", "Overwriting .* in registry")  # timm would replace a model of its own
            try:
                loader.exec_module(module)
            finally:
                for name in set(timm.list_models()) - before:
                    if origin("model", name) is None:
                        remember("model", name, timm.model_entrypoint(name))
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


def _undo(plugin: Plugin) -> None:
    """Take back what a plug-in has registered."""
    import timm
    from timm.models import _registry

    from mlpreduce import criteria, layers, registration, transforms

    tables: dict[str, dict[str, Any]] = {
        "transform": transforms._TRANSFORMS,
        "criterion": criteria.registry._CRITERIA,
        "layer": layers.LAYERS,
    }
    for kind, names in forget(plugin.origin).items():
        for name in names:
            if kind in tables:
                tables[kind].pop(name, None)
                continue
            if timm.model_entrypoint(name).__module__ == registration.__name__:
                registration.forget_model(name)
            _registry._clear_model_entries(name)  # timm has no public call for it
            del _registry._model_entrypoints[name]
    sys.modules.pop(plugin.module, None)
    _ran.pop(plugin.digest, None)
