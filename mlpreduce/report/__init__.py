"""Tables and figures from records: `python -m mlpreduce report RUN...`. The only package that imports matplotlib.

Everything is rebuilt from the `record.json` files alone. The report of a search, in `search.py`, is made from its document.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlpreduce.errors import ReductionError
from mlpreduce.extras import require
from mlpreduce.records import SCHEMA, store, summarize
from mlpreduce.report.content import Picture
from mlpreduce.report.figure import CAPTION, as_png, draw
from mlpreduce.report.gather import gather, gather_points
from mlpreduce.report.overview import beyond_noise, overview
from mlpreduce.report.pages import as_html, as_markdown, for_console
from mlpreduce.report.stored import check_page, keep, lasting, results_text, with_results
from mlpreduce.report.tables import NOTES, Part, compose

if TYPE_CHECKING:
    from rich.console import Group

__all__ = [
    "FILES",
    "NOTES",
    "build",
    "check_page",
    "console_table",
    "keep",
    "lasting",
    "main",
    "results_text",
    "with_results",
]

FILES = ("results.json", "report.md", "report.html", "curves.png")  # what `build` writes


def main(argv: Sequence[str] | None = None) -> int:
    """Run `mlpreduce report` and return its exit status: 0, or 2 after a ReductionError."""
    parser = argparse.ArgumentParser(
        prog="mlpreduce report", description="Rebuild the report of recipes from their records."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output directory of a recipe; several make one report")
    parser.add_argument("--output", metavar="DIR", help="where it is written; default: into RUN, if there is one")
    parser.add_argument(
        "--page", type=Path, metavar="FILE.md", help="keep the results beside this page as JSON, and their table in it"
    )
    options = parser.parse_args(argv)
    try:
        require("mlpreduce report", "rich")
        if options.page is not None:
            check_page(options.page)
        document = build(*options.runs, output=options.output)
        if options.page is not None:
            keep(document, options.page, results_text)
    except ReductionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(console_table(document))
    for note in NOTES:
        console.print(note, style="dim", highlight=False)
    place = Path(options.output or options.runs[0]).resolve()
    lines = [f"report   {place / 'report.html'}", f"         {place / 'report.md'}"]
    lines += [f"results  {place / 'results.json'}", f"figure   {place / 'curves.png'}"]
    console.print("\n".join(lines), highlight=False, soft_wrap=True, markup=False)
    return 0


def build(*runs: str | Path, output: str | Path | None = None) -> dict[str, Any]:
    """Write `results.json`, `report.md`, `report.html` and `curves.png`, from the records of finished runs alone.

    Args:
        runs: output directories of recipes; the records of several are put together. That of a recipe with a sweep stands
            alone: its report has the points side by side.
        output: where the files are written; by default into the directory of the runs, if it is one.

    Returns:
        What `results.json` holds.

    Raises:
        ReductionError: a directory has no finished run; two have one of the same variant and seed, or a variant that is
            not the same in both; there are several and `output` is missing, or is one of them.
    """
    require("report", "matplotlib")
    sources = {Path(run).resolve() for run in runs}
    points = gather_points(runs[0]) if len(sources) == 1 else {}
    records = [] if points else gather(*runs)
    if output is None and len(sources) > 1:
        raise ReductionError(
            f"report: {len(sources)} runs make a report that belongs to none of them; add --output DIR"
        )
    place = Path(runs[0] if output is None else output)
    if sources != {place.resolve()} and (any(place.glob("*/seed*/record.json")) or gather_points(place)):
        raise ReductionError(
            f"report: --output {place} holds records and has a report of its own; name another directory"
        )
    if points:
        return _write_sweep(points, place)
    document = summarize(records)
    return _write(place, document, [(document, records)])


def _write_sweep(points: dict[str, list[dict[str, Any]]], place: Path) -> dict[str, Any]:
    """The report of a recipe with a sweep, from the finished records of each point."""
    unfinished = [point for point, records in points.items() if not records]
    parts = {point: summarize(records) for point, records in points.items() if records}
    if not parts:
        raise ReductionError(f"report: no run has finished at {', '.join(unfinished)}; `--resume` goes on with them")
    recipe = next(points[point] for point in parts)[0]["recipe"]["name"].rpartition("/")[0]
    tables = {point: {"variants": part["variants"]} for point, part in parts.items()}
    document = {"schema": SCHEMA, "recipe": recipe, "points": tables}
    remarks = [f"No run has finished at {', '.join(unfinished)}."] if unfinished else []
    return _write(place, document, [(part, points[point]) for point, part in parts.items()], remarks)


def _write(place: Path, document: dict[str, Any], parts: Sequence[Part], remarks: Sequence[str] = ()) -> dict[str, Any]:
    picture = Picture("Curves", "curves.png", CAPTION, as_png(draw([records for _, records in parts])))
    verdict = beyond_noise(document)
    content = compose(document["recipe"], parts, picture, [*remarks, *([verdict] if verdict else [])])
    store(place, "results.json", document)
    (place / picture.file).write_bytes(picture.png)
    (place / "report.md").write_text(as_markdown(content), encoding="utf-8")
    (place / "report.html").write_text(as_html(content), encoding="utf-8")
    return document


def console_table(document: dict[str, Any]) -> Group:
    """The results for rich's console: one table of all variants, and which differences are beyond the noise."""
    require("report.console_table", "rich")
    return for_console([overview(document)], beyond_noise(document))
