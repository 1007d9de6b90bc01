"""Candidates for a supernet: drawn from a search space, ranked by their estimates, and held against what was trained.

Candidates are ranked by the estimated loss and not by the estimated top-1: of a few hundred images the top-1 has steps of
some tenths of a point, many candidates tie, and the loss still tells them apart.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution

from mlpreduce.budget import COSTS
from mlpreduce.errors import ReductionError
from mlpreduce.search.spaces.choices import Walker, any_of, numbers_of
from mlpreduce.search.spaces.goals import Budget
from mlpreduce.search.spaces.points import Point, Pricer
from mlpreduce.train.settings import SupernetSettings

__all__ = ["Agreement", "Candidate", "agreement", "front_of", "sample", "supernet_of"]

_FAILURES = 5  # walks from random points that find nothing new before a space is taken as exhausted
_GOLDEN = (math.sqrt(5) - 1) / 2
_MANY = 32  # options up to which a level is the chance of a step
_SPREAD = 0.1  # standard deviation of a choice around its level, where there are more
_RESAMPLES = 9999
_FEWEST = 5  # points from which an interval is given


@dataclass(frozen=True)
class Candidate:
    """A point of a space.

    Attributes:
        choices: values by parameter, as `enqueue_trial` of Optuna's study takes them.
        point: what they come to.
    """

    choices: dict[str, Any]
    point: Point


def sample(walker: Walker, pricer: Pricer, budgets: Sequence[Budget], number: int, seed: int = 0) -> list[Candidate]:
    """Distinct points of a space within budgets, over the whole range of costs.

    Every second one is drawn uniformly. Many such choices average out, and the costs lie in the middle of their range; so for
    the others a level between 0 and 1 is drawn first, and each choice near that quantile of its options. The levels
    themselves are spread evenly (additive recurrence with the golden ratio), and the first are the ends, 0 and 1.

    Args:
        walker: asks the space.
        pricer: prices its points, as the walker does.
        budgets: what a point must keep.
        number: how many; fewer where no more are found.
        seed: of the draws.

    Raises:
        ReductionError: the space also sets how a point is trained, which a supernet cannot tell apart.
    """
    generator = random.Random(seed)
    found: dict[str, Candidate] = {}

    def wanted(point: Point) -> bool:
        if point.settings:
            raise _Settings(", ".join(point.settings))
        return point.key not in found and all(budget.excess(point.cost) <= 0 for budget in budgets)

    def any_other(distribution: BaseDistribution) -> Any:
        return any_of(distribution, generator)

    def draw(
        other: Callable[[BaseDistribution], Any], given: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, Any], bool]:
        suggestion, choices, _ = walker.ask(given or {}, other)
        try:
            return choices, wanted(pricer.price(suggestion))
        except ReductionError:  # it cannot be carried out
            return choices, False

    def at_level(level: float) -> dict[str, Any] | None:
        choices, good = draw(lambda distribution: _near_level(distribution, level, generator))
        return choices if good else None

    def uniform() -> dict[str, Any] | None:
        drawn, good = choices, good = draw(any_other)
        for tenths in range(1, 10 if cheap and not good else 1):  # above a budget: cheaper, as far as is needed
            mended = {name: value for name, value in cheap.items() if generator.random() < tenths / 10}
            choices, good = draw(any_other, {**drawn, **mended})
            if good:
                break
        return choices if good else walker.near(drawn, wanted, generator, cheap or None)

    cheap = walker.cheapest(budgets[0].cost, budgets)[0] if budgets else {}
    start, failures, turn = generator.random(), 0, 0
    try:
        while len(found) < number and failures < _FAILURES:
            if turn % 2 == 0:
                level = turn / 2 if turn < 4 else (start + turn / 2 * _GOLDEN) % 1
                taken = at_level(level)
            else:
                taken = uniform()
                failures = failures + 1 if taken is None else 0
            turn += 1
            if taken is not None:
                point = pricer.price(walker.ask(taken)[0])
                found[point.key] = Candidate(taken, point)
    except _Settings as error:
        raise ReductionError(
            f"supernet: the space also sets {error}, and all sub-models of one model are trained alike; search "
            f"it without a supernet"
        ) from error
    return list(found.values())


class _Settings(Exception):
    """A point has settings of its own."""


def _near_level(distribution: BaseDistribution, level: float, generator: random.Random) -> Any:
    """A choice near a quantile: the lowest or first for 0, the highest or last for 1.

    Of few options the number is drawn from a binomial distribution, so of two each is drawn at its rate.
    """
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[_step(len(distribution.choices), level, generator)]
    numbers = numbers_of(distribution)
    low, high, step = numbers.low, numbers.high, numbers.step
    if not step or numbers.log:
        part = _part(level, generator)
        value = low * (high / low) ** part if numbers.log else low + (high - low) * part
        return round(value) if isinstance(distribution, IntDistribution) else min(max(value, low), high)
    value = low + _step(round((high - low) / step) + 1, level, generator) * step
    return value if isinstance(distribution, IntDistribution) else float(value)


def _step(options: int, level: float, generator: random.Random) -> int:
    if options <= _MANY:
        return sum(generator.random() < level for _ in range(options - 1))
    return round(_part(level, generator) * (options - 1))


def _part(level: float, generator: random.Random) -> float:
    return level if level in (0, 1) else min(1.0, max(0.0, generator.gauss(level, _SPREAD)))


def supernet_of(walker: Walker, candidates: Sequence[Candidate], per_update: int = 2) -> SupernetSettings:
    """The sub-models that a supernet for candidates is trained with: these, and the smallest of the space.

    Raises:
        ReductionError: there is no candidate.
    """
    if not candidates:
        raise ReductionError("supernet: no point of the space keeps the budgets, so there is nothing to train")
    _, smallest = walker.cheapest("params")
    points = tuple(candidate.point.steps for candidate in candidates)
    return SupernetSettings(points=points, smallest=smallest.steps, per_update=per_update)


def front_of(
    candidates: Sequence[Candidate], estimates: Sequence[Mapping[str, float]], objectives: Sequence[str], number: int
) -> list[int]:
    """The candidates that are worth training, by index.

    First those that no other beats in the estimated loss and in the exact costs among the objectives, then those that only
    these beat, and so on. Of a front that has more than are missing, some over its whole length are taken. A latency is not
    known before it is measured, and left out.

    Args:
        candidates: points with their costs.
        estimates: of each, `loss` in nats.
        objectives: of the study.
        number: how many.

    Returns:
        Indices: front by front, each from the lowest loss to the highest.
    """
    costs = [name for name in objectives if name in COSTS]
    rows = [
        [_finite(estimate["loss"]), *(float(getattr(candidate.point.cost, name)) for name in costs)]
        for candidate, estimate in zip(candidates, estimates, strict=True)
    ]
    values: NDArray[np.float64] = np.array(rows, dtype=np.float64).reshape(len(rows), 1 + len(costs))
    left = np.arange(len(rows))
    chosen: list[int] = []
    while len(chosen) < number and len(left):
        rest = values[left]
        beaten = np.array([bool(((rest <= row).all(1) & (rest < row).any(1)).any()) for row in rest])
        front = left[~beaten]
        front = front[np.lexsort(values[front].T[::-1])]
        missing = number - len(chosen)
        if len(front) > missing:
            front = front[np.round(np.linspace(0, len(front) - 1, missing)).astype(int)] if missing > 1 else front[:1]
        chosen += front.tolist()
        left = left[beaten]
    return chosen


def _finite(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


@dataclass(frozen=True)
class Agreement:
    """How well estimates rank points, measured on some that were trained. 1: the same order; 0: none; -1: the reverse.

    Attributes:
        n: points.
        kendall: Kendall's tau-b of estimated loss (negated) and trained top-1.
        spearman: Spearman's rho of the same.
        low, high: 95 % interval of `spearman`, by a bootstrap over the points.
        p_value: how often a random order would agree as much or more, in either direction (permutations).
        size_kendall, size_spearman: the same of the size alone and the trained top-1: what is known without a supernet.
        reason: why numbers are missing, or are to be read with care; empty if they are not.
    """

    n: int
    kendall: float | None = None
    spearman: float | None = None
    low: float | None = None
    high: float | None = None
    p_value: float | None = None
    size_kendall: float | None = None
    size_spearman: float | None = None
    reason: str = ""


def agreement(estimated: Sequence[float], trained: Sequence[float], size: Sequence[float]) -> Agreement:
    """Whether estimates rank points as training does.

    Args:
        estimated: losses in nats, less is better.
        trained: top-1 of the same points, each trained by itself, in percent.
        size: their parameters, or another cost.

    Source:
        M. Kendall, "The treatment of ties in ranking problems", Biometrika 33 (1945), for tau-b; C. Spearman, "The proof and
        measurement of association between two things" (1904). The points must be drawn at random: among those of an estimated
        front a good order tells little.

    Example:
        >>> found = agreement([0.5, 0.4, 0.3, 0.2], [90, 92, 91, 95], [10, 20, 30, 40])
        >>> round(found.kendall, 3), round(found.spearman, 3)
        (0.667, 0.8)
    """
    rows = zip(estimated, trained, size, strict=True)
    kept = [row for row in rows if all(math.isfinite(value) for value in row)]
    gone = len(estimated) - len(kept)
    lost = f"{gone} of {len(estimated)} points have no finite value and are left out" if gone else ""
    if len(kept) < 3:
        return Agreement(len(kept), reason=_joined(f"{len(kept)} points are too few for a rank correlation", lost))
    loss, top1, params = (np.array(column, dtype=np.float64) for column in zip(*kept, strict=True))
    if _constant(top1):
        return Agreement(len(kept), reason=_joined("all points were trained to the same top-1", lost))
    size_kendall, size_spearman = (None, None) if _constant(params) else _correlations(params, top1)
    same_size = "all points have the same size" if _constant(params) else ""
    if _constant(loss):
        why = _joined("all estimates are the same", same_size, lost)
        return Agreement(len(kept), size_kendall=size_kendall, size_spearman=size_spearman, reason=why)
    kendall, spearman = _correlations(-loss, top1)
    low, high = _interval(-loss, top1) if len(kept) >= _FEWEST else (None, None)
    few = f"{len(kept)} points are too few to conclude" if len(kept) < 2 * _FEWEST else ""
    return Agreement(
        n=len(kept),
        kendall=kendall,
        spearman=spearman,
        low=low,
        high=high,
        p_value=_p_value(-loss, top1),
        size_kendall=size_kendall,
        size_spearman=size_spearman,
        reason=_joined(few, same_size, lost),
    )


def _joined(*reasons: str) -> str:
    return "; ".join(reason for reason in reasons if reason)


def _constant(values: NDArray[np.float64]) -> bool:
    return bool((values == values[0]).all())


def _correlations(one: NDArray[np.float64], other: NDArray[np.float64]) -> tuple[float, float]:
    from scipy import stats

    return float(stats.kendalltau(one, other).statistic), float(_rho(one[None], other[None])[0])


def _rho(one: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
    """Spearman's rho of each row (rows, n); NaN where a row is constant."""
    from scipy import stats

    a, b = (
        ranks - ranks.mean(1, keepdims=True) for ranks in (stats.rankdata(one, axis=1), stats.rankdata(other, axis=1))
    )
    size = np.sqrt((a * a).sum(1) * (b * b).sum(1))
    found: NDArray[np.float64] = np.divide((a * b).sum(1), size, out=np.full(len(size), np.nan), where=size > 0)
    return found


def _interval(one: NDArray[np.float64], other: NDArray[np.float64]) -> tuple[float, float]:
    """The 95 % percentile interval of rho: points are drawn with replacement; draws of one value only tell nothing."""
    drawn = np.random.default_rng(0).integers(len(one), size=(_RESAMPLES, len(one)))
    low, high = np.nanquantile(_rho(one[drawn], other[drawn]), [0.025, 0.975])
    return float(low), float(high)


def _p_value(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Two-sided, over all orders where these are few, else over random ones."""
    from scipy import stats

    ranks = stats.rankdata(other)

    def statistic(orders: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
        moved = np.moveaxis(orders, axis, -1)
        centred = ranks - ranks.mean()
        found: NDArray[np.float64] = moved @ centred / np.sqrt(moved.var(-1) * len(ranks) * (centred @ centred))
        return found

    tested = stats.permutation_test(
        (stats.rankdata(one),),
        statistic,
        permutation_type="pairings",
        n_resamples=_RESAMPLES,
        vectorized=True,
        rng=np.random.default_rng(0),
    )
    return float(tested.pvalue)
