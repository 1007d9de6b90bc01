"""The command `python -m mlpreduce.recipe`."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from mlpreduce.errors import ReductionError
from mlpreduce.plugins import add_option
from mlpreduce.recipe.running import train
from mlpreduce.recipe.schema import Recipe, load
from mlpreduce.recipe.shelf import find, header, list_recipes
from mlpreduce.words.console import Column, Grid, run_command, screen, width

__all__ = ["main"]

_EPILOG = """\
examples:
  python -m mlpreduce.recipe digits
  python -m mlpreduce.recipe paper_vitb16 --dry-run
  python -m mlpreduce.recipe paper_vitb16 data.root=/data/imagenet launch.workers=8 --output runs/mine
  python -m mlpreduce.recipe paper_vitb16 data.root=/nfs/imagenet --output /nfs/runs/mine --address 10.0.0.1:6379
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        0 when all is done; 1 when a run failed; 2 for what cannot be carried out; 130 when interrupted.
    """
    return run_command(lambda: _main(argv), lambda: _again(argv))


def _main(argv: Sequence[str] | None) -> int:
    arguments = _parser().parse_intermixed_args(argv)
    if arguments.new or arguments.data or arguments.model:
        _new(arguments)
        return 0
    if arguments.list:
        print(_list({name: " ".join(header(path)[:1]) for name, path in list_recipes().items()}))
        return 0
    if not arguments.name:
        _parser().print_usage(sys.stderr)
        return 2
    recipe = _load(arguments)
    if "://" in (arguments.output or ""):
        raise ReductionError(
            f"--output {arguments.output}: object stores are not supported, only directories; give one on storage that all "
            f"machines see at the same path (NFS, Lustre, or a bucket that is mounted), and copy it to the store later"
        )
    if arguments.address and not recipe.launch.workers:
        raise ReductionError(
            f"--address {arguments.address}: launch.workers=0 trains in this process; use launch.workers=1 or more"
        )
    if arguments.dry_run:
        from mlpreduce.recipe.describe import describe

        print(describe(recipe))
        return 0
    if arguments.address:
        os.environ["RAY_ADDRESS"] = arguments.address
    return train(recipe, _output(arguments), resume=arguments.resume)


def _output(arguments: argparse.Namespace) -> Path:
    return Path(arguments.output or f"runs/{Path(arguments.name).stem}")


def _again(argv: Sequence[str] | None) -> str | None:
    """The command that goes on, if runs are what was begun."""
    arguments = _parser().parse_intermixed_args(argv)
    if not arguments.name or arguments.list or arguments.new or arguments.dry_run:
        return None
    where = ["--address", arguments.address] if arguments.address else []
    own = [word for file in arguments.plugins for word in ("--plugin", file)]
    again = [arguments.name, *arguments.overrides, *own, "--resume", "--output", str(_output(arguments)), *where]
    return f"python -m mlpreduce.recipe {shlex.join(again)}"


def _load(arguments: argparse.Namespace) -> Recipe:
    """Read the recipe; a line says so from the first second on, as transforms that are imported to check it take some."""
    find(arguments.name)
    if arguments.dry_run:  # its output is all that is printed
        return load(arguments.name, arguments.overrides, arguments.plugins)
    from mlpreduce.words.pulse import Pulse

    with Pulse(screen(), f"{arguments.name}: reading the recipe"):
        return load(arguments.name, arguments.overrides, arguments.plugins)


def _list(named: dict[str, str]) -> str:
    """Names with what they are, in the width of the console."""
    columns = [Column("name", list(named), left=True), Column("what it is", list(named.values()), text=True)]
    return Grid("", columns, ruled=False).text(width())


def _new(arguments: argparse.Namespace) -> None:
    """Write a recipe for a folder of images."""
    from mlpreduce.recipe.new import write_recipe

    if not arguments.new or not arguments.data:
        missing = "--new FILE.toml" if not arguments.new else "--data DIR"
        raise ReductionError(f"{missing} is missing; write recipe --new FILE.toml --data DIR [--model NAME]")
    if arguments.name:
        raise ReductionError(f"--new {arguments.new}: {arguments.name!r} does not belong to it; change the file then")
    print(write_recipe(arguments.new, arguments.data, arguments.model or ""))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mlpreduce.recipe",
        description="Train a recipe: every variant with every seed, then a table and a figure.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="a recipe's name (see --list), or a path to a .toml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change any key: train.epochs=2 seeds=[1]")
    parser.add_argument("--list", action="store_true", help="the recipes and their first lines")
    parser.add_argument(
        "--new", metavar="FILE", help="write a recipe for a folder of images: --new mine.toml --data DIR"
    )
    parser.add_argument("--data", metavar="DIR", help="of --new: one folder of images per class, or train/ and val/")
    parser.add_argument("--model", metavar="NAME", help="of --new: timm's name; default: a small ViT")
    parser.add_argument(
        "--dry-run", action="store_true", help="show plans, counts, schedule, cost and warnings; needs no data"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the runs in the output directory")
    parser.add_argument("--output", metavar="DIR", help="where everything is written; default: runs/NAME")
    parser.add_argument(
        "--address", metavar="HOST:PORT", help="train on that Ray cluster; otherwise RAY_ADDRESS, or here"
    )
    add_option(parser)
    return parser
