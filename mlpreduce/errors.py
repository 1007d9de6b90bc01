"""The one error of the library, the words it uses, and packages that only some parts need."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import takewhile
from numbers import Integral, Real
from typing import Any

__all__ = [
    "EXTRAS",
    "ReductionError",
    "call_text",
    "check_name",
    "check_number",
    "check_one_of",
    "check_whole",
    "did_you_mean",
    "missing",
    "naming",
    "optional",
    "require",
]

# what is imported -> the extra of pyproject.toml that has its package; a test compares the two
EXTRAS = {
    "datasets": "data",
    "matplotlib": "train",
    "mlflow": "train",
    "onnx": "onnx",
    "onnxscript": "onnx",
    "optuna": "search",
    "psycopg": "postgres",
    "ray": "train",
    "sklearn": "train",
    "sqlalchemy": "search",
    "torch_pruning": "bench",
    "transformers": "bench",
    "webdataset": "data",
}

_LISTED = 40  # names that an error lists where none is near
_LEAST = 2  # letters from which a beginning counts
_NEAR = 0.7  # share of letters that agree, from 0 to 1, in names that could be meant


class ReductionError(ValueError):
    """A request that cannot be carried out.

    The message holds the call as written, the fact with its numbers, and what would work. Whenever it is raised, the
    model is as it was before the call.
    """


@contextmanager
def naming(call: str) -> Iterator[None]:
    """Put a call, as the user wrote it, before the message of what is refused within, unless it begins with it.

    Example:
        >>> with naming("apply(model, 'shallow')"):
        ...     raise ReductionError("nothing would change")
        Traceback (most recent call last):
        mlpreduce.errors.ReductionError: apply(model, 'shallow'): nothing would change
    """
    try:
        yield
    except ReductionError as error:
        if str(error).startswith(call):
            raise
        raise ReductionError(f"{call}: {error}") from error


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """Text to append to an error about an unknown name.

    Names that begin as the unknown one does go first, then those that differ by a slip of the keys. Where none is near, the
    names follow, or how many there are.

    Example:
        >>> did_you_mean("groupped", ["grouped", "shallow"])
        "; did you mean 'grouped'?"
        >>> did_you_mean("vit_tiny", ["tiny_vit_5m_224", "vit_small_patch16_224", "vit_tiny_patch16_224"])
        "; did you mean 'vit_tiny_patch16_224'?"
        >>> did_you_mean("xyz", ["grouped", "shallow"])
        '; known: grouped, shallow'
    """
    options = sorted(map(str, options))
    near = _nearest(name, options)
    if near is not None:
        return f"; did you mean {near!r}?"
    if len(options) > _LISTED:
        return f"; none of {len(options):,} names is near"
    return f"; known: {', '.join(options)}" if options else ""


def _nearest(name: str, options: Sequence[str]) -> str | None:
    """The option that was most likely meant; None where a guess would be silly."""
    wanted = _plain(name)
    if not wanted:
        return None
    begin = [option for option in options if _plain(option).startswith(wanted)]
    if begin and len(wanted) >= _LEAST:
        return _most_typical(wanted, begin)
    found = None
    best = 0.0
    for option in options:
        other = _plain(option)
        alike = difflib.SequenceMatcher(None, other, wanted).ratio()
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(wanted, other, strict=False))) / len(
            wanted
        )
        whole = len(wanted) >= _LEAST and wanted in other.split("_")
        near = alike >= _NEAR or (shared >= 0.5 and alike >= (0.5 if len(wanted) <= 3 else 0.6)) or whole
        if near and alike + shared >= best:  # of l1 and l2, l2 is nearer to l3
            found, best = option, alike + shared
    return found


def _most_typical(begin: str, options: Sequence[str]) -> str:
    """Of names that begin so, the one whose further words most of them have; else the shortest."""
    rests = {option: _plain(option).removeprefix(begin) for option in options}
    words = {option: rest.strip("_").split("_") for option, rest in rests.items() if rest[:1] in ("", "_")}
    counts = Counter(word for rest in words.values() for word in rest)

    def order(option: str) -> tuple[float, int, str]:
        shared = sum(counts[word] for word in words[option]) / len(words[option]) if option in words else 0.0
        return -shared, len(option), option

    return min(options, key=order)


def _plain(name: str) -> str:
    """A name as it counts: whether letters are large, and which sign joins words, is forgotten."""
    return name.strip().lower().replace("-", "_").replace(".", "_").replace("/", "_").replace(" ", "_")


def check_one_of(name: str, value: Any, options: Iterable[str]) -> None:
    """Check that a value is one of the options, whatever its type.

    Raises:
        ReductionError: it is not.
    """
    options = list(options)
    if value not in options:
        raise ReductionError(f"{name} is {value!r}{did_you_mean(str(value), options)}")


def check_name(call: str, name: Any) -> None:
    """Check a name before anything is registered under it: it is also a word on command lines and in TOML.

    Raises:
        ReductionError: it is not a string of letters, digits and `_` that starts with a letter or `_`.

    Example:
        >>> check_name("register", "my_transform")
        >>> check_name("register", "my transform")
        Traceback (most recent call last):
        mlpreduce.errors.ReductionError: register('my transform'): a name is letters, digits and _, such as 'my_transform'
    """
    if not isinstance(name, str) or not name.isidentifier():
        words = re.sub(r"\W+", "_", name).strip("_") if isinstance(name, str) else ""
        better = next((word for word in (words, f"_{words}") if words and word.isidentifier()), "my_name")
        raise ReductionError(f"{call}({name!r}): a name is letters, digits and _, such as {better!r}")


def check_whole(name: str, value: Any, *, least: int = 1) -> None:
    """Check that a value is a whole number from `least`.

    Raises:
        ReductionError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ReductionError(f"{name} is {value!r}; it must be a whole number from {least}")


def check_number(name: str, value: Any, *, least: float = 0.0, most: float = math.inf, above: bool = False) -> None:
    """Check that a value is a finite number from `least`, or above it, to `most`.

    Raises:
        ReductionError: it is not.
    """
    try:
        number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number beyond floating point
        number = False
    if not number or not least <= value <= most or (above and value == least):
        upper = "" if most == math.inf else f" to {most:g}"
        raise ReductionError(
            f"{name} is {value!r}; it must be a number {'above' if above else 'from'} {least:g}{upper}"
        )


def call_text(name: str, config: Mapping[str, Any]) -> str:
    """A call as the user wrote it, for messages.

    Example:
        >>> call_text("grouped", {"group": 5})
        'grouped(group=5)'
    """
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in config.items())})"


def missing(what: str, module: str) -> ReductionError:
    """Make the error for a package that is not installed.

    Args:
        what: what needs it: a call, a command or a setting, as the user wrote it.
        module: full name of the module that was wanted.

    Example:
        >>> print(missing("mlpreduce search", "optuna"))
        mlpreduce search needs optuna, which is not installed: pip install "mlpreduce[search]", or from a checkout pip install -e ".[search]"
    """  # noqa: E501
    package = module.partition(".")[0]
    extra = EXTRAS[package]
    return ReductionError(
        f'{what} needs {package}, which is not installed: pip install "mlpreduce[{extra}]", or from a checkout '
        f'pip install -e ".[{extra}]"'
    )


def optional(what: str, module: str) -> Any:
    """Import a module of a package that only some parts need.

    Args:
        what: what needs it, for the message.
        module: its full name; its package is one of `EXTRAS`.

    Raises:
        ReductionError: the package is not installed.
    """
    require(what, module)
    return importlib.import_module(module)


def require(what: str, *modules: str) -> None:
    """Check that packages are installed, before anything is begun that needs them; none is imported.

    A folder of the package's name without code, such as one of data in the current directory, does not count.

    Args:
        what: what needs them, for the message.
        modules: full names of modules; their packages are among `EXTRAS`.

    Raises:
        ReductionError: one is not installed.
    """
    for module in modules:
        try:
            found = importlib.util.find_spec(module.partition(".")[0])
        except (ModuleNotFoundError, ValueError):  # blocked in sys.modules or by a finder
            found = None
        if found is None or found.origin is None:
            raise missing(what, module)
