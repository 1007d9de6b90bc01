"""The commands `python -m mlpreduce.search SPACE ...` and `mlpreduce search`, whose verbs are show, export and compare."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from mlpreduce.errors import require
from mlpreduce.plugins import add_option
from mlpreduce.words.addresses import hidden
from mlpreduce.words.console import Column, Grid, run_command, screen, width
from mlpreduce.words.flags import add_flags, given_flags
from mlpreduce.words.pulse import Pulse

__all__ = ["NEEDED", "main"]

NEEDED = ("optuna", "mlflow", "matplotlib")  # to search; ray too, unless with workers=0

_VERBS = ("show", "export", "compare")
_APART = ("budgets", "name")  # whose flags are --budget, which may be repeated, and --study
_EPILOG = """\
examples:
  python -m mlpreduce.search --list
  python -m mlpreduce.search sharing_width --recipe digits --trials 40 --workers 2 --objectives top1,params
  python -m mlpreduce.search width_per_block --recipe paper_vitb16 --budget "params<=0.7" data.root=/data/imagenet
  python -m mlpreduce.search my_space.py --recipe my.toml --storage postgresql+psycopg://me@host/optuna --resume
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        0 when all is done; 2 for what cannot be carried out; 130 when interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    return run_command(lambda: _main(arguments), lambda: _again(arguments))


def _main(arguments: list[str]) -> int:
    if arguments[:1] and arguments[0] in _VERBS:
        require(f"mlpreduce search {arguments[0]}", "optuna")
        from mlpreduce.search import verbs

        status: int = verbs.main(arguments)
        return status
    options = _parser().parse_intermixed_args(arguments)
    if options.list:
        _list()
        return 0
    if not options.space:
        _parser().print_usage(sys.stderr)
        return 2
    if options.address:
        os.environ["RAY_ADDRESS"] = options.address
    require("mlpreduce search", *NEEDED)
    with Pulse(screen(), f"search {options.space}: loading Optuna and timm"):  # takes seconds
        from mlpreduce.search.driver import run

    run(
        options.space,
        options.recipe,
        overrides=options.overrides,
        plugins=options.plugins,
        storage=options.storage,
        output=options.output,
        resume=options.resume,
        **_settings(options),
    )
    return 0


def _again(arguments: list[str]) -> str | None:
    """The command that goes on, if a study is what was begun."""
    if {*arguments[:1]} & {*_VERBS} or "--list" in arguments:
        return None
    again = [*map(hidden, arguments), *([] if "--resume" in arguments else ["--resume"])]
    return f"python -m mlpreduce.search {shlex.join(again)}"


def _list() -> None:
    from mlpreduce.search.spaces.space import list_spaces

    found = {name: path.read_text(encoding="utf-8").lstrip('"').splitlines()[0] for name, path in list_spaces().items()}
    first = [text.rstrip('"') for text in found.values()]
    columns = [Column("name", list(found), left=True), Column("what it is", first, text=True)]
    print(Grid("", columns, ruled=False).text(width()))


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """Fields of `StudySettings` that are given."""
    from mlpreduce.search.study.settings import StudySettings

    found = given_flags(options, StudySettings, _APART)
    return {**found, "budgets": tuple(options.budget or ()), "name": options.study}


def _parser() -> argparse.ArgumentParser:
    from mlpreduce.search.study.settings import StudySettings

    parser = argparse.ArgumentParser(
        prog="python -m mlpreduce.search",
        description="Search a space of reductions: train points of it, and show what is best for its cost.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("space", nargs="?", metavar="SPACE", help="a space's name (see --list), or a path to a .py")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change any key of the recipe")
    parser.add_argument("--list", action="store_true", help="the spaces and their first lines")
    parser.add_argument("--recipe", default="digits", metavar="NAME", help="how a point is trained (default: digits)")
    add_flags(parser, StudySettings, _APART)
    for name, flag, action in (("budgets", "--budget", "append"), ("name", "--study", "store")):
        parser.add_argument(flag, action=action, help=StudySettings.model_fields[name].description)
    parser.add_argument(
        "--storage", metavar="URL", help="of Optuna's storage; default: a SQLite file in the output directory"
    )
    parser.add_argument("--output", metavar="DIR", help="where everything is written (default: runs/SPACE-RECIPE)")
    parser.add_argument("--resume", action="store_true", help="go on with the study in the output directory")
    parser.add_argument(
        "--address", metavar="HOST:PORT", help="train on that Ray cluster; otherwise RAY_ADDRESS, or here"
    )
    add_option(parser)
    return parser
