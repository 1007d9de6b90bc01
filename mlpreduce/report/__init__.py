"""Tables and figures from records: `python -m mlpreduce report RUN...`. The only package that imports matplotlib.

Everything is rebuilt from the `record.json` files alone. The report of a search, in `search.py`, is made from its document.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mlpreduce.errors import ReductionError, require
from mlpreduce.records import SCHEMA, Record, Results, Variants, store, summarize
from mlpreduce.report.content import Picture
from mlpreduce.report.figure import CAPTION, draw
from mlpreduce.report.gathering import gather, gather_points
from mlpreduce.report.pages import as_html, as_markdown, for_console
from mlpreduce.report.plans import FILE, picture_of
from mlpreduce.report.plotting import as_png
from mlpreduce.report.stored import check_page, keep, lasting, results_text, with_results
from mlpreduce.report.summing import beyond_noise, cautions, overview
from mlpreduce.report.tables import NOTES, Part, compose
from mlpreduce.words.console import Grid, screen

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

FILES = ("results.json", "report.md", "report.html", "curves.png", FILE)  # what `build` writes; the last one not always


def main(argv: Sequence[str] | None = None) -> int:
    """Run `mlpreduce report` and return 0.

    Raises:
        ReductionError: as `build`.
    """
    parser = argparse.ArgumentParser(
        prog="mlpreduce report", description="Rebuild the report of recipes from their records."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output directory of a recipe; several make one report")
    parser.add_argument("--output", metavar="DIR", help="where it is written; default: into RUN, if there is one")
    parser.add_argument(
        "--page", type=Path, metavar="FILE.md", help="keep the results beside this page as JSON, and their table in it"
    )
    options = parser.parse_args(argv)
    if options.page is not None:
        check_page(options.page)
    document = build(*options.runs, output=options.output)
    if options.page is not None:
        keep(document.as_json(), options.page, results_text)
    shown = screen()
    shown.print(console_table(document))
    place = Path(options.output or options.runs[0])
    lines = [f"report   {place / 'report.html'}", f"         {place / 'report.md'}"]
    lines += [f"results  {place / 'results.json'}", f"figure   {place / 'curves.png'}"]
    shown.print("\n".join(lines), highlight=False, soft_wrap=True, markup=False)
    return 0


def build(*runs: str | Path, output: str | Path | None = None) -> Results:
    """Write `results.json`, `report.md`, `report.html` and the figures, from the records of finished runs alone.

    The figures are `curves.png` and, where a variant reduces MLPs of the built model, `plans.png`.

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


def _write_sweep(points: dict[str, list[Record]], place: Path) -> Results:
    """The report of a recipe with a sweep, from the finished records of each point."""
    unfinished = [point for point, records in points.items() if not records]
    parts = {point: summarize(records) for point, records in points.items() if records}
    if not parts:
        raise ReductionError(f"report: no run has finished at {', '.join(unfinished)}; `--resume` goes on with them")
    recipe = next(points[point] for point in parts)[0].name.rpartition("/")[0]
    tables = {point: Variants(variants=part.variants) for point, part in parts.items()}
    warnings = dict.fromkeys(text for part in parts.values() for text in part.warnings)
    document = Results(schema=SCHEMA, recipe=recipe, warnings=tuple(warnings), points=tables)
    remarks = [f"No run has finished at {', '.join(unfinished)}."] if unfinished else []
    return _write(place, document, [(part, points[point]) for point, part in parts.items()], remarks)


def _write(place: Path, document: Results, parts: Sequence[Part], remarks: Sequence[str] = ()) -> Results:
    curves = Picture("Curves", "curves.png", CAPTION, as_png(draw([records for _, records in parts])))
    drawn = picture_of(record for _, records in parts for record in records)
    pictures = [curves, *([drawn] if drawn else [])]
    verdict = beyond_noise(document)
    content = compose(
        document.recipe, parts, pictures, [*remarks, *cautions(document), *([verdict] if verdict else [])]
    )
    store(place, "results.json", document.as_json())
    (place / FILE).unlink(missing_ok=True)  # of an earlier report
    for picture in pictures:
        (place / picture.file).write_bytes(picture.png)
    (place / "report.md").write_text(as_markdown(content), encoding="utf-8")
    (place / "report.html").write_text(as_html(content), encoding="utf-8")
    return document


def console_table(document: Results) -> Grid:
    """The results as rich prints them: one table of all variants, what to be careful of, and what is beyond the noise."""
    return for_console(overview(document), "\n".join([*cautions(document), *filter(None, [beyond_noise(document)])]))
