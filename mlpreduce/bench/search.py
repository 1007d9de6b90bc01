"""What the search's driver adds to the training of its trials, beside Optuna alone: `python -m mlpreduce bench search`.

Ours is a study by `mlpreduce.search.run`: workers of Ray, Optuna's SQLite and MLflow's, prices, records. The peer is
`study.ask`, the same training in this process, and `study.tell`, with SQLite and nothing else: it is given the points that
ours trained, in their order, so both train the same to the same bits. Ours goes first, as the points are not known before.

Four times are known of each trial: Optuna was asked (its `datetime_start`), the training began and ended (noted around it,
on the worker), Optuna was told (its `datetime_complete`). With one worker the trials follow each other, so all that lies
between two asks and is not training is the driver's: suggestions that were not trained too, their prices, and records.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlpreduce.bench.rounds import Ratios, at_least_one, ends, ratio_text, ratios, spread, value_text
from mlpreduce.errors import ReductionError
from mlpreduce.plugins import add_option
from mlpreduce.recipe import Recipe
from mlpreduce.recipe.schema import load as load_recipe
from mlpreduce.search.bare import Clock, clocks, train_bare

__all__ = ["Comparison", "First", "Timing", "compare", "main", "timing"]

_EPOCHS = 20  # of digits_tiny: about 10 s on one core


@dataclass(frozen=True)
class Timing:
    """The trials of one tool, in seconds, in the order of their asks.

    Attributes:
        seconds: from the ask of a trial to the next ask; of the last, and with several workers of all, to its tell.
        training: the part of it that is training.
        ask_to_start: from the ask to the beginning of the training.
        end_to_tell: from the end of the training to the tell.
    """

    seconds: tuple[float, ...]
    training: tuple[float, ...]
    ask_to_start: tuple[float, ...]
    end_to_tell: tuple[float, ...]

    @property
    def overhead(self) -> tuple[float, ...]:
        """All of each trial that is not training."""
        return tuple(whole - part for whole, part in zip(self.seconds, self.training, strict=True))

    @property
    def percent(self) -> float:
        """The overhead of all trials, of their training."""
        return 100 * sum(self.overhead) / sum(self.training)

    def __str__(self) -> str:
        overhead = spread(statistics.mean(self.overhead), *ends(self.overhead), digits=3)
        columns = [value_text(self.seconds, "", digits=2), value_text(self.training, "", digits=2)]
        columns += [value_text(self.ask_to_start, "", digits=3), value_text(self.end_to_tell, "", digits=3)]
        return _COLUMNS.format(*columns, overhead, f"{self.percent:.2f}")


@dataclass(frozen=True)
class First:
    """A trial on a worker that has trained nothing before, and imports torch in its training: in no other number.

    Attributes:
        ask_to_start: seconds from the ask to the beginning of the training.
        training: seconds.
    """

    ask_to_start: float
    training: float


@dataclass(frozen=True)
class Comparison:
    """Our driver and Optuna alone, on the same points.

    Attributes:
        space: what was searched.
        recipe: how a point was trained.
        trials: that were trained by each.
        asked: trials that our study asked Optuna for: some are not trained, as they were before.
        workers: of ours.
        equal: trials that both trained with the same steps to the same top-1.
        ours: timing of `mlpreduce.search.run`.
        peer: timing of Optuna alone.
        first: trials of ours that are in no other number; with one worker, the baseline is its first.
        before: seconds of ours before the first ask: Ray, the check of the space, the baseline.
        after: seconds of ours after the last tell: the report, the end of Ray.
    """

    space: str
    recipe: str
    trials: int
    asked: int
    workers: int
    equal: int
    ours: Timing
    peer: Timing
    first: tuple[First, ...]
    before: float
    after: float

    @property
    def ratios(self) -> Ratios:
        """Ours over the peer's seconds of a trial: the ratio of the medians, then the least and the largest of a trial."""
        return ratios(self.ours.seconds, self.peer.seconds)

    def __str__(self) -> str:
        rows = [f"{'':<6}{_HEAD}", *(f"{name:<6}{timed}" for name, timed in (("ours", self.ours), ("peer", self.peer)))]
        lines = [f"ours / peer, seconds of a trial: {ratio_text(self.ratios)}"]
        same = "equal" if self.equal == self.trials else "not the same work"
        lines.append(f"same steps and top-1: {self.equal} of {self.trials} trials, {same}")
        for first in self.first:
            lines.append(f"first of a worker: {first.ask_to_start:.3f} s to start, {first.training:.2f} s of training")
        lines.append(f"once, ours: {self.before:.1f} s before the first ask, {self.after:.1f} s after the last tell")
        return "\n".join([*(row.rstrip() for row in rows), *(f"    {line}" for line in lines)])

    def to_json(self) -> str:
        """The comparison as one line of JSON."""
        document: dict[str, Any] = asdict(self) | {"ratios": self.ratios}
        for name, timed in (("ours", self.ours), ("peer", self.peer)):
            document[name] |= {"overhead": timed.overhead, "percent": timed.percent}
        return json.dumps(document)


_COLUMNS = "{:<24} {:<24} {:<24} {:<24} {:<24} {}"
_HEAD = _COLUMNS.format(
    "a trial, s (range)", "training, s", "ask to start, s", "end to tell, s", "overhead, s", "% of training"
)


def timing(found: Sequence[Clock], *, chained: bool, leave_out: int = 0) -> Timing:
    """What clocks come to.

    Args:
        found: in the order of their asks.
        chained: whether one trial was asked for after the other had been told.
        leave_out: so many of the first are in no number.
    """
    nexts = [clock.asked for clock in found[1:]] if chained else []
    untils = [*nexts, *(clock.told for clock in found[len(nexts) :])]
    counted = list(zip(found, untils, strict=True))[leave_out:]
    return Timing(
        seconds=tuple(until - clock.asked for clock, until in counted),
        training=tuple(clock.ended - clock.began for clock, _ in counted),
        ask_to_start=tuple(clock.began - clock.asked for clock, _ in counted),
        end_to_tell=tuple(clock.told - clock.ended for clock, _ in counted),
    )


def compare(space: str, recipe: Recipe, folder: Path, *, trials: int, workers: int = 1) -> Comparison:
    """Search with our driver, then train the same points with Optuna alone.

    Args:
        space: a name of `list_spaces`, or a path to a .py.
        recipe: how a point is trained; its first seed is taken.
        folder: where all of it is written.
        trials: points that are trained.
        workers: trials at a time of ours.

    Raises:
        ReductionError: a space or recipe that cannot be searched, or too few points.
    """
    from rich.console import Console

    from mlpreduce.search import run
    from mlpreduce.search.spaces.space import load_space
    from mlpreduce.search.verbs import open_study

    started = time.time()
    run(
        space,
        recipe,
        output=folder / "ours",
        storage=None,
        console=Console(quiet=True),
        trials=trials,
        workers=workers,
        seeds=recipe.seeds[:1],
        references=("baseline",),
        objectives=("top1", "params"),
        sampler="random",
        pruner="none",
    )
    ended = time.time()
    study = open_study(str(folder / "ours"))
    ours = clocks(study)
    cold = workers - 1  # the baseline is trained first, and each of the others begins with a trial
    if len(ours) <= cold:
        raise ReductionError(
            f"bench search: {len(ours)} trial(s) were trained, of which {cold} are the first of a worker; use more --trials or "
            f"fewer --workers"
        )
    (folder / "peer").mkdir()
    peer = train_bare(load_space(space), recipe, [clock.params for clock in ours], folder / "peer")
    return Comparison(
        space=study.user_attrs["space"]["name"],
        recipe=recipe.name,
        trials=len(ours),
        asked=len(study.trials),
        workers=workers,
        equal=sum((a.steps, a.top1) == (b.steps, b.top1) for a, b in zip(ours, peer, strict=True)),
        ours=timing(ours, chained=workers == 1, leave_out=cold),
        peer=timing(peer, chained=workers == 1, leave_out=cold),
        first=tuple(First(clock.began - clock.asked, clock.ended - clock.began) for clock in ours[:cold]),
        before=ours[0].asked - started,
        after=ended - max(clock.told for clock in ours),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0, or 2 after a ReductionError."""
    options = _parser().parse_intermixed_args(argv)
    try:
        at_least_one(options, ["trials", "workers", "epochs"], "search")
        words = [f"train.epochs={options.epochs}", "launch.device=cpu", *options.overrides]
        recipe = load_recipe(options.recipe, words, options.plugins)
        with tempfile.TemporaryDirectory(prefix="mlpreduce-bench-") as folder:
            result = compare(options.space, recipe, Path(folder), trials=options.trials, workers=options.workers)
        print(result.to_json() if options.json else f"{result}\n{_conditions(result, recipe, words)}", flush=True)
    except ReductionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _conditions(result: Comparison, recipe: Recipe, words: Sequence[str]) -> str:
    return (
        f"    space {result.space}, recipe {recipe.name} {' '.join(words)}; seed {recipe.seeds[0]}; trials of each: "
        f"{result.trials}, ours asked for {result.asked}; workers of ours: {result.workers}; threads: "
        f"{recipe.launch.threads}; CPU cores: {os.cpu_count()}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlpreduce bench search",
        description="What the driver of a search adds to the training of its trials, beside Optuna alone.",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change any key of the recipe")
    parser.add_argument(
        "--space", default="sharing_width", metavar="NAME", help="what is searched (default: sharing_width)"
    )
    parser.add_argument("--recipe", default="digits_tiny", metavar="NAME", help="how a point is trained (digits_tiny)")
    parser.add_argument("--trials", type=int, default=10, help="points that are trained by each (default: 10)")
    epochs = f"length of a trial (default: {_EPOCHS}: about 10 s of digits_tiny on one core)"
    parser.add_argument("--epochs", type=int, default=_EPOCHS, help=epochs)
    parser.add_argument("--workers", type=int, default=1, help="trials at a time of ours (default: 1)")
    parser.add_argument("--json", action="store_true", help="print JSON, one line")
    add_option(parser)
    return parser
