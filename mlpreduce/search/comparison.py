"""Studies compared at equal cost: hypervolume pair by pair, as a document and as tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import optuna

from mlpreduce.errors import ReductionError
from mlpreduce.recipe import differences
from mlpreduce.search.answer import history, reference_values
from mlpreduce.search.study.front import hypervolume, losses
from mlpreduce.words.console import Column, Grid

__all__ = ["Comparison", "compare", "compared", "comparison_text"]

_HEADERS = (
    "studies",
    "epochs of the baseline spent by each",
    "complete trials",
    "best top-1 %",
    "hypervolume",
    "ratio",
)


@dataclass(frozen=True)
class Comparison:
    """Two studies of one recipe and its objectives, at equal cost.

    Attributes:
        spent: what the one that spent less has spent, in epochs of the baseline; trials that ended later are left out.
        volumes: hypervolume of each.
        trials: complete trials of each, within what was spent.
        best: highest top-1 of each, percent.
    """

    spent: float
    volumes: tuple[float, float]
    trials: tuple[int, int]
    best: tuple[float, float]

    @property
    def ratio(self) -> float:
        """Hypervolume of the first over that of the second."""
        return self.volumes[0] / self.volumes[1] if self.volumes[1] else float("inf")


def compare(one: Sequence[optuna.Study], other: Sequence[optuna.Study]) -> list[Comparison]:
    """Compare studies pair by pair by the hypervolume of their fronts, at what the one that spent less has spent.

    The reference point is the baseline's cost and the lowest top-1 of any trial, the same for all pairs. Only values of the
    first seed are taken, as all trials have it.

    Raises:
        ReductionError: unlike numbers of studies, or studies of unlike recipes, seeds or objectives.
    """
    if len(one) != len(other) or not one:
        raise ReductionError(f"search compare: {len(one)} studies against {len(other)}; give as many of each, in pairs")
    every = [*one, *other]
    first = every[0].user_attrs
    for study in every[1:]:
        wrong = differences(first["recipe"], study.user_attrs["recipe"])
        for key in ("objectives", "seeds"):
            ours, theirs = first["settings"][key], study.user_attrs["settings"][key]
            wrong += (
                [f"{key}: {ours} and {theirs}"]
                if ours[:1] != theirs[:1] or (key == "objectives" and ours != theirs)
                else []
            )
        if wrong:
            raise ReductionError(
                f"search compare: {every[0].study_name} and {study.study_name} differ:\n  " + "\n  ".join(wrong)
            )
    objectives = first["settings"]["objectives"]
    top = objectives.index("top1")
    trials = [loss for study in every for _, loss in history(study)]
    if not trials:
        raise ReductionError("search compare: no trial is complete")
    worst = list(losses(reference_values(every[0]), objectives))
    worst[top] = max(loss[top] for loss in trials)
    found = []
    for pair in zip(one, other, strict=True):
        paths = [history(study) for study in pair]
        cost = min(max((total for total, _ in path), default=0.0) for path in paths)
        kept = [[loss for total, loss in path if total <= cost] for path in paths]
        volumes = [hypervolume(points, worst) for points in kept]
        best = [max((-loss[top] for loss in points), default=0.0) for points in kept]
        found.append(Comparison(cost, (volumes[0], volumes[1]), (len(kept[0]), len(kept[1])), (best[0], best[1])))
    return found


def compared(names: Sequence[Sequence[str]], sides: Sequence[Sequence[optuna.Study]]) -> dict[str, Any]:
    """Compare the first side with each of the others, as plain lists and dictionaries.

    Args:
        names: of the studies of each side: output directories, of which the last part is kept, or what storage calls them.
        sides: the studies; as many on each side.

    Raises:
        ReductionError: as `compare`.
    """
    short = [[Path(name).name for name in side] for side in names]
    return {
        "schema": 1,
        "comparisons": [
            [
                {"studies": [ours, theirs], **asdict(found), "ratio": found.ratio}
                for found, ours, theirs in zip(compare(sides[0], side), short[0], other, strict=True)
            ]
            for other, side in zip(short[1:], sides[1:], strict=True)
        ],
    }


def comparison_text(document: dict[str, Any], columns: int | None = None) -> str:
    """Write what `compared` gives as tables: markdown, or for a console so many columns wide."""
    parts = []
    for pairs in document["comparisons"]:
        rows = [
            (
                ", ".join(pair["studies"]),
                f"{pair['spent']:.1f}",
                ", ".join(str(count) for count in pair["trials"]),
                ", ".join(f"{top1:.2f}" for top1 in pair["best"]),
                ", ".join(f"{volume:.6g}" for volume in pair["volumes"]),
                f"{pair['ratio']:.3f}",
            )
            for pair in pairs
        ]
        if columns is None:
            lines = [f"| {' | '.join(cells)} |" for cells in (_HEADERS, *rows)]
            parts.append("\n".join([lines[0], "|---|---|---|---|---|---|", *lines[1:]]))
        else:
            cells = zip(_HEADERS, zip(*rows, strict=True), strict=True)
            table = [Column(header, list(column), left=n == 0) for n, (header, column) in enumerate(cells)]
            parts.append(Grid("", table).text(columns))
        ratios = [pair["ratio"] for pair in pairs]
        if len(ratios) > 1:
            spread = f"{min(ratios):.3f} to {max(ratios):.3f} over {len(ratios)} pairs"
            parts.append(f"ratio: mean {fmean(ratios):.3f}, {spread}")
    return "\n\n".join(parts)
