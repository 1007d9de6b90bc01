"""Recipes: what their keys are, how they are read, changed and checked. Nothing heavy is imported."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from mlpreduce.data.settings import DataSettings, setting_problems
from mlpreduce.errors import ReductionError, did_you_mean
from mlpreduce.launch import LaunchSettings
from mlpreduce.plugins import Plugin, load_plugins, read_plugin, run_plugins
from mlpreduce.recipe.shelf import find
from mlpreduce.registry import Origin
from mlpreduce.train.settings import ModelSettings, Run, Step, TrainSettings
from mlpreduce.words.complaints import complaint
from mlpreduce.words.marks import Mark, marked
from mlpreduce.words.notation import with_steps
from mlpreduce.words.values import flatten, parse_value

__all__ = ["Recipe", "changed", "differences", "load", "points", "runs", "with_plugins"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")  # of variants and points, whose folders have their names
_SWEPT = ("model", "data", "train", "variants")
_TAKEN = {
    "recipe.json",
    "results.json",
    "report.md",
    "report.html",
    "curves.png",
    "plans.png",
    "mlflow.db",
    "mlartifacts",
}


class Recipe(BaseModel):
    """One experiment: all variants, each trained with all seeds; with `sweep`, at several points."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    name: str  # the file's
    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    train: TrainSettings = TrainSettings()
    launch: LaunchSettings = LaunchSettings()
    seeds: tuple[int, ...] = (42, 123)
    variants: dict[str, tuple[Step, ...]] = {"baseline": ()}  # name -> steps {transform=..., **config}, in order
    plugins: tuple[Plugin, ...] = ()  # files of your own code; in a file, their paths, relative to it
    sweep: dict[str, dict[str, Any]] = {}  # name of a point -> tables that are laid over those above; see `points`


def load(name: str, overrides: Sequence[str] = (), plugins: Sequence[str | Path] = ()) -> Recipe:
    """Read a recipe, change it by `key=value`, run its plug-ins, and check all of it.

    Args:
        name: a name of `list_recipes`, or a path to a .toml.
        overrides: dotted keys and values, such as `train.epochs=2`; values are read as TOML, else as strings.
        plugins: files of your own code besides those that the recipe names, relative to the current directory.

    Raises:
        ReductionError: all that is wrong, one line each.

    Example:
        >>> load("digits", ["train.epochs=20", "seeds=[1]"]).train.epochs
        20
    """
    path = find(name)
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ReductionError(f"recipe {path}: no valid TOML: {error}") from error
    swept, base = list(document.get("sweep", {})), path.parent
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key.strip():
            raise ReductionError(f"{override!r}: no override; write key=value, for instance train.epochs=2")
        table, _, rest = key.strip().partition(".")
        point, within, _ = rest.partition(".")
        if table == "sweep" and within and swept and point not in swept:
            raise ReductionError(
                f"{override!r}: the sweep of {name} has no point {point!r}{did_you_mean(point, swept)}; write a new one as a "
                f"table: sweep.{point}={{...}}"
            )
        _set(document, key.strip(), parse_value(value))
        base = Path() if key.strip() == "plugins" else base
    own = _together(_read_key(document.get("plugins", ()), base), map(read_plugin, plugins))
    return _checked({**document, "plugins": own, "name": path.stem})


def changed(recipe: Recipe, settings: Mapping[str, Any]) -> Recipe:
    """The recipe with other values of some keys.

    Args:
        recipe: is not changed itself.
        settings: values by dotted key, such as `train.lr`. Paths of `plugins` are relative to the current directory.

    Raises:
        ReductionError: all that is wrong, one line each.

    Example:
        >>> changed(load("digits"), {"train.lr": 0.1}).train.lr
        0.1
    """
    if not settings:
        return recipe
    document = recipe.model_dump(mode="json", exclude_unset=True)
    for key, value in settings.items():
        _set(document, key, _read_key(value, Path()) if key == "plugins" else value)
    return _checked({**document, "name": recipe.name})


def _checked(document: dict[str, Any]) -> Recipe:
    recipe = _validated(document)
    run_plugins(recipe.plugins)  # before names are checked
    problems = [f"{point.name}.{problem}" for point in points(recipe).values() for problem in _problems(point)]
    if problems:
        raise ReductionError("\n".join(dict.fromkeys(problems)))
    return recipe


def points(recipe: Recipe) -> dict[str, Recipe]:
    """The recipes that a recipe with a sweep stands for, by the name of the point, which is its folder's too.

    Each is the recipe with the point's tables laid over its own, key by key. A recipe without a sweep is its only point, "".

    Raises:
        ReductionError: a point has what cannot be swept, or is no recipe.

    Example:
        >>> {name: point.model.name for name, point in points(load("scaling")).items()}["s"]
        'vit_small_patch16_224'
    """
    if not recipe.sweep:
        return {"": recipe}
    found = {}
    for name, tables in recipe.sweep.items():
        place = f"{recipe.name}.sweep.{name}"
        if not _is_folder(name):
            raise ReductionError(f"{place}: its name is a folder's too; use letters, digits, '_', '-' and '.'")
        for table, value in tables.items():
            if table not in _SWEPT or not isinstance(value, dict):
                known = did_you_mean(table, _SWEPT)
                raise ReductionError(f"{place}.{table}: a point of a sweep has tables of {', '.join(_SWEPT)}{known}")
        document = _laid_over(recipe.model_dump(mode="json", exclude={"sweep"}, exclude_unset=True), tables)
        found[name] = _validated({**document, "name": f"{recipe.name}/{name}"})
    return found


def runs(recipe: Recipe, output: str | Path) -> list[Run]:
    """All runs of a recipe without a sweep, in order, each in `output/<variant>/seed<seed>`. Paths are absolute."""
    root = Path(output).resolve()
    weights = recipe.model.weights_path  # a worker may run in another directory
    model = recipe.model if weights is None else recipe.model.model_copy(update={"weights": str(weights.resolve())})
    return [
        Run(
            recipe=recipe.name,
            variant=variant,
            steps=steps,
            seed=seed,
            model=model,
            data=recipe.data,
            train=recipe.train,
            workers=recipe.launch.world,
            plugins=recipe.plugins,
            directory=str(root / variant / f"seed{seed}"),
        )
        for variant, steps in recipe.variants.items()
        for seed in recipe.seeds
    ]


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Dotted keys by which two resolved recipes would compute something else; a `Later` one may be missing before."""
    old, new = ({k: v for k, v in flatten(document).items() if k != "plugins"} for document in (before, now))
    defaults = flatten(Recipe(name="").model_dump(mode="json"))
    old = {**{key: defaults[key] for key in marked(Recipe, Mark.LATER) if key in new}, **old}
    swept = [f"sweep.{point}." for point in {**before.get("sweep", {}), **now.get("sweep", {})}]
    free = {f"{place}{key}" for place in ("", *swept) for key in marked(Recipe, Mark.FREE)}
    keys = sorted({*old, *new} - free)
    changes = [f"{key}: was {old.get(key)!r}, is {new.get(key)!r}" for key in keys if old.get(key) != new.get(key)]
    return [*changes, *_plugin_differences(before, now)]


def _set(document: dict[str, Any], key: str, value: Any) -> None:
    """Give a dotted key a value."""
    *tables, last = key.split(".")
    target = document
    for number, table in enumerate(tables):
        target = target.setdefault(table, {})
        if not isinstance(target, dict):
            raise ReductionError(f"{key!r}: {'.'.join(tables[: number + 1])} is no table and has no keys")
    target[last] = value


def _validated(document: dict[str, Any]) -> Recipe:
    """The recipe of a document, whose steps may be text: `grouped(group=4)`.

    Raises:
        ReductionError: all that is wrong, one line each.
    """
    name = document["name"]
    document = with_steps(document, name)
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        wrong = [complaint(item, name, _keys(item["loc"][:-1])) for item in error.errors()]
        raise ReductionError("\n".join(wrong)) from error


def _is_folder(name: str) -> bool:
    """Whether a folder of an output directory can be called so: no file there is."""
    return _NAME.fullmatch(name) is not None and name not in _TAKEN


def _laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    both = [key for key, value in above.items() if isinstance(value, dict) and isinstance(below.get(key), dict)]
    return {**below, **above, **{key: _laid_over(below[key], above[key]) for key in both}}


def _keys(tables: Iterable[Any]) -> list[str]:
    """The keys that a table has; none where it is not one of the recipe's sections."""
    model: Any = Recipe
    for table in tables:
        field = getattr(model, "model_fields", {}).get(table)
        model = None if field is None else field.annotation
    if not hasattr(model, "model_fields"):
        return []
    return [key for key in model.model_fields if model is not Recipe or key != "name"]


def _problems(recipe: Recipe) -> Iterable[str]:
    """What no single key shows."""
    from mlpreduce.train.weights import is_pickle, no_construction, no_pickle
    from mlpreduce.transforms import check_config, is_construction
    from mlpreduce.transforms.steps import check_criterion, follows, needs_data

    if not recipe.seeds or len(set(recipe.seeds)) < len(recipe.seeds):
        yield f"seeds={list(recipe.seeds)}: give at least one seed, each once"
    if min(recipe.seeds, default=0) < 0:
        yield f"seeds={list(recipe.seeds)}: seeds are not negative"
    if not recipe.variants:
        yield "variants: none; give at least `baseline = []`"
    for variant, steps in recipe.variants.items():
        place = f"variants.{variant}"
        if not _is_folder(variant):
            yield f"{place}: a variant's name is a folder's too; use letters, digits, '_', '-' and '.'"
        for number, step in enumerate(steps):
            config = {key: value for key, value in step.items() if key != "transform"}
            if not isinstance(step.get("transform"), str):
                yield f'{place}: step {number} does not name its transform; write "grouped(group=2)"'
                continue
            try:
                check_config(step["transform"], config)
                check_criterion(step)
                late = number > 0 and is_construction(step["transform"])
            except ReductionError as error:
                yield f"{place}: {error}"
                continue
            if recipe.model.weights and is_construction(step["transform"]):
                yield f"{place}: model.weights={recipe.model.weights!r}: {no_construction(step['transform'])}"
            if (late_cost := follows(step)) is not None and late_cost.of == "scores" and not late_cost.roughly:
                given = f"{late_cost.option}={step.get(late_cost.option)!r}"
                yield (
                    f"{place}: what {given} leaves is known only when scores are, and a recipe tells parameters before it "
                    f"trains; give {late_cost.instead}"
                )
            if needs_data(step) and recipe.data.name.startswith("wds/"):
                yield (
                    f"{place}: step {number} looks at training images, which it takes by their number, and data.name="
                    f'{recipe.data.name!r} is a stream; use a criterion of weights such as "l2" without repair, or other data'
                )
            if late:
                yield f"{place}: {step['transform']} acts when the model is built; it must be the first step"
    weights, theirs = recipe.model.weights_path, Path(str(recipe.model.kwargs.get("checkpoint_path") or ""))
    if weights is not None and is_pickle(weights):
        yield f"model.weights={str(weights)!r}: {no_pickle(weights)}"
    if theirs.name and theirs.suffix not in (".safetensors", ".npz", ".npy"):  # all else timm gives to torch.load
        yield f"model.kwargs.checkpoint_path={str(theirs)!r}: {no_pickle(theirs)}"
    if recipe.train.distillation != "none" and not recipe.model.weights:
        yield (
            f"train.distillation={recipe.train.distillation!r}: there is no trained teacher, as model.weights is empty; it is "
            f'the unreduced model with those weights: give model.weights (a path, or "pretrained")'
        )
    if recipe.train.distillation == "features" and not recipe.train.distill_cls + recipe.train.distill_patches:
        yield (
            "train.distill_cls=0, train.distill_patches=0: nothing is left of train.distillation='features'; give one of them "
            "a weight above 0"
        )
    if recipe.train.sam_rho and recipe.train.amp == "float16":
        yield (
            f"train.sam_rho={recipe.train.sam_rho:g}: it takes two gradients for an update, and the scaler of "
            f"train.amp='float16' knows one; use train.amp='bfloat16' or 'none'"
        )
    for key, needs in (
        ("sam_adaptive", "sam_rho"),
        ("sam_sync", "sam_rho"),
        ("ema_warmup", "ema_decay"),
        ("ema_start", "ema_decay"),
    ):
        if getattr(recipe.train, key) and not getattr(recipe.train, needs):
            yield f"train.{key}={str(getattr(recipe.train, key)).lower()}: it does nothing, as train.{needs} is 0"
    if recipe.train.density_weight and recipe.train.compile:
        yield (
            f"train.density_weight={recipe.train.density_weight:g}: activations are watched by hooks, which train.compile=true "
            f"leaves out; use one of both"
        )
    if recipe.train.warmup_epochs >= recipe.train.epochs:
        yield (
            f"train.warmup_epochs={recipe.train.warmup_epochs}: the warm-up is part of train.epochs="
            f"{recipe.train.epochs} and must be shorter"
        )
    try:
        micro_batch = runs(recipe.model_copy(update={"seeds": (0,), "variants": {"any": ()}}), ".")[0].micro_batch
    except ReductionError as error:
        yield str(error)
    else:
        yield from setting_problems(recipe.data, recipe.train, micro_batch=micro_batch, world=recipe.launch.world)


def with_plugins(recipe: Recipe, paths: Sequence[str | Path]) -> Recipe:
    """The recipe with further plug-ins, which are run.

    Args:
        recipe: is not changed itself.
        paths: files, relative to the current directory.

    Raises:
        ReductionError: a file is missing or fails.
    """
    return recipe.model_copy(update={"plugins": _together(recipe.plugins, load_plugins(paths))})


def _together(*groups: Iterable[Plugin]) -> tuple[Plugin, ...]:
    """Plug-ins of several groups in order, each text once."""
    return tuple({plugin.digest: plugin for group in groups for plugin in group}.values())


def _read_key(paths: Any, base: Path) -> tuple[Plugin, ...]:
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


def _plugin_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """How the plug-ins of two resolved recipes differ. Texts are compared; where a file lies does not matter."""
    was, is_now = ({p["digest"]: p["path"] for p in document.get("plugins", ())} for document in (before, now))
    if set(was) == set(is_now):
        return []
    return [f"plugins: was {_files_of(was, is_now)}, is {_files_of(is_now, was)}"]


def _files_of(some: Mapping[str, str], others: Mapping[str, str]) -> str:
    """The files, by digest, that the others lack."""
    found = [str(Origin("plug-in", path, digest)) for digest, path in some.items() if digest not in others]
    return ", ".join(found) or "none"
