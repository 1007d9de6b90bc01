"""The picture of plans and models, in `mlpreduce.plot` and in the reports of recipes."""

from __future__ import annotations

import importlib
import io
import pickle
import sys
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import timm
import torch
from helpers.records import a_record
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

import mlpreduce
from mlpreduce import ReductionError
from mlpreduce.edits import Plan, Row
from mlpreduce.records import Record
from mlpreduce.report import plans, widths
from mlpreduce.testing import tiny_vit

matplotlib.use("Agg")


def meta(name: str, **kwargs: Any) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


def texts(axis: Axes) -> list[str]:
    return [text.get_text() for text in axis.texts]


def heights(axis: Axes) -> list[float]:
    """Heights of the bars above zero: outline and kept width of each block in turn."""
    return [bar.get_height() for bar in axis.patches if bar.get_height() > 0]


def ticks(axis: Axes) -> list[str]:
    return [label.get_text() for label in axis.get_xticklabels()]


def test_a_plan_that_shares_shows_owners_by_number_and_colour() -> None:
    (axis,) = mlpreduce.plot(mlpreduce.plan(tiny_vit(), "grouped", group=2, pattern="cycle")).axes
    assert axis.get_title() == "grouped(group=2, pattern='cycle')"
    assert texts(axis) == ["128", "0", "128", "1", "128", "0", "128", "1"]
    assert ticks(axis) == ["0", "1", "2", "3"]
    assert heights(axis) == [128] * 8
    strips = [bar.get_facecolor() for bar in axis.patches if bar.get_height() < 0]
    assert strips[0] == strips[2] != strips[1] == strips[3]
    kept = [bar.get_facecolor() for bar in axis.patches if bar.get_height() > 0][1::2]
    assert kept[0] == strips[0]  # the block that holds the weights in full colour
    assert kept[2] != strips[2]  # the other one pale


def test_a_plan_that_slices_shows_widths_before_and_after() -> None:
    figure = mlpreduce.plot(mlpreduce.plan(tiny_vit(), "shallow", widths=[100, 50, 25, 128]))
    (axis,) = figure.axes
    assert texts(axis) == ["100", "50", "25", "128"]  # nothing is shared, so no owners
    assert heights(axis) == [128, 100, 128, 50, 128, 25, 128, 128]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["width before"]


def test_a_history_is_drawn_step_by_step() -> None:
    model = tiny_vit()
    mlpreduce.apply(model, "grouped", group=4)
    mlpreduce.apply(model, "shallow", width=32)
    first, second = mlpreduce.plot(mlpreduce.history(model)).axes
    assert (first.get_title(), second.get_title()) == ("grouped(group=4)", "then shallow(width=32)")
    assert texts(first) == ["128", "0"] * 4
    assert texts(second) == ["32", "0"] * 4
    assert heights(second) == [128, 32] * 4
    (now,) = mlpreduce.plot(model).axes
    assert now.get_title() == "VisionTransformer, grouped(group=4), then shallow(width=32)"
    assert texts(now) == texts(second)
    assert heights(now) == heights(second)
    (untied,) = mlpreduce.plot(mlpreduce.untie(model)).axes  # as the model is now
    assert texts(untied) == ["32"] * 4


def test_an_unreduced_model_of_stages() -> None:
    figure = mlpreduce.plot(meta("swin_tiny_patch4_window7_224"))
    (axis,) = figure.axes
    assert axis.get_title() == "SwinTransformer, no history"
    assert texts(axis) == [str(width) for width in (384, 384, 768, 768, *[1536] * 6, 3072, 3072)]
    assert ticks(axis) == ["0", "1", "0", "1", *map(str, range(6)), "0", "1"]
    (below,) = axis.child_axes
    assert [text.strip() for text in ticks(below)] == ["layers.0", "layers.1", "layers.2", "layers.3"]
    assert not figure.legends


def test_token_and_channel_mlps_have_a_row_each() -> None:
    model = meta("mixer_s32_224")
    mlpreduce.apply(model, "grouped", group=4)
    tokens, channels = mlpreduce.plot(model).axes
    assert tokens.get_ylabel() == "mlp_tokens\nhidden width"
    assert channels.get_ylabel() == "mlp_channels\nhidden width"
    assert texts(tokens) == ["256", "0"] * 4 + ["256", "4"] * 4
    assert texts(channels) == ["2048", "0"] * 4 + ["2048", "4"] * 4
    assert not {bar.get_facecolor() for bar in tokens.patches if bar.get_height() < 0} & {
        bar.get_facecolor() for bar in channels.patches if bar.get_height() < 0
    }


@pytest.mark.parametrize("depth", [12, 24, 48])
def test_texts_do_not_cover_each_other(depth: int) -> None:
    model = meta("vit_base_patch16_224", depth=depth)
    mlpreduce.apply(model, "grouped", group=2)
    figure = mlpreduce.plot(mlpreduce.apply(model, "shallow", width=1100))
    figure.draw_without_rendering()
    (axis,) = figure.axes
    found = [text.get_window_extent() for text in axis.texts]
    assert len(found) == 2 * depth
    for number, box in enumerate(found):
        assert box.count_overlaps(found[:number]) == 0
    labels = [label.get_window_extent() for label in axis.get_xticklabels()]
    assert all(box.count_overlaps(labels[:number]) == 0 for number, box in enumerate(labels))
    assert figure.get_figwidth() < 16
    (legend,) = figure.legends
    box, whole = legend.get_window_extent(), figure.bbox
    assert box.x0 >= 0
    assert box.x1 <= whole.x1


def test_names_of_any_kind_can_be_drawn() -> None:
    names = ("encoder.up", "$x_1$", "<script>", "", "a.b.c.d.e")
    rows = tuple(Row(name, "plain", 8, 4, name, name, 100, 50) for name in names)
    figure = mlpreduce.plot(Plan("mine$", {}, (), rows))
    assert figure.axes[0].get_title() == r"mine\$()"
    assert texts(figure.axes[0]) == ["4"] * len(names)
    figure.savefig(io.BytesIO(), format="png")


def test_a_figure_shows_itself_in_a_notebook_and_leaks_nothing() -> None:
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    figure = mlpreduce.plot(tiny_vit())
    assert isinstance(figure, Figure)
    assert plt.get_fignums() == before
    png = figure._repr_png_()  # type: ignore[attr-defined]
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG"
        assert image.width > 300
    assert type(pickle.loads(pickle.dumps(figure))) is type(figure)


def test_nothing_of_the_model_changes(vit: nn.Module, unchanged: Any) -> None:
    check = unchanged(vit)
    mlpreduce.plot(vit)
    check()


def test_what_cannot_be_drawn_is_refused() -> None:
    made = mlpreduce.plan(tiny_vit(), "grouped", group=2)
    with pytest.raises(ReductionError, match=r"plot: a str was given; give a plan, a list of plans"):
        mlpreduce.plot("vit_tiny_patch16_224")  # type: ignore[arg-type]
    with pytest.raises(ReductionError, match="plot: a list was given"):
        mlpreduce.plot([made, 3])  # type: ignore[list-item]
    with pytest.raises(ReductionError, match="plot: the list has no plan"):
        mlpreduce.plot(mlpreduce.history(tiny_vit()))
    with pytest.raises(ReductionError, match=r"plot: mine\(\) lists no MLPs"):
        mlpreduce.plot(Plan("mine", {}, ()))
    with pytest.raises(ReductionError, match="found no MLP"):
        mlpreduce.plot(nn.Sequential(nn.Linear(4, 4)), example_inputs=torch.zeros(1, 4))
    with pytest.raises(ReductionError, match="plot"):
        mlpreduce.plot(nn.DataParallel(tiny_vit()))


def test_without_matplotlib_one_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    made = mlpreduce.plan(tiny_vit(), "grouped", group=2)
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ReductionError, match=r"mlpreduce\.plot needs matplotlib"):
        mlpreduce.plot(made)


def test_the_modules_of_the_picture_need_no_matplotlib_to_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for module in (widths, plans):
        spec = importlib.util.spec_from_file_location("copy_of_it", Path(str(module.__file__)))
        assert spec is not None
        assert spec.loader is not None
        copied = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "copy_of_it", copied)
        spec.loader.exec_module(copied)


def record(variant: str, *made: Plan, seed: int = 0) -> Record:
    drawn = tuple({"rows": [list(vars(row).values()) for row in one.rows]} for one in made)
    return a_record(variant, seed, plans=drawn)


def test_a_recipe_draws_each_reduction_once(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(plans, "draw_widths", lambda panels: drawn.extend(panels) or widths.draw_widths(panels))
    grouped = mlpreduce.plan(tiny_vit(), "grouped", group=2)
    sliced = mlpreduce.plan(tiny_vit(), "shallow", width=64)
    picture = plans.picture_of(
        [
            record("baseline"),
            record("grouped", grouped),
            record("grouped", grouped, seed=1),
            record("again", grouped),
            record("shallow", sliced),
        ]
    )
    assert picture is not None
    assert picture.file == "plans.png"
    assert [title for title, _ in drawn] == ["grouped, again", "shallow"]
    assert [use.hidden for use in drawn[1][1]] == [64] * 4
    assert [use.owner for use in drawn[0][1]] == [f"blocks.{block}.mlp" for block in (0, 0, 2, 2)]
    with Image.open(io.BytesIO(picture.png)) as image:
        assert image.width > 300


def test_a_recipe_without_reductions_of_mlps_has_no_picture() -> None:
    assert plans.picture_of([record("baseline"), record("by_hand", Plan("mine", {}, ()))]) is None


def test_a_recipe_with_many_reductions_shows_the_first() -> None:
    made = [mlpreduce.plan(tiny_vit(), "shallow", width=width) for width in range(20, 33)]
    picture = plans.picture_of([record(f"v{number}", one) for number, one in enumerate(made)])
    assert picture is not None
    assert "the first 12 of 13" in picture.caption
    assert "one colour" not in picture.caption  # no MLP is shared
    shared = plans.picture_of([record("grouped", mlpreduce.plan(tiny_vit(), "grouped", group=2))])
    assert shared is not None
    assert "blocks of one colour use one MLP" in shared.caption
