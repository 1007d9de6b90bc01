"""Records of one or several output directories, put together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mlpreduce.errors import ReductionError
from mlpreduce.records import Record, finished, read
from mlpreduce.train.settings import ModelSettings, Run
from mlpreduce.words.marks import Mark, marked
from mlpreduce.words.values import flatten

__all__ = ["differing", "gather", "gather_points"]


def gather(*directories: str | Path) -> list[Record]:
    """The records of all finished runs in some output directories, in their order; a directory named twice counts once.

    Each knows its `output`: the name of its directory, or its path where two have that name.

    Raises:
        ReductionError: a directory has no finished run, two have one of the same variant and seed, or a variant is not the
            same in all.
    """
    if not directories:
        raise ReductionError("report: no run is named; give the output directory of a recipe")
    places: dict[Path, str] = {}
    for directory in directories:
        places.setdefault(Path(directory).resolve(), str(directory))
    for place, path in places.items():
        if points := gather_points(place):
            raise ReductionError(
                f"report: {path} holds a sweep, which is reported alone; name it alone, or its points: "
                f"{', '.join(str(Path(path) / point) for point in points)}"
            )
    names = [place.name for place in places]
    records: list[Record] = []
    paths: dict[str, str] = {}
    for place, path in places.items():
        label = place.name if names.count(place.name) == 1 else path
        paths[label] = path
        here = [record.model_copy(update={"output": label}) for record in finished(path)]
        for record in here:
            for other in records:
                if other.variant == record.variant:
                    _check_pair(other, record, paths)
        records += here
    return records


def gather_points(directory: str | Path) -> dict[str, list[Record]]:
    """The records of the finished runs at each point of a sweep that was begun, in the order of their beginning.

    The `output` of each is the name of its point. A directory that holds no sweep has no points.
    """
    places = {path.parents[2] for path in Path(directory).glob("*/*/seed*/record.json")}
    every = {place.name: read(place) for place in places}
    recipes = {record.name for found in every.values() for record in found}
    (name, *others) = {recipe.rpartition("/")[0] for recipe in recipes} or {""}
    if others or not name or recipes != {f"{name}/{point}" for point in every}:
        return {}  # what lies there are outputs of other recipes
    points = {point: [r for r in found if r.status == "finished"] for point, found in every.items()}
    begun = {point: (min(record.started for record in found), point) for point, found in every.items()}
    return {
        name: [record.model_copy(update={"output": name}) for record in points[name]]
        for name in sorted(points, key=begun.__getitem__)
    }


def _check_pair(one: Record, two: Record, paths: dict[str, str]) -> None:
    """Refuse two records of a variant from different directories that cannot be runs of one row."""
    variant, seed = two.key
    here, there = paths[one.output], paths[two.output]
    if one.seed == seed:
        raise ReductionError(
            f"report: variant {variant!r} with seed {seed} lies in {here} and in {there}; name one of the two, or move the "
            f"folder {variant}/seed{seed} out of the other"
        )
    changed = [f"{key}={old!r} in {here}, {new!r} in {there}" for key, old, new in _differences(one, two)]
    if changed:
        raise ReductionError(
            f"report: variant {variant!r} is not the same in both: {'; '.join(changed)}; make a report of each"
        )


def differing(records: Sequence[Record]) -> list[str]:
    """Settings of model, data and training by which runs of different directories differ, in words."""
    first = records[0]
    lines = {}
    for record in records:
        for key, old, new in _differences(first, record):
            if key != "steps" and first.output != record.output:
                lines[key, record.output] = f"{key}: {old!r} in {first.output}, {new!r} in {record.output}"
    return list(lines.values())


def _differences(one: Record, two: Record) -> Iterator[tuple[str, Any, Any]]:
    """What two runs compute differently, but for their seeds; a key that another version does not have is no difference."""
    old, new = _settings(one), _settings(two)
    for key in sorted(old.keys() & new.keys()):
        if old[key] != new[key]:
            yield key, old[key], new[key]


def _settings(record: Record) -> dict[str, Any]:
    recipe = record.recipe
    flat = flatten({section: recipe[section] for section in ("data", "train") if section in recipe})
    known = {key: value for key, value in flat.items() if key not in marked(Run, Mark.FREE)}
    # records of earlier versions have no key for weights: they began at random
    model = {**ModelSettings().model_dump(mode="json"), **recipe["model"]} if "model" in recipe else None
    return {"steps": list(record.steps), "model": model, **known}
