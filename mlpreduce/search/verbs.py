"""What is done with a study that exists: show it, export a trial as a recipe, compare studies at equal cost."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import optuna

from mlpreduce.addresses import hidden
from mlpreduce.console import Column, Grid, screen, width, wrapped
from mlpreduce.errors import ReductionError, did_you_mean
from mlpreduce.recipe import Recipe, differences
from mlpreduce.search.answer import describe, history, reference_values
from mlpreduce.search.export import as_recipe, copy_plugins, originals
from mlpreduce.search.front import hypervolume, losses
from mlpreduce.search.storage import read_only

__all__ = ["Comparison", "compare", "main", "open_study"]


@dataclass(frozen=True)
class Comparison:
    """Two studies of one recipe and its objectives, at equal cost.

    Attributes:
        spent: what the one that spent less has spent, in epochs of the baseline; trials that ended later are left out.
        volumes: hypervolume of each.
        trials: complete trials of each, within what was spent.
        best: highest top-1 of each, percent.
    """

    spent: float
    volumes: tuple[float, float]
    trials: tuple[int, int]
    best: tuple[float, float]

    @property
    def ratio(self) -> float:
        """Hypervolume of the first over that of the second."""
        return self.volumes[0] / self.volumes[1] if self.volumes[1] else float("inf")


def main(arguments: Sequence[str]) -> int:
    """Run `mlpreduce search show|export|compare` and return 0.

    Raises:
        ReductionError: no such study or trial, or studies that cannot be compared.
    """
    options = _parser().parse_args(arguments)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    options.run(options)
    return 0


def open_study(name: str, storage: str | None = None) -> optuna.Study:
    """A study, to look at.

    Args:
        name: its output directory, or with `storage` its name there.
        storage: URL of Optuna's storage.

    Raises:
        ReductionError: there is none.
    """
    url = storage or f"sqlite:///{Path(name).resolve()}/optuna.db"
    place = read_only(url)
    names = optuna.get_all_study_names(place)
    if storage is None and len(names) != 1:
        raise ReductionError(
            f"search {name}: {len(names)} studies lie there; give --storage {hidden(url)} and a name: {', '.join(names)}"
        )
    wanted = name if storage is not None else names[0]
    if wanted not in names:
        raise ReductionError(f"search {name}: the storage has no such study{did_you_mean(name, names)}")
    return optuna.load_study(study_name=wanted, storage=place)


def compare(one: Sequence[optuna.Study], other: Sequence[optuna.Study]) -> list[Comparison]:
    """Compare studies pair by pair by the hypervolume of their fronts, at what the one that spent less has spent.

    The reference point is the baseline's cost and the lowest top-1 of any trial, the same for all pairs. Only values of the
    first seed are taken, as all trials have it.

    Raises:
        ReductionError: unlike numbers of studies, or studies of unlike recipes, seeds or objectives.
    """
    if len(one) != len(other) or not one:
        raise ReductionError(f"search compare: {len(one)} studies against {len(other)}; give as many of each, in pairs")
    every = [*one, *other]
    first = every[0].user_attrs
    for study in every[1:]:
        wrong = differences(first["recipe"], study.user_attrs["recipe"])
        for key in ("objectives", "seeds"):
            ours, theirs = first["settings"][key], study.user_attrs["settings"][key]
            wrong += (
                [f"{key}: {ours} and {theirs}"]
                if ours[:1] != theirs[:1] or (key == "objectives" and ours != theirs)
                else []
            )
        if wrong:
            raise ReductionError(
                f"search compare: {every[0].study_name} and {study.study_name} differ:\n  " + "\n  ".join(wrong)
            )
    objectives = first["settings"]["objectives"]
    top = objectives.index("top1")
    trials = [loss for study in every for _, loss in history(study)]
    if not trials:
        raise ReductionError("search compare: no trial is complete")
    worst = list(losses(reference_values(every[0]), objectives))
    worst[top] = max(loss[top] for loss in trials)
    found = []
    for pair in zip(one, other, strict=True):
        paths = [history(study) for study in pair]
        cost = min(max((total for total, _ in path), default=0.0) for path in paths)
        kept = [[loss for total, loss in path if total <= cost] for path in paths]
        volumes = [hypervolume(points, worst) for points in kept]
        best = [max((-loss[top] for loss in points), default=0.0) for points in kept]
        found.append(Comparison(cost, (volumes[0], volumes[1]), (len(kept[0]), len(kept[1])), (best[0], best[1])))
    return found


def _show(options: argparse.Namespace) -> None:
    from mlpreduce.report import check_page, keep
    from mlpreduce.report.search import console_table, kept, kept_text

    if options.page is not None:
        check_page(options.page)
    document = describe(open_study(options.study, options.storage))
    if options.page is not None:
        keep(kept(document), options.page, kept_text)
    if options.json:
        print(json.dumps(document, indent=1))
        return
    console = screen()
    console.print(console_table(document))
    for verdict in document["verdicts"]:
        console.print(wrapped(verdict, console.width), highlight=False, markup=False, soft_wrap=True)


def _export(options: argparse.Namespace) -> None:
    study = open_study(options.study, options.storage)
    document = describe(study)
    names = {str(point["number"]): point for point in document["points"] if point["number"] is not None}
    names |= {point["name"]: point for point in document["points"]}
    if options.trial not in names:
        known = ", ".join(name for name in names if name.isdigit()) or "none"
        raise ReductionError(
            f"search export {options.study} {options.trial}: no such trial was trained; there are {known}"
        )
    recipe = Recipe.model_validate(study.user_attrs["recipe"])
    path = options.output or "FILE.toml"
    files = originals(recipe) if options.output is None else copy_plugins(recipe, Path(path).parent)
    text = as_recipe(names[options.trial], document, recipe, path, files)
    if options.output is None:
        print(text, end="")
        return
    Path(options.output).write_text(text, encoding="utf-8")
    print(f"{options.output}: run it by python -m mlpreduce.recipe {options.output}")


def _compare(options: argparse.Namespace) -> None:
    sides = [[open_study(name, options.storage) for name in names.split(",")] for names in (options.one, options.other)]
    found = compare(*sides)
    pairs = zip(options.one.split(","), options.other.split(","), strict=True)
    headers = (
        "studies",
        "epochs of the baseline spent by each",
        "complete trials",
        "best top-1 %",
        "hypervolume",
        "ratio",
    )
    rows = [
        (
            f"{one}, {other}",
            f"{pair.spent:.1f}",
            f"{pair.trials[0]}, {pair.trials[1]}",
            f"{pair.best[0]:.2f}, {pair.best[1]:.2f}",
            f"{pair.volumes[0]:.6g}, {pair.volumes[1]:.6g}",
            f"{pair.ratio:.3f}",
        )
        for (one, other), pair in zip(pairs, found, strict=True)
    ]
    if (columns := width()) is None:  # a file gets markdown
        lines = [f"| {' | '.join(cells)} |" for cells in (headers, *rows)]
        lines.insert(1, "|---|---|---|---|---|---|")
    else:
        cells = zip(*rows, strict=True)
        table = [Column(h, list(c), left=n == 0) for n, (h, c) in enumerate(zip(headers, cells, strict=True))]
        lines = [Grid("", table).text(columns)]
    ratios = [pair.ratio for pair in found]
    if len(ratios) > 1:
        spread = f"{min(ratios):.3f} to {max(ratios):.3f} over {len(ratios)} pairs"
        lines.append(f"\nratio: mean {fmean(ratios):.3f}, {spread}")
    print("\n".join(lines))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mlpreduce search", description="What is done with a study that exists.")
    verbs = parser.add_subparsers(required=True)
    show = verbs.add_parser("show", help="its front, beside the baseline and the paper's points")
    show.add_argument("study", help="output directory of a study, or with --storage its name")
    show.add_argument("--json", action="store_true", help="all that is known, as JSON")
    show.add_argument(
        "--page", type=Path, metavar="FILE.md", help="keep it beside this page as JSON, and its table in it"
    )
    show.set_defaults(run=_show)
    export = verbs.add_parser("export", help="a trial as a recipe that runs as it is")
    export.add_argument("study", help="output directory of a study, or with --storage its name")
    export.add_argument("trial", help="number of the trial")
    export.add_argument("--output", metavar="FILE", help="where to; default: the terminal")
    export.set_defaults(run=_export)
    versus = verbs.add_parser(
        "compare", help="hypervolume at equal cost, of two studies or of pairs: A1,A2,A3 B1,B2,B3"
    )
    versus.add_argument("one", help="output directories, with commas")
    versus.add_argument("other", help="as many")
    versus.set_defaults(run=_compare)
    for verb in (show, export, versus):
        verb.add_argument("--storage", metavar="URL", help="of Optuna's storage; default: in the output directory")
    return parser
