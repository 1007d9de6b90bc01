"""Results that are kept with a page: what lasts of them as JSON beside it, and the part of the page that is made from it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlpreduce.errors import ReductionError
from mlpreduce.files import replacing
from mlpreduce.records import Results, as_json, typed
from mlpreduce.report.content import Table
from mlpreduce.report.pages import markdown_table
from mlpreduce.report.power import detectable
from mlpreduce.report.summing import beyond_noise
from mlpreduce.report.tables import comparison, mean_std, short

__all__ = ["check_page", "keep", "lasting", "results_text", "with_results"]

# what another machine, or the same one at another hour, would measure otherwise, and names of the run that made it
_PASSING = (
    "throughput",
    "peak_memory_mib",
    "mlflow_run_id",
    "latency",
    "seconds",
    "environment",
    "storage",
    "directory",
)
_NAMED = ("variants", "points")  # what is below them is by names that a recipe gave, and a name may be any word
_PLACE = re.compile(r"(<!-- results: (\S+) -->\n)(?:(?!<!-- results: ).)*?(<!-- end of results -->)", re.DOTALL)


def lasting(document: Any) -> Any:
    """What of a document of results does not depend on where and when they were measured.

    Example:
        >>> lasting({"params": 2, "throughput": 1.5, "runs": [{"top1": 97.5, "mlflow_run_id": "a"}]})
        {'params': 2, 'runs': [{'top1': 97.5}]}
    """
    if isinstance(document, dict):
        kept = {key: value for key, value in document.items() if key not in _PASSING}
        return {key: _named(value) if key in _NAMED else lasting(value) for key, value in kept.items()}
    return [lasting(value) for value in document] if isinstance(document, list) else document


def _named(document: Any) -> Any:
    """What lasts of things by name: all names."""
    return (
        {name: lasting(value) for name, value in document.items()} if isinstance(document, dict) else lasting(document)
    )


def results_text(kept: dict[str, Any]) -> str:
    """Write a recipe's variants as a table: counts, top-1 of each seed, the comparison with the baseline; and the verdict.

    Args:
        kept: what `results.json` holds, or what `lasting` leaves of it.
    """
    document = typed(Results, kept, "results.json")
    headers = [
        *("variant", "parameters", "MLP parameters", "MACs", "top-1 % by seed", "mean ± std", "peak-to-final"),
        *("vs baseline", "95 % interval", "p", "n", "detectable"),
    ]
    rows = []
    for name, v in document.every:
        against, top1 = v.vs_baseline, [run.top1 for run in v.runs]
        least = detectable(against)
        rows.append(
            [
                *(name, f"{v.params:,}", f"{v.mlp_params:,}", short(v.macs)),
                *(", ".join(f"{value:.2f}" for value in top1), mean_std(top1), f"{v.peak_to_final_mean:.2f}"),
                *(comparison(against)[:4] if against else [""] * 4),
                "" if least is None else f"{least:.2f}",
            ]
        )
    table = markdown_table(Table(str(document.recipe), headers, rows))
    verdict = beyond_noise(document)
    return f"{table}\n\n{verdict}" if verdict else table


def check_page(page: Path) -> None:
    """Check that a page has a place for results, before anything is written.

    Raises:
        ReductionError: there is no such page, or it has no place for the results of its own JSON.
    """
    if not page.is_file():
        raise ReductionError(f"--page {page}: there is no such file")
    _places(page.read_text(encoding="utf-8"), page)


def keep(document: dict[str, Any], page: Path, text_of: Callable[[dict[str, Any]], str]) -> None:
    """Write what lasts of results beside a page, as JSON of the page's name, and its text into the page.

    Raises:
        ReductionError: as `check_page`.
    """
    check_page(page)
    document = lasting(document)
    text = with_results(page, text_of(document))
    with replacing(page.parent, f"{page.stem}.json", page.name) as (stored, written):
        stored.write_text(as_json(document), encoding="utf-8")
        written.write_text(text, encoding="utf-8")


def with_results(page: Path, results: str) -> str:
    """The text of a page with results in the place that is marked for them.

    The place is between the lines `<!-- results: NAME.json -->` and `<!-- end of results -->`; NAME is the page's.

    Raises:
        ReductionError: there is no such place, or more than one.
    """
    text = page.read_text(encoding="utf-8")
    place = _places(text, page)
    return f"{text[: place.end(1)]}{results}\n{text[place.start(3) :]}"


def _places(text: str, page: Path) -> re.Match[str]:
    found = [place for place in _PLACE.finditer(text) if place[2] == f"{page.stem}.json"]
    if len(found) != 1:
        raise ReductionError(
            f"--page {page}: it has {len(found)} places for results; write one, the lines <!-- results: {page.stem}.json --> "
            "and <!-- end of results -->"
        )
    return found[0]
