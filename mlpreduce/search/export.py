"""Points of a study as recipes that run as they are."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

import tomli_w

from mlpreduce.errors import ReductionError
from mlpreduce.plugins import Plugin
from mlpreduce.recipe import Recipe, changed
from mlpreduce.records import StudyDocument, StudyPoint

__all__ = ["as_recipe", "as_toml", "copy_plugins", "originals", "write_best"]


def write_best(document: StudyDocument, recipe: Recipe, folder: Path) -> list[Path]:
    """Write the front of a study as `trial-N.toml`, each with the baseline beside it.

    Trials that were of the front before go; files of other names stay.

    Args:
        document: what `describe` gives.
        recipe: that of the study.
        folder: where to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = copy_plugins(recipe, folder)
    paths = []
    for point in document.points:
        path = folder / f"{point.name.replace(' ', '-')}.toml"
        if point.kind == "trial" and not point.front:
            path.unlink(missing_ok=True)
        elif point.front:
            path.write_text(as_recipe(point, document, recipe, str(path), files), encoding="utf-8")
            paths.append(path)
    return paths


def copy_plugins(recipe: Recipe, folder: Path) -> list[str]:
    """Write the plug-ins of a recipe into a folder, and return their names there. A file of another text is not replaced."""
    names = []
    for plugin in recipe.plugins:
        stem = f"{Path(plugin.path).stem}-{plugin.digest[:8]}"
        numbered = (f"{stem}-{number}.py" for number in count(2))
        name = next(
            name
            for name in chain([f"{stem}.py"], numbered)
            if not (folder / name).exists() or _has(folder / name, plugin)
        )
        (folder / name).write_bytes(plugin.source.encode())
        names.append(name)
    return names


def originals(recipe: Recipe) -> list[str]:
    """The absolute paths of the plug-ins of a recipe.

    Raises:
        ReductionError: one is no longer there, or its text has changed.
    """
    for plugin in recipe.plugins:
        if not _has(Path(plugin.path), plugin):
            raise ReductionError(
                f"search export: the plug-in {plugin} is no longer there with the text that was trained; add --output "
                f"FILE, and that text is written beside the recipe"
            )
    return [plugin.path for plugin in recipe.plugins]


def _has(path: Path, plugin: Plugin) -> bool:
    return path.is_file() and path.read_bytes() == plugin.source.encode()


def as_recipe(
    point: StudyPoint, document: StudyDocument, recipe: Recipe, path: str, plugins: Sequence[str] = ()
) -> str:
    """A recipe that trains a point, and the baseline beside it, with all seeds of the study. No plug-in is run.

    Args:
        point: of the document.
        document: of the study.
        recipe: that of the study.
        path: where the text will lie, for its header.
        plugins: where the plug-ins of the recipe are, relative to that place.
    """
    seeds = document.settings["seeds"]
    bare = recipe.model_copy(
        update={"plugins": (), "variants": {"baseline": ()}}
    )  # so that no name of theirs is looked up
    found = changed(bare, point.settings).model_dump(mode="json", exclude_defaults=True)
    variant = re.sub("[^A-Za-z0-9_.-]+", "-", point.name).strip("-.")  # a folder's name: a reference may be a call
    variants = {"baseline": [], variant: list(point.steps)}
    tops = ", ".join(f"{run.top1:.2f} (seed {run.seed})" for run in point.runs)
    what = "a point of its front" if point.front else "ended early" if point.state == "pruned" else "not of its front"
    heads = [
        f"{point.name} of the study {document.study}: {what} ({document.space}, {document.recipe}).",
        f"Command:  python -m mlpreduce.recipe {path}",
        f"Cost:     {2 * len(seeds)} runs of {recipe.train.epochs} epochs.",
        f"Expected: {point.cost['params']:,} parameters, {point.cost['macs']:,} MACs; top-1 % in the study: {tops}.",
    ]
    if document.settings["inherit"] != "none":
        heads.append(
            f"Note:     in the study it started from trained weights (inherit={document.settings['inherit']}); here not."
        )
    body = {key: value for key, value in found.items() if key not in ("name", "sweep", "variants", "seeds")}
    own = {"plugins": list(plugins)} if plugins else {}
    return (
        "".join(f"# {line}\n" for line in heads) + "\n" + as_toml({"seeds": seeds, **own, **body, "variants": variants})
    )


def as_toml(document: Mapping[str, Any]) -> str:
    """Write a document as TOML. TOML has no null: keys whose value is None are left out.

    Raises:
        ReductionError: a list holds None, or a value is of a kind that TOML lacks.

    Example:
        >>> print(as_toml({"name": "mine", "train": {"lr": 0.001, "warmup": None, "kwargs": {"depth": 4}}}), end="")
        name = "mine"
        <BLANKLINE>
        [train]
        lr = 0.001
        <BLANKLINE>
        [train.kwargs]
        depth = 4
    """
    try:
        text: str = tomli_w.dumps(_without_none(document))
    except TypeError as error:
        raise ReductionError(
            f"this is no TOML: {error} TOML has strings, numbers, booleans, dates, lists and tables"
        ) from error
    return text


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, (list, tuple)):
        if any(entry is None for entry in value):
            raise ReductionError(f"{value!r} holds None, which TOML lacks; leave it out or write a number or a word")
        return [_without_none(entry) for entry in value]
    return value
