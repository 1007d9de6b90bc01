"""Transforms by name, and what each declares of itself.

Whether a transform looks at data, draws random numbers, or costs what is known only later hangs on its options. It says so
where it is registered, as functions of its config, so that recipes and searches need not know any by name. A parameter called
`criterion`, `repair` or `seed` brings its own: see `mlpreduce.transforms.steps`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from mlpreduce.errors import ReductionError, call_text, check_name, did_you_mean
from mlpreduce.registry import add_entry_points, origin, remember, taken
from mlpreduce.words.values import Config

__all__ = [
    "Config",
    "Follows",
    "Transform",
    "blaming",
    "check_config",
    "get_transform",
    "is_construction",
    "list_transforms",
    "register",
]

RESERVED = ("include", "exclude", "data", "loss", "example_inputs")

Scope = Literal["all", "chains"]
Preserves = Literal["exact", "at_init", "no"]


@dataclass(frozen=True)
class Follows:
    """An option by which the cost of what is left is known only when scores or weights are.

    Attributes:
        option: the parameter.
        of: what it follows from.
        instead: parameters by which it is known before.
        roughly: whether it is about the same for any of those.
    """

    option: str
    of: Literal["scores", "weights"]
    instead: str
    roughly: bool = False


def _never(config: Config) -> bool:
    return False


def _same(config: Config) -> Config:
    return config


def _known(config: Config) -> Follows | None:
    return None


@dataclass(frozen=True)
class Transform:
    """A registered transform.

    Attributes:
        name: what users write.
        function: `(parts, *, ...) -> edits`, or for construction `(*, ...) -> keyword arguments of timm.create_model`.
        scope: `all` MLPs, or those of `chains` of at least two, without class-attention MLPs.
        construction: whether it acts when the model is built.
        preserves: what becomes of the function of the model: `exact` (none but rounding), `at_init` (the same until it trains,
            with the default options), `no`.
        mergeable: whether `merge` makes a plain model of it, in the classes and names of the architecture.
        looks_at_data: `(config) -> bool`: whether it looks at calibration data, other than by a criterion or a repair.
        without_data: `(config) -> config`: one of about the same cost that does not. It is asked where a criterion or a repair
            looks at data, too, and need not change those.
        without_weights: `(config) -> config`: one of the same cost that does not look at weights, other than by a criterion.
        draws: `(config) -> bool`: whether it draws random numbers by its parameter `seed`, other than by a criterion.
        seeded: `(config, seed) -> config`: the config that draws by that seed unless it names one itself, for transforms whose
            seed is no parameter of that name.
        follows: `(config) -> Follows`, or None where the cost hangs on neither weights nor data.

    A config has the options that were given, and no defaults.
    """

    name: str
    function: Callable[..., Any]
    scope: Scope
    construction: bool
    preserves: Preserves = "no"
    mergeable: bool = True
    looks_at_data: Callable[[Config], bool] = _never
    without_data: Callable[[Config], Config] = _same
    without_weights: Callable[[Config], Config] = _same
    draws: Callable[[Config], bool] = _never
    seeded: Callable[[Config, int], Config] | None = None
    follows: Callable[[Config], Follows | None] = _known

    @cached_property  # a search asks for them at every choice
    def parameters(self) -> dict[str, inspect.Parameter]:
        """Its keyword parameters."""
        parameters = inspect.signature(self.function).parameters
        return {name: p for name, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}

    @property
    def summary(self) -> str:
        """The first line of its docstring."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]


_TRANSFORMS: dict[str, Transform] = {}


def register(
    name: str,
    *,
    scope: Scope = "all",
    construction: bool = False,
    preserves: Preserves = "no",
    mergeable: bool = True,
    looks_at_data: Callable[[Config], bool] = _never,
    without_data: Callable[[Config], Config] = _same,
    without_weights: Callable[[Config], Config] = _same,
    draws: Callable[[Config], bool] = _never,
    seeded: Callable[[Config, int], Config] | None = None,
    follows: Callable[[Config], Follows | None] = _known,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add a transform under `name`. What else it declares is as of `Transform`.

    Packages can also name a transform in the entry-point group `mlpreduce.transforms`.

    Raises:
        ReductionError: the name is no identifier or is taken, or a parameter is reserved, positional or without default.
    """
    check_name("register", name)

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        if name in _TRANSFORMS:
            raise ReductionError(f"register({name!r}): {taken('transform', name)}")
        _check_signature(name, function, construction)
        transform = Transform(
            name,
            function,
            scope,
            construction,
            preserves,
            mergeable,
            looks_at_data,
            without_data,
            without_weights,
            draws,
            seeded,
            follows,
        )
        for key, parameter in transform.parameters.items():
            if key in RESERVED:
                raise ReductionError(
                    f"register({name!r}): parameter {key!r} is reserved; reserved: {', '.join(RESERVED)}"
                )
            if parameter.default is inspect.Parameter.empty:
                raise ReductionError(f"register({name!r}): parameter {key!r} needs a default")
        _TRANSFORMS[name] = transform
        remember("transform", name, function)
        return function

    return decorate


def _check_signature(name: str, function: object, construction: bool) -> None:
    """Whether what is registered can be called as a transform: `(parts, *, keyword parameters)`."""
    if not callable(function):
        raise ReductionError(f"register({name!r}): {function!r} is no function")
    kinds = [parameter.kind for parameter in inspect.signature(function).parameters.values()]
    positional = sum(kind is not inspect.Parameter.KEYWORD_ONLY for kind in kinds)
    wanted = "(*, keyword parameters)" if construction else "(parts, *, keyword parameters)"
    variable = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD} & set(kinds)
    if variable or positional != (0 if construction else 1):
        raise ReductionError(f"register({name!r}): its parameters are {inspect.signature(function)}; write {wanted}")


def _load_entry_points() -> None:
    add_entry_points("transform", lambda: {name: found.function for name, found in _TRANSFORMS.items()}, register)


def get_transform(name: str) -> Transform:
    """The transform of this name.

    Raises:
        ReductionError: there is none; the message has the nearest name.
    """
    _load_entry_points()
    if name not in _TRANSFORMS:
        raise ReductionError(f"unknown transform {name!r}{did_you_mean(str(name), _TRANSFORMS)}")
    return _TRANSFORMS[name]


@contextmanager
def blaming(name: str, what: str = "the transform") -> Iterator[None]:
    """Let what the code of a transform of others raises be told as theirs; what ours raises is a fault of this package.

    Raises:
        ReductionError: it raised something else.
    """
    try:
        yield
    except ReductionError:
        raise
    except Exception as error:  # whatever a transform of others raises
        source = origin("transform", name)
        if source is None or source.kind == "package":
            raise
        raise ReductionError(f"{what}, of {source}, raised {type(error).__name__}: {error}") from error


def list_transforms() -> list[str]:
    """Names of all transforms.

    Example:
        >>> "grouped" in list_transforms()
        True
    """
    _load_entry_points()
    return sorted(_TRANSFORMS)


def is_construction(name: str) -> bool:
    """Whether the transform acts when the model is built, by `create_model`."""
    return get_transform(name).construction


def check_config(name: str, config: Iterable[str]) -> Transform:
    """The transform, after a check of its argument names.

    Raises:
        ReductionError: unknown transform, or an argument that it does not have.
    """
    transform = get_transform(name)
    for key in config:
        if key not in transform.parameters:
            given = call_text(name, config) if isinstance(config, dict) else name
            raise ReductionError(f"{given}: unknown argument {key!r}{did_you_mean(key, transform.parameters)}")
    return transform
