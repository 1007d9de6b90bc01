"""Pictures of plans and models: `mlpreduce.plot`, and what a recipe's variants do to the MLPs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from torch import nn

from mlpreduce.edits import Plan, Row
from mlpreduce.errors import ReductionError, require
from mlpreduce.graph import Inputs, mlps_or_raise, refuse_wrapped
from mlpreduce.records import Record
from mlpreduce.reduction.applying import history
from mlpreduce.report.content import Picture
from mlpreduce.report.plotting import as_png
from mlpreduce.report.widths import Use, draw_widths
from mlpreduce.words.markup import shortened

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["FILE", "picture_of", "plot"]

FILE = "plans.png"
_MOST_PANELS = 12
_TITLE = 150  # characters


def plot(what: Plan | Sequence[Plan] | nn.Module, *, example_inputs: Inputs | None = None) -> Figure:
    """Draw a plan or a model: blocks side by side, the kept hidden width of each MLP, and which blocks share one.

    The height of a bar is the hidden width, its outline the width before the reduction. Blocks of one colour and number use
    the MLP of the block with that number. Nothing is changed, and pyplot is not used.

    Args:
        what: a plan, several plans such as `history(model)`, of which each is drawn after those before it, or a model, which
            is drawn as it is now.
        example_inputs: what a model is called with, as for `find_mlps`.

    Returns:
        A `matplotlib.figure.Figure`. A notebook shows it; `figure.savefig("plan.png")` writes it.

    Raises:
        ReductionError: matplotlib is not installed, there is nothing to draw, or the model has no MLPs.

    Example:
        >>> import mlpreduce
        >>> from mlpreduce.testing import tiny_vit
        >>> figure = plot(mlpreduce.plan(tiny_vit(), "grouped", group=2))
        >>> figure.axes[0].get_title()
        'grouped(group=2)'
    """
    require("mlpreduce.plot", "matplotlib")
    if isinstance(what, nn.Module):
        refuse_wrapped(what, "plot")
        calls = ", then ".join(made.call for made in history(what)) or "no history"
        title = shortened(f"{type(what).__name__}, {calls}", _TITLE)
        return draw_widths([(title, _of_model(what, example_inputs))])
    plans = [what] if isinstance(what, Plan) else what
    if not isinstance(plans, Sequence) or not all(isinstance(made, Plan) for made in plans):
        raise ReductionError(
            f"plot: a {type(what).__name__} was given; give a plan, a list of plans such as history(model), or a model"
        )
    if not plans:
        raise ReductionError("plot: the list has no plan; mlpreduce.plot(model) draws a model that is not reduced")
    if empty := next((made for made in plans if not made.rows), None):
        raise ReductionError(
            f"plot: {empty.call} lists no MLPs, as a plan made by hand; apply it, then mlpreduce.plot(model)"
        )
    titles = [shortened(("then " if number else "") + made.call, _TITLE) for number, made in enumerate(plans)]
    steps = _steps([made.rows for made in plans])
    return draw_widths(list(zip(titles, steps, strict=True)), columns=1)


def picture_of(records: Iterable[Record]) -> Picture | None:
    """Draw what the variants of some records do to the MLPs: a panel for each reduction, equal ones once.

    Returns:
        The picture; None where no record has a plan that lists MLPs.
    """
    panels: dict[tuple[Use, ...], list[str]] = {}
    for record in records:
        rows = [[Row(*row) for row in document["rows"]] for document in record.plans]
        if rows and all(rows):
            names = panels.setdefault(tuple(_steps(rows)[-1]), [])
            names += [record.variant] if record.variant not in names else []
    if not panels:
        return None
    shown = [(shortened(", ".join(names), 45), list(uses)) for uses, names in panels.items()]
    cut = f", the first {_MOST_PANELS} of {len(shown)}" if len(shown) > _MOST_PANELS else ""
    shared = any(use.owner != use.mlp for _, uses in shown[:_MOST_PANELS] for use in uses)
    colours = "; blocks of one colour use one MLP, that of the block with the number below the bar" if shared else ""
    caption = f"Hidden width of each block's MLP in the variants that reduce it{cut}{colours}"
    return Picture("MLPs of the variants", FILE, caption, as_png(draw_widths(shown[:_MOST_PANELS])))


def _of_model(model: nn.Module, inputs: Inputs | None) -> list[Use]:
    """The MLPs as they are now; how wide they were is known from the history."""
    found = mlps_or_raise(model, "plot", inputs).mlps
    full: dict[str, int] = {}
    for made in history(model):
        for row in made.rows:
            full.setdefault(row.mlp, row.hidden_before)
    widths = {mlp.name: max(full.get(mlp.name, 0), mlp.hidden_features) for mlp in found}
    return [Use(mlp.name, widths[mlp.name], mlp.hidden_features, mlp.owner) for mlp in found]


def _steps(plans: Sequence[Sequence[Row]]) -> list[list[Use]]:
    """The MLPs after each of several plans that follow each other, with the widths before the first one."""
    now: dict[str, Use] = {}
    steps = []
    for rows in plans:
        for row in rows:
            full = now[row.mlp].full if row.mlp in now else row.hidden_before
            now[row.mlp] = Use(row.mlp, max(full, row.hidden), row.hidden, row.owner)
        steps.append(list(now.values()))
    return steps
