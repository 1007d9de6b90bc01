"""The command `python -m mlpreduce.recipe`."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mlpreduce.errors import ReductionError
from mlpreduce.recipe.schema import Recipe, differences, header, list_recipes, load, runs

if TYPE_CHECKING:
    from rich.console import Console

    from mlpreduce.records import Recorder

__all__ = ["main", "train"]

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
    arguments = _parser().parse_intermixed_args(argv)
    output = Path(arguments.output or f"runs/{Path(arguments.name).stem}") if arguments.name else Path()
    try:
        if arguments.list:
            for name, path in list_recipes().items():
                print(f"{name:<20} {' '.join(header(path)[:1])}")
            return 0
        if not arguments.name:
            _parser().print_usage(sys.stderr)
            return 2
        recipe = load(arguments.name, arguments.overrides)
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
        return train(recipe, output, resume=arguments.resume)
    except ReductionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        where = ["--address", arguments.address] if arguments.address else []
        again = [arguments.name or "", *arguments.overrides, "--resume", "--output", str(output), *where]
        print(
            f"\ninterrupted; all workers have ended. To go on: python -m mlpreduce.recipe {shlex.join(again)}",
            file=sys.stderr,
        )
        return 130


def train(recipe: Recipe, output: Path, *, resume: bool = False, console: Console | None = None) -> int:
    """Train all variants and seeds of a recipe, and report.

    Args:
        recipe: what to train.
        output: directory of records, checkpoints and report.
        resume: go on with what lies in `output`; where nothing does, start.
        console: where progress and results are shown.

    Returns:
        0, or 1 when the loss of a run diverged.

    Raises:
        ReductionError: it cannot be carried out, or `output` holds runs and `resume` is not given, or differs.
        KeyboardInterrupt: interrupted; the records are marked, the workers have ended.
    """
    from rich.console import Console

    from mlpreduce.data import check
    from mlpreduce.launch import execute
    from mlpreduce.recipe.progress import Display
    from mlpreduce.records import Recorder, store

    console = console or Console(width=None if sys.stdout.isatty() else 120)
    output = output.resolve()
    document = recipe.model_dump(mode="json")
    _check_output(output, document, resume)
    if not os.environ.get("RAY_ADDRESS"):
        check(recipe.data)  # a cluster may see data that this machine does not
    store(output, "recipe.json", document)
    every = runs(recipe, output)
    recorder = Recorder(output, document, every)
    todo = [run for run in every if not recorder.finished(run)]
    where = f"{recipe.launch.workers} workers" if recipe.launch.workers else "this process"
    console.print(
        f"{recipe.name}: {len(every)} runs ({len(recipe.variants)} variants x {len(recipe.seeds)} seeds) of "
        f"{recipe.train.epochs} epochs on {where}; {len(every) - len(todo)} finished before. Output: {output}",
        highlight=False,
        soft_wrap=True,
    )
    try:
        with Display(console, todo, len(every)) as display:

            def consume(event: dict[str, object]) -> None:
                if event["event"] != "progress":
                    recorder.handle(event)
                display.handle(event)

            execute(todo, recipe.launch, consume)
    finally:
        recorder.interrupt()  # marks what is still running: nothing, unless something was raised
    return _finish(output, recorder, console, every_finished=all(recorder.finished(run) for run in every))


def _check_output(output: Path, document: dict[str, object], resume: bool) -> None:
    begun = [*output.glob("*/seed*/record.json"), *output.glob("*/seed*/checkpoints")]
    if not begun:
        return
    if not resume:
        count = len({path.parent for path in begun})
        raise ReductionError(
            f"output {output} holds {count} finished or interrupted run(s); go on with --resume, or start in another "
            "--output DIR"
        )
    known = output / "recipe.json"
    before = json.loads(known.read_text(encoding="utf-8")) if known.is_file() else {}
    changed = differences(before, document)
    if changed:
        raise ReductionError(
            "--resume: the recipe differs from that of the output; repeat its settings, or start in another --output "
            "DIR:\n  " + "\n  ".join(changed)
        )


def _finish(output: Path, recorder: Recorder, console: Console, *, every_finished: bool) -> int:
    from mlpreduce import report
    from mlpreduce.records import tracking_uri

    try:
        results = report.build(output)
    except ReductionError:
        if every_finished:
            raise
        console.print("no run finished; there is nothing to report", style="red")
        return 1
    recorder.log_files([output / name for name in ("results.json", "report.md", "report.html", "curves.png")])
    console.print(report.console_table(results))
    for note in report.NOTES:
        console.print(note, style="dim", highlight=False)
    uri = tracking_uri(output)
    show = f"mlflow ui --backend-store-uri {shlex.quote(uri)}" if uri.startswith("sqlite:") else f"MLflow: {uri}"
    lines = [
        f"results  {output / 'results.json'}",
        f"report   {output / 'report.html'}",
        f"         {output / 'report.md'}",
        f"figure   {output / 'curves.png'}",
        f"runs     {output}/<variant>/seed<seed>/: record.json, checkpoints/, model/",
        show,
    ]
    console.print("\n".join(lines), highlight=False, soft_wrap=True, markup=False)
    return 0 if every_finished else 1


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
    parser.add_argument("--dry-run", action="store_true", help="show plans, counts, schedule and cost; needs no data")
    parser.add_argument("--resume", action="store_true", help="go on with the runs in the output directory")
    parser.add_argument("--output", metavar="DIR", help="where everything is written; default: runs/NAME")
    parser.add_argument(
        "--address", metavar="HOST:PORT", help="train on that Ray cluster; otherwise RAY_ADDRESS, or here"
    )
    return parser
