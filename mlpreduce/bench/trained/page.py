"""The page of the bench: a table for each model, what repairs are worth, and what several draws say."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from mlpreduce.bench.rounds import interval
from mlpreduce.bench.trained.ways import ADVICE
from mlpreduce.criteria import choose
from mlpreduce.report.content import Table
from mlpreduce.report.pages import markdown_table
from mlpreduce.report.trained import MAIN

__all__ = ["figure_of", "page_of"]

MEASURES = {"cosine": 3, "probe": 1, "knn": 1, "spearman": 3}  # and their digits
_TITLES = {"vit_s": "A DINOv2 ViT-S/14", "minilm": "MiniLM-L6, a sentence encoder"}


def page_of(document: dict[str, Any]) -> str:
    """Make the page from the JSON that `--write` stores beside it."""
    lines = [
        "# Trained models, reduced without training",
        "",
        "Trained models are sliced or shared here, and not trained afterwards. The cosine compares the outputs of the reduced",
        "model with those of the whole model, on test examples that no calibration saw. A column says which part of the hidden",
        "units is kept. All MLPs of a model keep the same part, except in rows named `global`. Two blocks that share an MLP",
        "have as many parameters as at half the width. The guard of `shallow` is on, as it is by default.",
        "Rows and widths that are not here have not been measured.",
        "",
    ]
    for name, entry in document["subjects"].items():
        lines += _subject(name, entry)
        lines += _against_rivals(entry)
    return "\n".join(lines).rstrip() + "\n"


def figure_of(name: str) -> str:
    """The file of a model's figure, beside the page."""
    return f"trained_{name}.png"


def _subject(name: str, entry: dict[str, Any]) -> Iterable[str]:
    cells = [cell for cell in entry["cells"] if "measured" in cell]
    if cells:
        what = MAIN[name][1].removesuffix(" (%)")
        yield from (f"![{_TITLES[name]}: {what} against parameters and against MACs]({figure_of(name)})", "")
    for tests in sorted({cell["tests"] for cell in cells}):
        facts = entry["of"][str(tests)]
        some = [cell for cell in cells if cell["tests"] == tests]
        draws = sorted({cell["draw"] for cell in some})
        yield from (f"## {_TITLES[name]}, {facts['tests']:,} tests", "")
        whole = ", ".join(f"{key} {value:.{MEASURES[key]}f}" for key, value in facts["of_whole"].items() if value != 1)
        yield f"{facts['conditions'][0].upper()}{facts['conditions'][1:]}. {facts['whole']['params']:,} parameters and"
        yield f"{facts['whole']['macs'] / 1e6:,.0f} M MACs as it is{': ' + whole if whole else ''}."
        several = "; of several the mean and the standard deviation (ddof=1)" if len(draws) > 1 else ""
        yield f"Draws of the calibration data: {', '.join(map(str, draws))}{several}."
        yield ""
        measures = [key for key in MEASURES if key in facts["of_whole"]]
        for kind, title in _KINDS.items():
            chosen = [cell for cell in some if cell["kind"] in (kind, *_BESIDE.get(kind, ()))]
            if chosen:
                yield from (f"### {title}", "", markdown_table(_table(chosen, measures)), "")
        yield from _repairs([cell for cell in some if cell["kind"] == "criteria"], measures)


_KINDS = {"criteria": "Which units stay", "sharing": "Sharing and factors, at the parameters of half the width"}
_BESIDE = {"criteria": ("advice", "peers")}


def _table(cells: Sequence[dict[str, Any]], measures: Sequence[str]) -> Table:
    """A row for each way, a column for each width: the measures one after the other. The best comes first."""
    widths = sorted({cell["width"] for cell in cells}, reverse=True)
    by_row: dict[tuple[str, str], dict[float, list[dict[str, Any]]]] = {}
    for cell in cells:
        by_row.setdefault((cell["row"], cell["repair"]), {}).setdefault(cell["width"], []).append(cell)

    def missing(some: Sequence[dict[str, Any]]) -> float:
        """What the cosine lacks to 1."""
        return float(max(1 - statistics.mean(cell["measured"]["cosine"] for cell in some), 1e-9))

    least = {width: min(missing(found[width]) for found in by_row.values() if width in found) for width in widths}

    def behind(found: dict[float, list[dict[str, Any]]]) -> float:
        """How many times as much is missing as of the best: where some widths were not measured, the others count."""
        return statistics.mean(missing(some) / least[width] for width, some in found.items())

    def texts(some: Sequence[dict[str, Any]]) -> str:
        parts = []
        for key in measures:
            values = [cell["measured"][key] for cell in some]
            spread = f" ± {statistics.stdev(values):.{MEASURES[key]}f}" if len(values) > 1 else ""
            parts.append(f"{statistics.mean(values):.{MEASURES[key]}f}{spread}")
        return " / ".join(parts)

    rows = [
        [name, repair, *(texts(found[width]) if width in found else "" for width in widths)]
        for (name, repair), found in sorted(by_row.items(), key=lambda item: behind(item[1]))
    ]
    return Table("", ["units by", "repair", *(f"{width:.0%}: {' / '.join(measures)}" for width in widths)], rows)


# the row that makes the same call as the advice, so it cannot be its rival
_SAME = (str(choose(ADVICE["criterion"])), ADVICE["repair"])


def _against_rivals(entry: dict[str, Any]) -> Iterable[str]:
    """The advice against the best of all others: chosen on one draw, compared on the others, with equal data and tests."""
    cells = [cell for cell in entry["cells"] if "measured" in cell and cell["kind"] != "sharing"]
    ours = {(c["width"], c["draw"]): c for c in sorted(cells, key=lambda c: c["tests"]) if c["kind"] == "advice"}
    chosen_on = min((draw for _, draw in ours), default=0)
    first = [c for c in cells if c["draw"] == chosen_on and c["kind"] != "advice" and (c["row"], c["repair"]) != _SAME]
    rows = []
    for width in sorted({width for width, _ in ours}, reverse=True):
        for key in (key for key in MEASURES if any(key in c["measured"] for c in first)):
            some = [c for c in first if c["width"] == width]
            if not some:
                continue
            rival = max(some, key=lambda c: c["measured"][key])
            gains = [
                mine["measured"][key] - other["measured"][key]
                for other in cells
                if (other["row"], other["repair"], other["width"]) == (rival["row"], rival["repair"], width)
                and other["draw"] != chosen_on
                and (mine := ours.get((width, other["draw"]))) is not None
                and mine["tests"] == other["tests"]
            ]
            if len(gains) > 1:
                digits = MEASURES[key] + 1
                mean, low, high = (f"{value:+.{digits}f}" for value in interval(gains))
                rows.append(
                    [
                        f"{width:.0%}",
                        key,
                        f"{rival['row']}, {rival['repair']}",
                        mean,
                        f"{low} to {high}",
                        str(len(gains)),
                    ]
                )
    if rows:
        yield "### README's advice against the best of all others"
        yield ""
        yield f"The rival of each line was chosen on draw {chosen_on}; the differences are of the other draws, paired."
        yield ""
        yield markdown_table(
            Table("", ["units kept", "measure", "rival", "difference", "95 % interval", "draws"], rows)
        )
        yield ""


def _repairs(cells: Sequence[dict[str, Any]], measures: Sequence[str]) -> Iterable[str]:
    """Where a repair ends below none."""
    known = {(c["row"], c["repair"], c["width"], c["draw"]): c["measured"] for c in cells}
    for key in (key for key in ("cosine", "spearman") if key in measures):
        for repair in ("parallel", "least_squares"):
            gains = [
                (found[key] - known[row, "none", width, draw][key], row, width)
                for (row, kind, width, draw), found in known.items()
                if kind == repair and (row, "none", width, draw) in known
            ]
            if gains:
                worst, row, width = min(gains)
                below = sum(gain < 0 for gain, *_ in gains)
                yield (
                    f"- {key}: `{repair}` is above none in {len(gains) - below} of {len(gains)} cells; the least gain is "
                    f"{worst:+.3f} (`{row}` at {width:.0%}), the mean {statistics.mean(gain for gain, *_ in gains):+.3f}"
                )
    yield ""
