"""What is done with a study that exists: show it, export a trial as a recipe, compare studies at equal cost."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import optuna

from mlpreduce.errors import ReductionError, did_you_mean
from mlpreduce.recipe import Recipe
from mlpreduce.search.answer import describe
from mlpreduce.search.comparison import compared, comparison_text
from mlpreduce.search.export import as_recipe, copy_plugins, originals
from mlpreduce.search.study.storage import read_only
from mlpreduce.words.addresses import hidden
from mlpreduce.words.console import screen, width, wrapped

__all__ = ["main", "open_study"]


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


def _show(options: argparse.Namespace) -> None:
    from mlpreduce.report import check_page, keep
    from mlpreduce.report.search import console_table, kept, kept_text

    if options.page is not None:
        check_page(options.page)
    document = describe(open_study(options.study, options.storage))
    if options.page is not None:
        keep(kept(document), options.page, kept_text)
    if options.json:
        print(json.dumps(document.as_json(), indent=1))
        return
    console = screen()
    console.print(console_table(document))
    for verdict in document.verdicts:
        console.print(wrapped(verdict, console.width), highlight=False, markup=False, soft_wrap=True)


def _export(options: argparse.Namespace) -> None:
    study = open_study(options.study, options.storage)
    document = describe(study)
    names = {str(point.number): point for point in document.points if point.number is not None}
    names |= {point.name: point for point in document.points}
    if options.trial not in names:
        known = ", ".join(name for name in names if name.isdigit()) or "none"
        raise ReductionError(
            f"search export {options.study} {options.trial}: no such trial was trained; there are {known}"
        )
    if "scored" in study.user_attrs:
        raise ReductionError(
            f"search export {options.study} {options.trial}: its points were scored and not trained, so none is a recipe; "
            f"apply the plans of `mlpreduce.tune`, or save the best by mlpreduce tune --save DIR"
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
    from mlpreduce.report import check_page, keep

    if options.page is not None:
        check_page(options.page)
    names = [side.split(",") for side in (options.one, *options.others)]
    document = compared(names, [[open_study(name, options.storage) for name in side] for side in names])
    if options.page is not None:
        keep(document, options.page, comparison_text)
    print(comparison_text(document, width()))


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
        "compare", help="hypervolume at equal cost, of two studies or of pairs: A1,A2,A3 B1,B2,B3 [C1,C2,C3]"
    )
    versus.add_argument("one", help="output directories, with commas")
    versus.add_argument("others", nargs="+", metavar="other", help="as many; each side is compared with the first")
    versus.add_argument(
        "--page", type=Path, metavar="FILE.md", help="keep it beside this page as JSON, and its tables in it"
    )
    versus.set_defaults(run=_compare)
    for verb in (show, export, versus):
        verb.add_argument("--storage", metavar="URL", help="of Optuna's storage; default: in the output directory")
    return parser
