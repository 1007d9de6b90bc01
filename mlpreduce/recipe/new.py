"""`--new`: a complete recipe for a folder of class folders, with settings that suit as many images as there are."""

from __future__ import annotations

import math
import os
import shlex
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
from timm.models import is_model_pretrained

import mlpreduce
from mlpreduce.data import DataSettings, Survey, survey
from mlpreduce.data.folders import split_folders
from mlpreduce.errors import ReductionError, did_you_mean
from mlpreduce.models import image_size_of, is_model
from mlpreduce.recipe.schema import load
from mlpreduce.train.parts import build_model, images_of
from mlpreduce.train.settings import ModelSettings, Run, Step

__all__ = ["write_recipe"]

_SHARE = 0.2  # of each class, held out where there is no validation folder
_UPDATES = 300  # that a run should have: a small model learns a few hundred images in them
_FEW = 2000  # training images, below which 16 large patches do better than 49 small ones
_SMALL = {  # the model of the recipe digits: what a few hundred images can fill
    "embed_dim": 64,
    "depth": 4,
    "num_heads": 4,
    "class_token": False,
    "global_pool": "avg",
    "weight_init": "jax",
    "qk_norm": True,
}

Line = tuple[str, Any, str]  # key, value, comment


@dataclass(frozen=True)
class _Choice:
    """What is trained: a model of timm, and the size of the images that it takes."""

    model: ModelSettings
    image_size: int
    patches: int  # of an image; 0 where the model is not fitted to the pictures
    variants: dict[str, list[Step]]
    refused: dict[str, str]  # variants that this model cannot have, and why


def write_recipe(path: str | Path, root: str | Path, model: str = "") -> str:
    """Write a recipe for a folder of class folders. It runs as it is.

    Args:
        path: the recipe, a new file that ends in .toml.
        root: a folder with train/ and val/, or one folder per class; a fifth of each class is then held out.
        model: timm's name of an architecture; by default a small ViT that suits the images.

    Returns:
        What was found, and the command that trains the recipe.

    Raises:
        ReductionError: `path` exists, is not a .toml, or cannot be written; `root` does not hold class folders with images;
            or timm has no such model, or one without MLPs.
    """
    _check_text("--new", path)
    path, call = Path(path), f"--new {path}"
    if path.suffix != ".toml":
        better = path.with_suffix(".toml") if path.name.strip(".") else path / "mine.toml"  # . and / have no name
        raise ReductionError(f"{call}: a recipe is a .toml file; use --new {better}")
    if os.path.lexists(path):
        raise ReductionError(f"{call}: the file exists and is not overwritten; give another name, or remove it")
    if not os.path.isdir(path.parent):
        raise ReductionError(f"{call}: there is no folder {str(path.parent)!r}; make it first")
    _check_text("--data", root)
    data = _place(Path(root).resolve())
    _check_text("--data", data.root)
    found = survey(data)
    if found is None:
        raise ReductionError(f"{call}: --data {str(root)!r} does not exist; give a folder of class folders")
    choice = _choose(data, found, model)
    text = "\n".join(_text(path, data, found, choice))
    try:
        file = path.open("x", encoding="utf-8")
    except OSError as error:
        raise _unwritten(call, error) from error
    try:
        with file:
            file.write(text + "\n")
        load(str(path))
    except BaseException as error:
        path.unlink()
        if isinstance(error, OSError):
            raise _unwritten(call, error) from error
        raise
    held = f", {data.val_share:.0%} of each class held out for validation" if data.val_share else ""
    return (
        f"{path}: {found.train:,} training and {found.val:,} validation images of {found.classes} classes{held}\n"
        f"look at it:  {_command(path)} --dry-run\n"
        f"train it:    {_command(path)}"
    )


def _check_text(option: str, path: str | Path) -> None:
    """Refuse a path that a recipe, which is text in UTF-8, could not name."""
    if any(ord(letter) < 32 or 0xD800 <= ord(letter) <= 0xDFFF for letter in str(path)):  # surrogates: not UTF-8
        raise ReductionError(
            f"{option} {str(path)!r}: a recipe is text in UTF-8 and cannot name this path; rename it, or make a link to it "
            "whose name has no control characters"
        )


def _unwritten(call: str, error: OSError) -> ReductionError:
    return ReductionError(f"{call}: the file cannot be written ({error.strerror}); give another name or folder")


def _place(root: Path) -> DataSettings:
    """The images of `root` as a recipe names them."""
    folders = split_folders(str(root))
    if folders["train"] is not None and folders["val"] is not None:
        return DataSettings(root=str(root))
    return DataSettings(root=str(folders["train"] or root), val_share=_SHARE)


def _choose(data: DataSettings, found: Survey, name: str) -> _Choice:
    side = found.side or 224
    grid = 4 if found.train < _FEW and side < 56 else 7
    patch = max(2, min(side, 112) // grid)
    fitted = {"img_size": grid * patch, "patch_size": patch, "num_classes": found.classes}
    if not name:
        settings, size = ModelSettings(name="vit_tiny_patch16_224", kwargs={**fitted, **_SMALL}), grid * patch
    elif not is_model(name):
        import timm

        raise ReductionError(f"--model {name}: timm has no such model{did_you_mean(name, timm.list_models())[:200]}")
    else:
        settings, size = _given(name, fitted)
    plain = Run(recipe="new", variant="baseline", model=settings, data=_sized(data, size), directory="/")
    built: Any = build_model(plain, device="meta")
    mlps = mlpreduce.find_mlps(built, images_of(plain, built))
    if not mlps:
        raise ReductionError(
            f"--model {name}: no MLP was found in it, so there is nothing to reduce; choose a model with MLPs, such as "
            f"vit_tiny_patch16_224"
        )
    half = round(mlps[0].hidden_features / mlps[0].in_features / 2, 3)
    candidates: dict[str, list[Step]] = {
        "grouped": [{"transform": "grouped", "group": 2}],
        "shallow": [{"transform": "shallow", "ratio": 0.5}],
        "thin": [{"transform": "thin", "mlp_ratio": half}],
    }
    variants: dict[str, list[Step]] = {"baseline": []}
    refused = {}
    for variant, steps in candidates.items():
        try:
            build_model(plain.model_copy(update={"steps": tuple(steps)}), device="meta")
            variants[variant] = steps
        except ReductionError as error:
            refused[variant] = str(error)
    patches = built.patch_embed.num_patches if "patch_size" in settings.kwargs else 0
    return _Choice(settings, size, patches, variants, refused)


def _sized(data: DataSettings, size: int) -> DataSettings:
    return data.model_copy(update={"image_size": size})


def _given(name: str, fitted: dict[str, Any]) -> tuple[ModelSettings, int]:
    """A model of the user's choice: a plain ViT is fitted to the pictures, any other takes the images it was made for."""
    from timm.layers import PatchEmbed
    from timm.models.vision_transformer import VisionTransformer

    own = ModelSettings(name=name, kwargs={"num_classes": fitted["num_classes"]})
    run = Run(recipe="new", variant="baseline", model=own, directory="/")
    model = build_model(run, device="meta")
    if type(model) is VisionTransformer and type(model.patch_embed) is PatchEmbed:  # a hybrid has other patches
        return ModelSettings(name=name, kwargs=fitted), fitted["img_size"]
    return own, image_size_of(name) or 224


def _text(path: Path, data: DataSettings, found: Survey, choice: _Choice) -> Iterable[str]:
    batch = 2 ** min(7, max(3, int(math.log2(max(1, found.train / 15)))))
    while batch > 2 and found.train % batch > found.train // 5:  # of few images, an epoch should leave out few
        batch //= 2
    epochs = min(100, max(10, round(_UPDATES / max(1, found.train // batch))))
    small = choice.model.kwargs.get("embed_dim") == _SMALL["embed_dim"]
    seeds = [42, 123]
    pictures = f"{found.side} pixels on the shorter side" if found.side else "of unknown size"
    yield f"# {found.train + found.val:,} pictures of {found.classes} classes, {pictures}: {', '.join(choice.variants)}."
    yield f"# Command:  {_command(path)}"
    yield (
        f"# Cost:     {len(seeds) * len(choice.variants)} runs of {epochs} epochs on {found.train:,} images; --dry-run counts "
        f"their MACs."
    )
    yield (
        f"# Expected: top-1 above chance ({100 / found.classes:.3g} %). One of {found.val:,} validation images is "
        f"{100 / found.val:.2g} points; two seeds conclude nothing."
    )
    yield ""
    yield from _lines([("seeds", seeds, "3 or more, to test differences: each is another run of every variant")])
    yield from ("", "[model]")
    origin = "small, as there are few images; a larger one: recipe --new FILE --data DIR --model NAME" if small else ""
    yield from _lines([("name", choice.model.name, origin or "timm's name; random initial weights")])
    if not small and is_model_pretrained(choice.model.name):
        yield from _pretrained(choice)
    yield from ("", "[model.kwargs]")
    notes = {
        "img_size": "that of the pictures, at most 112",
        "patch_size": f"{choice.patches} patches; smaller ones take longer and need more images",
        "num_classes": "class folders",
    }
    yield from _lines([(key, value, notes.get(key, "")) for key, value in choice.model.kwargs.items()])
    yield from ("", "[data]")
    yield from _lines(_data(data, found, choice))
    yield from ("", "[train]")
    yield from _lines(_train(found, batch, epochs, small))
    yield from ("", "[launch]")
    threads = 1 if small else min(4, os.cpu_count() or 1)
    yield from _lines(
        [
            ("workers", 0, "in this process, without Ray, which takes long to start; 2 or more: Ray workers"),
            (
                "threads",
                threads,
                "CPU threads of torch; a model of this size fills one" if small else "CPU threads of torch",
            ),
        ]
    )
    yield from ("", "[variants]")
    for name, steps in choice.variants.items():
        yield from _lines([(name, steps, "the model as it is" if not steps else "")])
    for name, reason in choice.refused.items():
        yield f"# {name} is left out: {textwrap.shorten(reason, 200, placeholder=' ...')}"


def _data(data: DataSettings, found: Survey, choice: _Choice) -> list[Line]:
    lines: list[Line] = [("name", "folder", "one folder of images per class"), ("root", data.root, "")]
    if data.val_share:
        lines += [("val_share", data.val_share, "of each class, held out for validation; always the same images")]
    return [
        *lines,
        ("image_size", choice.image_size, "pixels a side"),
        ("crop_pct", 1.0, "validation sees whole pictures"),
        ("workers", 0 if (found.side or 224) <= 112 else 2, "loading processes; small pictures need none"),
        ("train_samples", found.train, "counted; for --dry-run where the data are not"),
    ]


def _train(found: Survey, batch: int, epochs: int, small: bool) -> list[Line]:
    each = found.train // batch
    updates = each * epochs
    return [
        ("epochs", epochs, f"{updates:,} updates in all"),
        ("batch_size", batch, f"{each} update{'' if each == 1 else 's'} an epoch"),
        ("lr", 2e-3 if small else 5e-4, "largest learning rate, of AdamW"),
        ("warmup_epochs", max(1, epochs // 10), "a tenth of the run"),
        ("schedule_per_update", True, "the learning rate moves with each update: epochs are short"),
        ("clip_grad", 1.0, "largest gradient norm"),
        ("ema_decay", 0.0, "no averaged weights: with so few updates an average lags behind" if updates < 5000 else ""),
        ("label_smoothing", 0.1, ""),
        ("crop_scale", [0.6, 1.0], "training sees 60 to 100 % of a picture; less would cut the object off"),
        ("hflip", 0.5, "use 0.0 where left and right differ, as in digits and text"),
        ("color_jitter", 0.0 if found.gray else 0.2, "the pictures are gray" if found.gray else ""),
    ]


def _lines(entries: Iterable[Line]) -> Iterable[str]:
    for key, value, comment in entries:
        text = tomli_w.dumps({key: value}).rstrip("\n")
        if isinstance(value, list):  # on one line; none of these holds a text with blanks
            text = " ".join(text.split()).replace("[ ", "[").replace(", ]", "]")
        yield f"{text}  # {comment}" if comment else text


def _pretrained(choice: _Choice) -> Iterable[str]:
    """The line that takes timm's weights, as a comment, and what in this recipe must then change."""
    text = "# starts from timm's weights, a download."
    if "thin" in choice.variants:
        text += " Remove the variant thin: they do not fit it."
    if "img_size" in choice.model.kwargs:
        text += f" Remove img_size and patch_size below, and use data.image_size={image_size_of(choice.model.name)}."
    first, *others = textwrap.wrap(text, 95)
    line = '# weights = "pretrained"  '
    yield line + first
    yield from (f"#{' ' * (len(line) + 1)}{rest}" for rest in others)


def _command(path: Path) -> str:
    return f"python -m mlpreduce.recipe {shlex.quote(str(path))}"
