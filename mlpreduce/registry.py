"""Where a registered name comes from, and the names that other packages bring by entry points.

Transforms, criteria, layers and models are registered by name. A worker in another process knows the names of this package,
those of packages with entry points, and those of the plug-in files that it is sent. It does not know what was registered in
the process that started it; `Origin` tells these apart.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Any, Literal

from mlpreduce.errors import ReductionError

__all__ = [
    "GROUPS",
    "Origin",
    "add_entry_points",
    "forget",
    "origin",
    "origin_of",
    "origins",
    "registering",
    "remember",
    "taken",
]

GROUPS = {"transform": "mlpreduce.transforms", "criterion": "mlpreduce.criteria"}  # the entry points of other packages


@dataclass(frozen=True)
class Origin:
    """Where a name was registered.

    Attributes:
        kind: by this `package`, by a package with `entry points`, by a `plug-in` file, or by other code of this `process`.
        name: the module, or the path of the plug-in file.
        digest: SHA-256 of the plug-in file.
    """

    kind: Literal["package", "entry points", "plug-in", "process"]
    name: str
    digest: str = ""

    def __str__(self) -> str:
        return f"{self.name} (sha256 {self.digest[:12]})" if self.digest else self.name


@dataclass(frozen=True)
class _Running:
    """A plug-in file that is being run, and the modules that were there before."""

    origin: Origin
    module: str
    before: frozenset[str]


_running: ContextVar[_Running | None] = ContextVar("running", default=None)
_origins: dict[tuple[str, str], Origin] = {}
_added: set[str] = set()  # groups whose entry points were all registered


@contextmanager
def registering(origin: Origin, module: str) -> Iterator[None]:
    """Attribute to `origin` what is registered inside the block by `module`, or through modules that were already imported."""
    token = _running.set(_Running(origin, module, frozenset(sys.modules)))
    try:
        yield
    finally:
        _running.reset(token)


def origin_of(thing: object) -> Origin:
    """Where a function or class comes from that is being registered now."""
    module = str(getattr(thing, "__module__", None) or "")
    running = _running.get()
    if running is not None and (module == running.module or module in running.before or module not in sys.modules):
        return running.origin
    root = module.partition(".")[0]
    if root == __package__:
        return Origin("package", module)
    return Origin("entry points" if root in _packages() else "process", module)


def remember(kind: str, name: str, thing: object) -> None:
    """Note where a name comes from."""
    _origins[kind, name] = origin_of(thing)


def origin(kind: str, name: str) -> Origin | None:
    """Where a name comes from; None where nobody has noted it."""
    return _origins.get((kind, name))


def origins() -> dict[tuple[str, str], Origin]:
    """All notes, by kind and name: the table itself."""
    return _origins


def taken(kind: str, name: str) -> str:
    """Say that a name is taken, and by what; for messages."""
    noted = _origins.get((kind, name))
    return f"there is a {kind} of this name already{'' if noted is None else f', of {noted}'}; choose another name"


def forget(origin: Origin) -> dict[str, list[str]]:
    """Drop the notes of an origin, and return the names it had, by kind."""
    found: dict[str, list[str]] = {}
    for kind, name in [key for key, value in _origins.items() if value == origin]:
        del _origins[kind, name]
        found.setdefault(kind, []).append(name)
    return found


def add_entry_points(
    kind: str, known: Callable[[], Mapping[str, object]], register: Callable[[str], Callable[[Any], Any]]
) -> None:
    """Register what other packages name in an entry-point group. What one of them raises is raised at each call.

    Args:
        kind: a key of `GROUPS`.
        known: gives the functions that are registered, by name; importing a package may register them.
        register: registers a plain function under the name of its entry point.

    Raises:
        ReductionError: a package cannot be loaded; the message names it and the reason.
    """
    if kind in _added:
        return
    for entry in entry_points(group=GROUPS[kind]):
        token = _running.set(None)  # a plug-in file may be the first to ask for names; these are not its own
        before = set(_origins)
        try:
            function = entry.load()
            names = [name for name, other in known().items() if other is function]
            if not inspect.ismodule(function) and not names:
                register(entry.name)(function)
            # whoever loads the entry point gets these names, also those of functions that another package defines
            for key in (_origins.keys() - before) | {(kind, name) for name in names}:
                if key in _origins and _origins[key].kind == "process":
                    _origins[key] = Origin("entry points", entry.module)
        except Exception as error:  # whatever a foreign module raises
            package = entry.dist.name if entry.dist is not None else entry.value
            reason = str(error) if isinstance(error, ReductionError) else f"{type(error).__name__}: {error}"
            raise ReductionError(
                f"the {kind} {entry.name!r} of the package {package} cannot be loaded: {reason}; repair or uninstall it"
            ) from error
        finally:
            _running.reset(token)
    _added.add(kind)


@cache
def _packages() -> frozenset[str]:
    """Top-level names of the packages that have entry points."""
    return frozenset(
        entry.value.partition(":")[0].partition(".")[0] for g in GROUPS.values() for entry in entry_points(group=g)
    )
