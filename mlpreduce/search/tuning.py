"""`mlpreduce.tune`: a search on a model in hand, whose points are scored and not trained."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import optuna
from torch import nn

from mlpreduce.budget import LatencyTable
from mlpreduce.calibration import Loss
from mlpreduce.edits import Plan
from mlpreduce.errors import ReductionError, check_number, check_whole
from mlpreduce.graph import Inputs, refuse_wrapped
from mlpreduce.launch import team
from mlpreduce.records import StudyDocument
from mlpreduce.search.answer import metrics_of
from mlpreduce.search.driver import check_budgets, drive
from mlpreduce.search.examples import FEWEST, digest_of, distance_of, likeness, read_twofold
from mlpreduce.search.owner import Owner
from mlpreduce.search.scoring import QUICK, Score, Scorer, Scoring
from mlpreduce.search.spaces.choices import Walker
from mlpreduce.search.spaces.goals import Budget, read_budgets
from mlpreduce.search.spaces.hand import ModelInHand, sliced
from mlpreduce.search.spaces.points import Point, Pricer
from mlpreduce.search.spaces.space import Suggestion, load_space
from mlpreduce.search.study.settings import REFERENCES, make_settings
from mlpreduce.search.study.storage import folder_of
from mlpreduce.words.console import screen, width
from mlpreduce.words.pulse import Pulse

__all__ = ["Tuning", "tune"]

_TIMES = "latency.json"  # in the output directory


def tune(
    model: nn.Module,
    *,
    data: Any,
    budget: str | Sequence[str],
    score: Score | None = None,
    space: str | Path | Callable[..., Any] = "trained",
    trials: int = 100,
    timeout: float | None = None,
    sampler: str = "auto",
    seed: int = 0,
    loss: Loss | None = None,
    calibration: int = 512,
    output: str | Path | None = None,
    storage: str | None = None,
    resume: bool = False,
    workers: int = 0,
    track: bool = False,
    example_inputs: Inputs | None = None,
) -> Tuning:
    """Search for the reduction of a trained model that keeps most of it within a budget. Nothing is trained.

    Of the first 2 x `calibration` examples every second one says what units are worth and by what layers are refitted; the
    others are what the score is of, unless one is given. Of data with fewer, every fourth example is kept for the score.
    Points are refitted from moments that were measured once; the best of them are repaired as `plan` does too, and the better
    repair counts.

    Args:
        model: the model; it is not changed.
        data: any iterable of batches, as of `plan`; it is read once.
        budget: the most that the reduced model may cost, such as "params<=0.67", "macs<=0.6" or "latency<=0.8", one or several;
            latency is predicted from widths, by a table measured before.
        score: `(reduced model) -> number`, the higher the better; by default the mean cosine of what the model gives to what
            the whole one gives, or where `loss` is given, minus the mean loss.
        space: a name of `search.list_spaces`, a path to a .py, or a function `suggest(trial, model)`.
        trials: points that are scored.
        timeout: seconds after which no further point is begun.
        sampler: of Optuna: auto (TPE), tpe, nsga2, gp, random or grid.
        seed: of the sampler.
        loss: `(what the model gives, labels) -> scalar`, the mean over the examples.
        calibration: examples to calibrate with.
        output: directory where the study is kept, so that it can be gone on with.
        storage: URL of Optuna's storage; by default a SQLite file in `output`, or memory.
        resume: go on with the study in `output` or `storage`; where there is none, start.
        workers: points that are scored at a time, each by a process of Ray to which the model and the data travel once; 0: one,
            in this process. What the score looks at travels too.
        track: whether MLflow keeps a run for each score, in `output` or where MLFLOW_TRACKING_URI says.
        example_inputs: what the model is called with, as for `find_mlps`; by default two examples of the data.

    Returns:
        What was found; of an interrupted search what there is by then.

    Raises:
        ReductionError: too few examples, a budget that no point keeps, a study of another model, or a score that fails again
            and again.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    refuse_wrapped(model, "tune")
    check_whole("tune: calibration", calibration, least=FEWEST)
    check_whole("tune: workers", workers, least=0)
    if workers and (device := next(model.parameters()).device).type != "cpu":
        raise ReductionError(
            f"tune: workers={workers} score on processors, and the model is on {device}; leave workers out"
        )
    if timeout is not None:
        check_number("tune: timeout", timeout)
    texts = (budget,) if isinstance(budget, str) else budget
    if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(text, str) for text in texts):
        raise ReductionError(f'tune: budget is {budget!r}; write one such as budget="params<=0.67", or a list of them')
    place = None if output is None else Path(output).resolve()
    if track and place is None and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise ReductionError(
            "tune: track=True needs a place for MLflow's runs; give output, or set MLFLOW_TRACKING_URI"
        )
    fitted, held = read_twofold(model, data, calibration, labels=loss is not None)
    valued = score or likeness(model, held, loss)
    fitted, loss = (fitted, loss) if loss is not None else distance_of(model, fitted, seed)
    inputs = fitted[0][0][:2].inputs if example_inputs is None else example_inputs
    name = type(model).__name__
    console = screen()
    with Pulse(console, f"tune {name}: checking the space"):
        hand = ModelInHand(name, model, fitted, loss, inputs, held)
        timed = None if place is None else place / _TIMES
        if any(re.match(r"\s*latency\b", text) for text in texts):
            # measured again, the limit and every cost would be others
            if resume and timed is not None and timed.exists():
                hand.table = LatencyTable.load(timed)
            else:
                hand.measure_latency()
        pricer, found = Pricer(hand), load_space(space)
        budgets = read_budgets(texts, pricer.price(Suggestion((), {})).cost)
        hand.budgets = budgets
        fixed: dict[str, Any] = {"objectives": ("score",), "pruner": "none", "seeds": Scoring.parts, "workers": workers}
        given = {"name": f"{found.name}-{name}", "trials": trials, "budgets": texts, "sampler": sampler, "seed": seed}
        settings = make_settings("tune", {**fixed, **given})
        walker = Walker(found, pricer)
        walker.check()
        check_budgets(found, walker, budgets)
        facts = {"model": hand.digest, "data": digest_of([*fitted, *held]), "score": _name(valued)}
        references = _references(hand, pricer, budgets)
        if place is not None:
            place.mkdir(parents=True, exist_ok=True)
        home = (place or Path()) if track else None
        valuer = Scoring(settings, hand, references, facts, home)
    url = storage or ("" if place is None else f"sqlite:///{place}/optuna.db")
    until = time.monotonic() + (float("inf") if timeout is None else timeout)
    began, interrupted = time.monotonic(), False
    folders = [str(folder) for folder in dict.fromkeys((place, folder_of(url) if url else None)) if folder is not None]

    def owner() -> Owner:
        return Owner(settings, found, pricer, valuer, url, resume)

    with team(workers, owner, Scorer(hand, valued), directories=folders) as hands:
        if hand.table is not None and timed is not None:
            hand.table.save(timed)  # only now is the directory this study's
        with Pulse(console, f"tune {name}: scoring the whole model") as pulse:
            try:
                drive(hands, trials, pulse, lambda trained: None, "scoring", lambda value: f"score {value:.4f}", until)
            except KeyboardInterrupt:
                interrupted = True
                pulse.line("interrupted; what was found by then follows", "yellow")
        document = hands.call("document", time.monotonic() - began)
        if not interrupted:
            hands.call("publish", metrics_of(document), [])
    return Tuning(document, hand)


class Tuning:
    """What `tune` has found."""

    def __init__(self, found: StudyDocument, hand: ModelInHand) -> None:
        self._found, self._hand = found, hand
        self._plans: dict[str, list[Plan]] = {}

    @cached_property
    def document(self) -> dict[str, Any]:
        """All that is known, as JSON values."""
        return self._found.as_json()

    @property
    def points(self) -> list[dict[str, Any]]:
        """All points that were scored, the references too."""
        return [point for point in self.document["points"] if point["values"]]

    @property
    def front(self) -> list[dict[str, Any]]:
        """The points that no other dominates, best score first."""
        found = [point for point in self.points if point["front"]]
        return sorted(found, key=lambda point: -point["values"]["score"])

    @property
    def best(self) -> Plan:
        """The plan of the best score: `mlpreduce.apply(model, tuning.best)`.

        Raises:
            ReductionError: no point was scored, or the best one takes several steps: see `plans`.
        """
        found = self.plans
        if len(found) != 1:
            raise ReductionError(
                f"tune: the best point, {self.front[0]['name']}, takes {len(found)} steps; carry them out one after the other: "
                f"for plan in tuning.plans: mlpreduce.apply(model, plan)"
            )
        return found[0]

    @property
    def plans(self) -> list[Plan]:
        """The plans of the steps of the best score, each for the model after those before it.

        Raises:
            ReductionError: no point was scored.
        """
        if not self.front:
            raise ReductionError("tune: no point was scored")
        return self.plans_of(self.front[0])

    def plans_of(self, point: Mapping[str, Any]) -> list[Plan]:
        """Make the plans of a point, repaired in the way that scored better, each for the model after those before it.

        Args:
            point: one of `points` or `front`.
        """
        if point["key"] not in self._plans:
            better = max(point["runs"], key=lambda run: run["score"])
            self._plans[point["key"]] = self._hand.reduced(point["steps"], quick=better["seed"] == QUICK)[1]
        return self._plans[point["key"]]

    def plot(self) -> Any:
        """Draw the points by size and score, with the front and the references, as a matplotlib `Figure`.

        Raises:
            ReductionError: no point was scored.
        """
        from mlpreduce.report.search_front import draw_front

        drawn = draw_front(self._found)
        if drawn is None:
            raise ReductionError("tune: no point was scored")
        return drawn[0]

    def __str__(self) -> str:
        from mlpreduce.report.pages import for_console
        from mlpreduce.report.search import front_table

        return for_console(front_table(self._found), words=2).text(width())

    def __repr__(self) -> str:
        best = self.front[0] if self.front else None
        told = "" if best is None else f", best score {best['values']['score']:.4f}"
        return f"<Tuning of {self._hand.name}: {len(self.points)} points{told}>"

    def _repr_html_(self) -> str:
        """Write the front and the references as an HTML table for notebooks."""
        from mlpreduce.report.search import front_table
        from mlpreduce.words.markup import html_table

        table = front_table(self._found)
        return html_table(table.headers, table.rows, caption=f"{self._hand.name}: {table.title}")

    def save(self, directory: str | Path) -> list[Path]:
        """Write the document and its report into a directory; the files written."""
        from mlpreduce.records import store
        from mlpreduce.report.search import build_search

        place = Path(directory)
        place.mkdir(parents=True, exist_ok=True)
        store(place, "study.json", self.document)
        return [place / "study.json", *build_search(self._found, place)]


def _name(score: Score) -> str:
    """A function's own; of what is none its class's."""
    return str(getattr(score, "__qualname__", type(score).__name__))


def _references(hand: ModelInHand, pricer: Pricer, budgets: Sequence[Budget]) -> dict[str, Point]:
    """The whole model, the paper's reductions without training, and equal parts of all MLPs at the budget, as far as the model
    has them: its MLPs may not be alike enough to share, or a budget beyond all widths."""

    def priced(*steps: Mapping[str, Any]) -> Point:
        return pricer.price(Suggestion(tuple(map(dict, steps)), {}))

    found = {"baseline": priced()}
    for name, more in (("grouped", {"scale": "none"}), ("shallow", {})):
        with suppress(ReductionError):
            found[name] = priced({**REFERENCES[name][0], **more, "repair": "parallel"})
    with suppress(ReductionError):
        steps = max(mlp.hidden_features for mlp in hand.mlps)
        if widths := hand.allotment.widths(budgets, "uniform", {}, steps):
            found["uniform"] = priced(sliced(widths))
    return found
