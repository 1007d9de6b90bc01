"""What the jobs of the bench share: turns, ratios, and how both are written."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from mlpreduce.errors import ReductionError
from mlpreduce.words.values import parse_pairs

__all__ = [
    "Ratios",
    "at_least_one",
    "check_file",
    "ends",
    "interval",
    "ratio_text",
    "ratios",
    "read_models",
    "reasons",
    "spread",
    "turns",
    "value_text",
]

Tool = TypeVar("Tool")
Ratios = tuple[float, float, float]


def turns(runs: int, tools: Sequence[Tool]) -> Iterator[Tool]:
    """`runs` rounds of all tools; every second round backwards, so that none always runs on what the other has left."""
    for turn in range(runs):
        yield from tools[:: 1 if turn % 2 == 0 else -1]


def ends(values: Sequence[float]) -> tuple[float, float]:
    """The least and the largest."""
    return min(values), max(values)


def ratios(ours: Sequence[float], peer: Sequence[float]) -> Ratios:
    """Ours over the peer's: the ratio of the medians, then the least and the largest of a round."""
    rounds = [a / b for a, b in zip(ours, peer, strict=True)]
    return statistics.median(ours) / statistics.median(peer), *ends(rounds)


def interval(values: Sequence[float]) -> Ratios:
    """The mean of at least two values, and the 95 % interval of it by Student's t."""
    from scipy.stats import sem, t

    mean, reach = statistics.mean(values), float(t.ppf(0.975, len(values) - 1) * sem(values))
    return mean, mean - reach, mean + reach


def spread(middle: float, low: float, high: float, *, digits: int = 2) -> str:
    """`middle (low to high)`."""
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def value_text(values: Sequence[float], failure: str, *, digits: int) -> str:
    """The median of what was measured, with the least and the largest; "not run" after a failure."""
    return "not run" if failure else spread(statistics.median(values), *ends(values), digits=digits)


def ratio_text(found: Ratios | None) -> str:
    """The ratio with its spread; empty where there is none."""
    return "" if found is None else spread(*found)


def reasons(ours: str, peer: str) -> list[str]:
    """A line for each tool that did not run, from its failure."""
    return [f"    {tool} not run: {reason}" for tool, reason in (("ours", ours), ("peer", peer)) if reason]


def check_file(path: Path | None, option: str) -> None:
    """Whether a file can be written, before what it is for is measured.

    Raises:
        ReductionError: there is no such folder.
    """
    if path is not None and not path.parent.is_dir():
        raise ReductionError(f"{option} {path}: there is no folder {path.parent}; make it, or choose another")


def read_models(words: Sequence[str], job: str) -> list[tuple[str, dict[str, Any]]]:
    """timm architectures with the arguments that follow each.

    Args:
        words: of the command line.
        job: for messages.

    Raises:
        ReductionError: an argument stands before the first architecture.
    """
    models: list[tuple[str, dict[str, Any]]] = []
    for word in words:
        if "=" not in word:
            models.append((word, {}))
        elif not models:
            raise ReductionError(f"bench {job} {word}: an argument of no model; write MODEL {word}")
        else:
            models[-1][1].update(parse_pairs([word]))
    return models


def at_least_one(options: argparse.Namespace, names: Sequence[str], job: str) -> None:
    """Raise a ReductionError for the first of the options `names` that is below 1."""
    for name in names:
        if getattr(options, name) < 1:
            flag = name.replace("_", "-")
            raise ReductionError(f"bench {job} --{flag} {getattr(options, name)}: it must be at least 1")
