"""Walks through the choices of a search space without training: checks it, finds its cheapest points, mends costly ones."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from mlpreduce.errors import ReductionError
from mlpreduce.search.spaces.goals import Budget
from mlpreduce.search.spaces.points import Point, Pricer
from mlpreduce.search.spaces.space import Space, Suggestion

__all__ = ["Walker", "any_of", "numbers_of"]

_RANDOM = 20  # points that a check tries at random, besides all single changes
_NEAR = 200  # points that are tried near another one
_ANYWHERE = 2000  # points that are tried beyond, before none is said to be left; most were priced before
_MANY = 12  # choices of one parameter of which a check tries all


class _Given(optuna.samplers.BaseSampler):
    """Takes the choices it is given and remembers between what they were made."""

    def __init__(self, choices: Mapping[str, Any], other: Callable[[BaseDistribution], Any]) -> None:
        self._choices, self._other = choices, other
        self.seen: dict[str, BaseDistribution] = {}

    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
        return {}

    def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: BaseDistribution) -> Any:
        self.seen[param_name] = param_distribution
        given = self._choices.get(param_name)
        if param_name in self._choices and _contains(param_distribution, given):
            return given
        return self._other(param_distribution)


class Walker:
    """Asks a space for points of given choices.

    Args:
        space: the search space.
        pricer: prices its points.
    """

    def __init__(self, space: Space, pricer: Pricer) -> None:
        self._space, self._pricer = space, pricer
        self._model = pricer.model

    def ask(
        self, choices: Mapping[str, Any], other: Callable[[BaseDistribution], Any] | None = None
    ) -> tuple[Suggestion, dict[str, Any], dict[str, BaseDistribution]]:
        """What the space suggests for choices.

        Args:
            choices: values by parameter; those out of range are not taken.
            other: chooses for all other parameters; by default the lowest, or the first.

        Returns:
            The suggestion, all choices made, and between what they were made.

        Raises:
            ReductionError: the space suggests what does not exist, or fails.
        """
        sampler = _Given(choices, other or (lambda distribution: _options(distribution)[0]))
        trial = optuna.create_study(sampler=sampler).ask()
        try:
            suggestion = self._space.suggest(trial, self._model)
        except ReductionError:
            raise
        except Exception as error:  # whatever the user's function raises
            raise ReductionError(f"search space {self._space.name}: {type(error).__name__}: {error}") from error
        return suggestion, dict(trial.params), sampler.seen

    def check(self) -> list[Point]:
        """Try the space before anything is trained: its own points, each choice of each parameter, and some at random.

        Returns:
            The points that can be carried out.

        Raises:
            ReductionError: a name does not exist, one of the space's own points is out of range, or no point can be
                carried out.
        """
        generator = random.Random(0)
        found: dict[str, Point] = {}
        problems: list[str] = []

        def visit(
            choices: Mapping[str, Any], other: Callable[[BaseDistribution], Any] | None = None
        ) -> tuple[dict[str, Any], dict[str, BaseDistribution]]:
            suggestion, taken, seen = self.ask(choices, other)
            try:
                point = self._pricer.price(suggestion)
                found[point.key] = point
            except ReductionError as error:
                problems.append(str(error))
            return taken, seen

        for given in self._space.starts(self._model):
            taken, seen = visit(given)
            if wrong := {name: value for name, value in given.items() if name not in taken or taken[name] != value}:
                places = ", ".join(
                    f"{name}={value!r} ({seen.get(name, 'no such parameter')})" for name, value in wrong.items()
                )
                raise ReductionError(f"search space {self._space.name}: POINTS has what it does not suggest: {places}")
        tried: set[str] = set()
        waiting = [visit({})]
        while waiting:  # a choice may bring new parameters
            taken, seen = waiting.pop()
            for name, distribution in seen.items():
                if name not in tried:
                    tried.add(name)
                    waiting += [visit({**taken, name: value}) for value in _options(distribution, all_of=_MANY)]
        for _ in range(_RANDOM):
            visit({}, lambda distribution: any_of(distribution, generator))
        if not found:
            raise ReductionError(
                f"search space {self._space.name}: none of {len(problems)} points can be carried out: {problems[0]}"
            )
        return list(found.values())

    def cheapest(self, cost: str, budgets: Sequence[Budget] = ()) -> tuple[dict[str, Any], Point]:
        """The point of the least cost, by changing one choice after the other as long as that lowers it.

        Exact where each choice lowers the cost whatever the others are, as widths and patterns do.

        Args:
            cost: a field of `Cost`.
            budgets: how far a point is above them counts before the cost.

        Raises:
            ReductionError: no point can be carried out.
        """

        def visit(
            choices: Mapping[str, Any],
        ) -> tuple[tuple[float, int], dict[str, Any], Point, dict[str, BaseDistribution]] | None:
            suggestion, taken, seen = self.ask(choices)
            try:
                point = self._pricer.price(suggestion)
            except ReductionError:
                return None
            above = sum(max(0, budget.excess(point.cost)) / budget.limit for budget in budgets)
            return (above, getattr(point.cost, cost)), taken, point, seen

        starts = [found for start in (*self._space.starts(self._model), {}) if (found := visit(start)) is not None]
        generator = random.Random(0)
        for _ in range(_RANDOM if not starts else 0):
            _, taken, _ = self.ask({}, lambda distribution: any_of(distribution, generator))
            starts += [found] if (found := visit(taken)) is not None else []
        if not starts:
            raise ReductionError(f"search space {self._space.name}: no point can be carried out")
        best = min(starts, key=lambda found: found[0])
        improved = True
        while improved:
            improved = False
            for name in list(best[3]):
                for value in _options(best[3][name], all_of=_MANY) if name in best[3] else ():
                    found = visit({**best[1], name: value})
                    if found is not None and found[0] < best[0]:
                        best, improved = found, True
        return best[1], best[2]

    def near(
        self,
        choices: Mapping[str, Any],
        wanted: Callable[[Point], bool],
        generator: random.Random,
        cheap: Mapping[str, Any] | None = None,
    ) -> dict[str, Any] | None:
        """Choices near others whose point is wanted: few are changed at first, then more and more, then all.

        Args:
            choices: where to begin.
            wanted: whether a point is.
            generator: decides what is changed.
            cheap: choices of a cheap point; the more is changed, the more to these, and any part of them when all is.

        Returns:
            The choices, or None where none were found.
        """

        def other(distribution: BaseDistribution) -> Any:
            return any_of(distribution, generator)

        for attempt in range(_NEAR + _ANYWHERE):
            _, taken, seen = self.ask(choices, other)
            far = min(1.0, attempt / (_NEAR - 1))
            pull = far if attempt < _NEAR else generator.random()
            names = generator.sample(sorted(seen), max(1, round(far * len(seen)))) if seen else []
            given = {**taken, **{name: other(seen[name]) for name in names}}
            if cheap is not None:
                given |= {name: cheap[name] for name in names if name in cheap and generator.random() < pull}
            suggestion, taken, _ = self.ask(given, other)
            try:
                if wanted(self._pricer.price(suggestion)):
                    return taken
            except ReductionError:  # it cannot be carried out
                continue
        return None


def numbers_of(distribution: BaseDistribution) -> IntDistribution | FloatDistribution:
    """A distribution of numbers as such.

    Raises:
        ReductionError: it is one that Optuna's `suggest_` methods do not make.
    """
    if isinstance(distribution, IntDistribution | FloatDistribution):
        return distribution
    raise ReductionError(f"search space: {distribution!r}; suggest numbers by suggest_int or suggest_float")


def _options(distribution: BaseDistribution, all_of: int = 0) -> list[Any]:
    """Values to choose from: of categories all, of numbers both ends, or all if there are no more than `all_of`."""
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    numbers = numbers_of(distribution)
    low, high, step = numbers.low, numbers.high, numbers.step
    if step and not numbers.log and (high - low) / step < all_of:
        values = [low + number * step for number in range(round((high - low) / step) + 1)]
        return values if isinstance(distribution, IntDistribution) else list(map(float, values))
    return [low] if low == high else [low, high]


def any_of(distribution: BaseDistribution, generator: random.Random) -> Any:
    """A choice at random, on a logarithmic scale where the distribution has one."""
    if isinstance(distribution, CategoricalDistribution):
        return generator.choice(distribution.choices)
    numbers = numbers_of(distribution)
    low, high, step = numbers.low, numbers.high, numbers.step
    whole = isinstance(distribution, IntDistribution)
    if numbers.log:
        value = math.exp(generator.uniform(math.log(low), math.log(high)))
        return min(high, max(low, round(value) if whole else value))
    if not step:
        return generator.uniform(low, high)
    value = low + generator.randint(0, round((high - low) / step)) * step
    return value if whole else float(value)


def _contains(distribution: BaseDistribution, value: Any) -> bool:
    """Whether a value is one that can be chosen."""
    if isinstance(distribution, CategoricalDistribution):
        return any(value == choice and type(value) is type(choice) for choice in distribution.choices)
    numbers = numbers_of(distribution)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not numbers.low <= value <= numbers.high:
        return False
    steps = (value - numbers.low) / numbers.step if numbers.step else 0.0
    return abs(steps - round(steps)) < 1e-9
