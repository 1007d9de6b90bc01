"""The report of a search: its front beside the baseline and the paper's points, from the document that a search ends with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

from mlpreduce.records import Limit, Objective, StudyDocument, StudyPoint, typed
from mlpreduce.report import search_points as points
from mlpreduce.report.content import Content, Listing, Picture, Table
from mlpreduce.report.pages import as_html, as_markdown, for_console, markdown_table
from mlpreduce.report.search_figures import FILES, pictures
from mlpreduce.report.tables import mean_std
from mlpreduce.words.console import Grid
from mlpreduce.words.values import flatten

__all__ = ["build_search", "console_table", "front_table", "kept", "kept_text"]

_CONSOLE_ROWS = 20  # of the front
_KEPT = (
    "name",
    "kind",
    "number",
    "steps",
    "cost",
    "values",
    "runs",
    "state",
    "front",
    "feasible",
    "settings",
)  # of a point
_NOT_ON_CONSOLE = ("unique MLPs", "95 % interval", "peak-to-final")
# A column: header, and what stands there for a point.
_Column = tuple[str, Callable[[StudyPoint], str]]
_COUNTS = (
    "Tied parameters are counted once. MACs: multiply-accumulates of one image in Linear, Conv and LayerNorm layers."
)
_TOP1 = (
    "Top-1 in percent, that of the best epoch, chosen on the validation set: mean ± standard deviation (ddof=1) over the n "
    "runs of a point, which differ in their seeds. 95 % interval: of the mean of three runs or more, by Student's t with "
    "n - 1 degrees of freedom. Peak-to-final: top-1 of the best epoch minus that of the last, in points."
)
_FRONT = (
    "Front: trials within the budgets that no other such trial beats in one objective without losing in another. Pruned trials "
    "are no candidates: they were stopped early, and their values are the best so far."
)
_LUCK = (
    "One seed says little: the best of many trials is in part the luckiest. Train the points that matter with new seeds before "
    "you believe in their order."
)
_SCORE = (
    "Score: of the model after the reduction, the higher the better; of points of the front and of references with the better "
    "of two repairs, all layers in turn or each by itself, of others with the second."
)
_SCORED = "The whole model, the paper's points and equal parts of all MLPs are scored beside the trials."
_REFERENCES = "Baseline and the paper's points are trained beside the trials; they need not keep the budgets."


def build_search(document: StudyDocument, place: Path) -> list[Path]:
    """Write `report.md`, `report.html` and the figures of a search; of the figures those that have something to show.

    Args:
        document: what a search ends with.
        place: the folder, made if it is missing. Figures of an earlier report there that this one has not are deleted.

    Returns:
        The files written.

    Raises:
        OSError: a file cannot be written.
    """
    found = pictures(document)
    content = _compose(document, found)
    place.mkdir(parents=True, exist_ok=True)
    for file in FILES:
        (place / file).unlink(missing_ok=True)
    for picture in found:
        (place / picture.file).write_bytes(picture.png)
    (place / "report.md").write_text(as_markdown(content), encoding="utf-8")
    (place / "report.html").write_text(as_html(content), encoding="utf-8")
    return [place / name for name in ("report.md", "report.html", *(picture.file for picture in found))]


def _compose(document: StudyDocument, found: list[Picture]) -> Content:
    """The report of a search, with its pictures between the front and the table of all trials."""
    verdicts = [Listing("Verdicts", list(document.verdicts))] if document.verdicts else []
    front = front_table(document)
    return Content(
        title=f"{document.study}: search space {document.space}, recipe {document.recipe}",
        remarks=list(_remarks(document)),
        sections=[
            *verdicts,
            *([front] if front.rows else []),
            *found,
            _trials(document),
            _search(document),
            Listing("Notes", list(_notes(document))),
        ],
    )


def front_table(document: StudyDocument) -> Table:
    """The Pareto front, best top-1 first if that is the first objective, then the baseline and the paper's points."""
    on_front = points.front(document)
    rows = [*on_front, *(p for p in points.references(document) if not p.front)]
    baseline = next((p for p in points.references(document) if not p.steps), None)
    whole = points.value_of(baseline, "params") if baseline else None
    extra = [o for o in document.objectives if o.name not in ("top1", "params", "macs")]
    trained: list[_Column] = [
        ("top-1 %", _top1),
        ("n", lambda p: str(len(points.measured(p, "top1")))),
        ("peak-to-final", _peak_to_final),
        ("95 % interval", _interval),
    ]
    columns: list[_Column] = [
        ("point", lambda p: p.name),
        ("reduction", points.reduction),
        ("parameters", _value("params")),
        ("of baseline", lambda p: _fraction(points.value_of(p, "params"), whole)),
        ("MACs", _value("macs")),
        ("unique MLPs", _value("unique_mlps")),
        *((points.objective_label(o), _objective_cell(o.name)) for o in extra),
        *(trained if _is_trained(document) else []),
    ]
    title = "Pareto front and references" if len(rows) > len(on_front) else "Pareto front"
    return _table(title if on_front else "References", columns, rows)


def _is_trained(document: StudyDocument) -> bool:
    """Whether points were trained, and not scored."""
    return any(objective.name == "top1" for objective in document.objectives)


def console_table(document: StudyDocument) -> Grid:
    """The front and the references for rich's console: of a long front its best points, of each what fits a line."""
    table = front_table(document)
    kept = [number for number, header in enumerate(table.headers) if header not in _NOT_ON_CONSOLE]
    on_front = len(points.front(document))
    rows = [*table.rows[: min(on_front, _CONSOLE_ROWS)], *table.rows[on_front:]]
    cut = f", its {_CONSOLE_ROWS} best of {on_front} points" if on_front > _CONSOLE_ROWS else ""
    short_table = Table(
        f"{document.study}: {table.title}{cut}",
        [table.headers[number] for number in kept],
        [[row[number] for number in kept] for row in rows],
    )
    return for_console(short_table, words=2)


def kept(document: StudyDocument) -> dict[str, Any]:
    """What of a search is kept with a page: its settings, counts and verdicts, the front and the references."""
    names = ("schema", "study", "space", "recipe", "objectives", "budgets", "settings", "counts", "verdicts")
    whole = document.as_json()
    wanted = [point for point in whole["points"] if point.get("front") or point["kind"] != "trial"]
    shown = [{key: point[key] for key in _KEPT if key in point} for point in wanted]
    return {**{name: whole[name] for name in names}, "points": shown}


def kept_text(kept: dict[str, Any]) -> str:
    """Write what `kept` gives as the front and the references in a table, the counts of trials, and the verdicts."""
    document = typed(StudyDocument, kept, "study")
    counts = ", ".join(f"{name} {count:,}" for name, count in document.counts.items())
    verdicts = [f"- {verdict}" for verdict in document.verdicts]
    return "\n".join([markdown_table(front_table(document)), "", f"Trials: {counts}.", "", *verdicts])


def _table(title: str, columns: list[_Column], rows: list[StudyPoint]) -> Table:
    return Table(title, [header for header, _ in columns], [[cell(row) for _, cell in columns] for row in rows])


def _fraction(part: float | None, whole: float | None) -> str:
    return f"{100 * part / whole:.1f} %" if part and whole else "no baseline" if part else ""


def _objective_cell(name: str) -> Callable[[StudyPoint], str]:
    """What was measured in each run as mean and deviation, anything else as it is."""

    def cell(point: StudyPoint) -> str:
        runs = points.measured(point, name)
        return mean_std(runs, 3) if runs and name != "score" else points.number_text(name, points.value_of(point, name))

    return cell


def _top1(point: StudyPoint) -> str:
    runs = points.measured(point, "top1")
    return mean_std(runs) if runs else point.state


def _interval(point: StudyPoint) -> str:
    runs = points.measured(point, "top1")
    if not runs:
        return ""
    found = points.spread(runs)
    if found.n < 3:
        return "n below 3"
    return "not defined" if found.low is None else f"[{found.low:.2f}, {found.high:.2f}]"


def _peak_to_final(point: StudyPoint) -> str:
    drops = [run.top1 - run.final_top1 for run in point.runs if run.top1 is not None and run.final_top1 is not None]
    return f"{fmean(drops):.2f}" if drops else ""


def _trials(document: StudyDocument) -> Table:
    """Every trial that was begun, in order of numbers."""
    rows = points.trials(document)
    objectives = document.objectives
    if "params" not in [o.name for o in objectives]:
        objectives = (*objectives, Objective(name="params"))
    columns: list[_Column] = [
        ("trial", lambda p: p.name),
        ("reduction", points.reduction),
        ("state", _state),
        *((points.objective_label(o), _value(o.name)) for o in objectives),
        ("runs", lambda p: str(len(p.runs))),
        ("epochs", lambda p: str(max((run.epochs for run in p.runs), default=""))),
        ("key", lambda p: p.key),
    ]
    if any(p.message for p in rows):
        columns.append(("message", lambda p: p.message))
    return _table("Trials", columns, rows)


def _value(name: str) -> Callable[[StudyPoint], str]:
    return lambda p: points.number_text(name, points.value_of(p, name))


def _state(point: StudyPoint) -> str:
    marks = [*(["front"] if point.front else []), *([] if point.feasible else ["over a budget"])]
    return ", ".join([point.state, *marks])


def _search(document: StudyDocument) -> Table:
    """Budgets, counts, settings, and where it ran."""
    rows = [["objective", f"{o.direction} {points.objective_label(o)}"] for o in document.objectives]
    rows += [["budget", _budget(budget)] for budget in document.budgets] or [["budget", "none"]]
    rows += [[f"trials: {name}", f"{count:,}"] for name, count in document.counts.items()]
    if document.hypervolume:
        corner = ", ".join(f"{name}={value:,}" for name, value in document.hypervolume.reference.items())
        rows.append(["hypervolume", f"{document.hypervolume.value:,.6g} (reference {corner})"])
    rows += [[f"setting: {name}", str(value)] for name, value in flatten(document.settings).items()]
    environment = dict(document.environment)
    versions = environment.pop("versions", {})
    rows += [[name, str(value)] for name, value in flatten(environment).items()]
    rows += [["versions", ", ".join(f"{name} {version}" for name, version in versions.items())]] if versions else []
    return Table("The search", ("what", "value"), [*rows, ["time", _duration(document.seconds)]])


def _budget(budget: Limit) -> str:
    return f"{budget.text}: {points.objective_label(Objective(name=budget.cost))} at most {budget.limit:,}"


def _duration(seconds: float) -> str:
    """Whole seconds, with minutes and hours where there are any.

    Example:
        >>> _duration(1234.5), _duration(59.2), _duration(7261)
        ('20 min 34 s', '59 s', '2 h 1 min 1 s')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return " ".join(
        [*([f"{hours} h"] if hours else []), *([f"{minutes} min"] if hours or minutes else []), f"{rest} s"]
    )


def _remarks(document: StudyDocument) -> Iterator[str]:
    """What a reader must know before the numbers."""
    on_front = points.front(document)
    if not on_front:
        complete = [p for p in points.trials(document) if p.state == "complete"]
        within = f", {len(points.candidates(document))} of them within the budgets" if document.budgets else ""
        yield f"There is no front: {len(complete)} of {len(points.trials(document))} trials are complete{within}."
    few = [p.name for p in on_front if len(points.measured(p, "top1")) < 3]
    if few and _is_trained(document):
        yield (
            f"Points of the front with fewer than 3 runs: {len(few)} of {len(on_front)}. Small differences between them may "
            "be chance."
        )


def _notes(document: StudyDocument) -> Iterator[str]:
    yield from (_COUNTS, _TOP1, _FRONT, _LUCK) if _is_trained(document) else (_COUNTS, _SCORE, _FRONT)
    if points.references(document):
        yield _REFERENCES if _is_trained(document) else _SCORED
    if document.hypervolume:
        yield "Hypervolume: of what the front dominates, up to the reference; only equal references can be compared."
