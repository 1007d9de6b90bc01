"""The key `plugins` of a recipe: your own code, which is read when the recipe is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlpreduce.errors import ReductionError
from mlpreduce.plugins import Plugin, load_plugins, read_plugin
from mlpreduce.registry import Origin

if TYPE_CHECKING:
    from mlpreduce.recipe.schema import Recipe

__all__ = ["plugin_differences", "read_key", "together", "with_plugins"]


def with_plugins(recipe: Recipe, paths: Sequence[str | Path]) -> Recipe:
    """The recipe with further plug-ins, which are run.

    Args:
        recipe: is not changed itself.
        paths: files, relative to the current directory.

    Raises:
        ReductionError: a file is missing or fails.
    """
    return recipe.model_copy(update={"plugins": together(recipe.plugins, load_plugins(paths))})


def together(*groups: Iterable[Plugin]) -> tuple[Plugin, ...]:
    """Plug-ins of several groups in order, each text once."""
    return tuple({plugin.digest: plugin for group in groups for plugin in group}.values())


def read_key(paths: Any, base: Path) -> tuple[Plugin, ...]:
    """Read the files that the key `plugins` of a recipe names.

    Args:
        paths: the value of the key, as written.
        base: the folder that paths are relative to.

    Raises:
        ReductionError: it is not a list of paths, or a file cannot be read.
    """
    if not isinstance(paths, (list, tuple)) or not all(isinstance(path, str) for path in paths):
        raise ReductionError(f'plugins={paths!r}: it must be a list of files, such as plugins = ["mine.py"]')
    return tuple(read_plugin(path, base) for path in paths)


def plugin_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """How the plug-ins of two resolved recipes differ. Texts are compared; where a file lies does not matter."""
    was, is_now = ({p["digest"]: p["path"] for p in document.get("plugins", ())} for document in (before, now))
    if set(was) == set(is_now):
        return []
    return [f"plugins: was {_text(was, is_now)}, is {_text(is_now, was)}"]


def _text(some: Mapping[str, str], others: Mapping[str, str]) -> str:
    """The files, by digest, that the others lack."""
    found = [str(Origin("plug-in", path, digest)) for digest, path in some.items() if digest not in others]
    return ", ".join(found) or "none"
