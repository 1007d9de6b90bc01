"""Packages that only some parts need, and the extra that installs each."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from mlpreduce.errors import ReductionError

__all__ = ["EXTRAS", "missing", "optional", "require"]

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
