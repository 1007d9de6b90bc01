"""What a recipe would do: plans, counts, updates, learning rates, cost, and warnings. Trains nothing.

It needs no data. Data that are here are counted and checked as a run would.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

import mlpreduce
from mlpreduce.budget.profiling import Profile
from mlpreduce.data import DataSettings, Survey, survey
from mlpreduce.errors import ReductionError
from mlpreduce.recipe.schema import Recipe, points, runs
from mlpreduce.train.advice import advice
from mlpreduce.train.names import check_reach, is_own
from mlpreduce.train.parts import build_model, check_classes, create_optimizer, images_of, learning_rates
from mlpreduce.train.settings import Run
from mlpreduce.transforms.steps import needs_data, without_data

__all__ = ["check_names", "describe"]


def describe(recipe: Recipe) -> str:
    """The text of `--dry-run`, one part for each point of a sweep.

    Raises:
        ReductionError: the recipe cannot be carried out, or `data.train_samples` is not given.
    """
    found: dict[DataSettings, Survey | None] = {}  # points of a sweep mostly share their data
    for point in points(recipe).values():
        if point.data not in found:
            found[point.data] = survey(point.data)
    parts = [_describe(point, found[point.data]) for point in points(recipe).values()]
    text = "\n\n".join(text for text, _, _ in parts)
    if not recipe.sweep:
        return text
    count, macs = sum(runs for _, runs, _ in parts), sum(macs for _, _, macs in parts)
    return f"{text}\n\nall {len(parts)} points: {count} runs, {macs:.3e} MACs"


def _describe(recipe: Recipe, found: Survey | None) -> tuple[str, int, int]:
    """The text of one point, its runs, and their training MACs. `found` is what its data hold, where they are here."""
    if found is None and not recipe.data.train_samples:
        raise ReductionError(
            f"{recipe.name}.data.train_samples=0: data.root={recipe.data.root!r} is not here, and --dry-run counts with this "
            f"number; give the number of training images"
        )
    create_optimizer(nn.Linear(1, 1), recipe.train)  # refuses what a run would refuse
    every = runs(recipe, ".")
    first = every[0]
    count = recipe.data.train_samples if found is None else found.train
    updates = first.updates_per_epoch(count)
    train, launch = recipe.train, recipe.launch
    passes = 2 if train.sam_rho else 1
    teacher = 0 if train.distillation == "none" else _teacher_macs(first)
    images = updates * train.batch_size * train.epochs
    classes = recipe.data.classes if found is None else found.classes  # 0 = the data will tell
    costs = {}
    warnings: list[str] = []
    lines = [f"{recipe.name}\n"] if "/" in recipe.name else []
    lines += [*(f"plug-in {plugin}" for plugin in recipe.plugins), *([""] if recipe.plugins else [])]
    for variant in recipe.variants:
        run = next(run for run in every if run.variant == variant)
        text, costs[variant], model = _variant(run)
        if classes:
            check_classes(model, run, classes)
        told = advice(
            run, images=count, updates_per_epoch=updates, side=None if found is None else found.side, model=model
        )
        warnings += [text for text in told if text not in warnings]
        lines += [text, ""]
    lines += [
        "training of one run",
        f"  data             {_data(recipe, found)}",
        f"  initial weights  {_weights(recipe)}",
        f"  distillation     {_distillation(recipe, teacher)}",
        f"  effective batch  {train.batch_size:,} = {launch.world} worker(s) x {first.micro_batch} images x "
        f"{train.accum_steps} accumulation step(s)",
        f"  updates          {updates:,} an epoch x {train.epochs} epochs = {updates * train.epochs:,}",
        f"  learning rate    {_rates(recipe, updates)}",
        f"  images seen      {images:,} (an incomplete last batch is dropped)",
        "",
        f"cost: training MACs, about {3 * passes} x those of the forward pass"
        f"{f' and {passes} x the teacher' if teacher else ''} x images seen; "
        f"{len(recipe.seeds)} seed(s)",
    ]
    width = max(len(name) for name in recipe.variants)
    for name, macs in costs.items():
        one = passes * (3 * macs + teacher) * images
        lines.append(f"  {name:<{width}}  {one:.3e} a run, {one * len(recipe.seeds):.3e} in all")
    total = sum(passes * (3 * macs + teacher) * images * len(recipe.seeds) for macs in costs.values())
    lines.append(f"  {len(every)} runs: {total:.3e} MACs, {images * len(every):,} images")
    lines += ["", *(f"warning: {text}" for text in warnings)] if warnings else []
    return "\n".join(lines), len(every), total


def _data(recipe: Recipe, found: Survey | None) -> str:
    data = recipe.data
    if found is None:
        return (
            f"{data.name}: {data.train_samples:,} training images (data.train_samples; data.root is not here to count)"
        )
    made = data.name in ("synthetic", "fractals")
    other = f" (data.train_samples={data.train_samples} is another number)" if data.train_samples else ""
    return (
        f"{data.name}: {found.train:,} training images{other if found.train != data.train_samples else ''}, {found.val:,} "
        f"validation images, {found.classes} classes{'' if made else ', counted'}"
    )


def _variant(run: Run) -> tuple[str, int, nn.Module]:
    """Plans, counts and model of one variant."""
    model, profile = rehearse(run)
    plans = [str(plan) for plan in mlpreduce.history(model) if plan.rows]
    steps = ", ".join(str(step["transform"]) for step in run.steps) or "as it is"
    lines = [f"variant {run.variant}: {run.model.name}, {steps}", *plans]
    if any(map(needs_data, run.steps)):
        lines.append(
            f"  the units, and the widths of scopes beyond one MLP, will follow from {run.model.calibration_images} training "
            f"images; here: the first units, as many of each MLP"
        )
    lines += [
        f"  parameters {profile.params:,} (a tied tensor once), MLP parameters {profile.mlp_params:,}, "
        f"unique MLPs {profile.unique_mlps}",
        f"  MACs of one image: {profile.macs:,} in Linear, Conv and LayerNorm (macs); {profile.macs_linear:,} without "
        f"LayerNorm (macs_linear); {profile.macs_with_attention:,} with attention products (macs_with_attention)",
    ]
    return "\n".join(lines), profile.macs, model


def check_names(recipes: Iterable[Recipe]) -> None:
    """Check before anything trains that workers will know all names, and that variants with code of plug-ins can be built.

    Raises:
        ReductionError: a name is known in this process only, or a variant cannot be built.
    """
    for recipe in recipes:
        every = runs(recipe, ".")
        if recipe.launch.workers:
            check_reach(every)
        for run in every[:: len(recipe.seeds)]:
            if is_own(run):
                rehearse(run)


def rehearse(run: Run) -> tuple[nn.Module, Profile]:
    """The reduced model of a run and its counts, without data: without memory too, unless some weights must be compared.

    Raises:
        ReductionError: it cannot be made.
    """
    try:
        try:
            model = build_model(run, device="meta")
        except ReductionError:  # align_mean, l2: which units they choose changes no count
            random = run.model.model_copy(update={"weights": ""})
            plain = tuple(without_data(step) for step in run.steps)
            model = build_model(run.model_copy(update={"model": random, "steps": plain}))
        return model, mlpreduce.profile(model, images_of(run, model))
    except ReductionError:
        raise
    except Exception as error:  # whatever a plug-in raises
        if not run.plugins:
            raise
        files = ", ".join(map(str, run.plugins))
        raise ReductionError(
            f"train({run.label}): it cannot be built with the plug-in {files}: {type(error).__name__}: {error}"
        ) from error


def _teacher_macs(run: Run) -> int:
    """MACs of the teacher's forward pass of one image."""
    teacher = build_model(run.model_copy(update={"steps": ()}), device="meta")
    return mlpreduce.profile(teacher, images_of(run, teacher)).macs


def _weights(recipe: Recipe) -> str:
    model = recipe.model
    if model.weights == "pretrained" or (model.kwargs.get("pretrained") and not model.weights):
        return f"timm's pretrained ones of {model.name}"
    if not (given := model.weights or model.kwargs.get("checkpoint_path")):
        return "random, from the seed"
    return f"{given} (not read here)"


def _distillation(recipe: Recipe, macs: int) -> str:
    train = recipe.train
    if train.distillation == "none":
        return "none"
    teacher = f"teacher: the unreduced model with the initial weights, {macs:,} MACs an image more"
    if train.distillation == "features":
        return f"features, class {train.distill_cls:g}, patches {train.distill_patches:g}, no labels; {teacher}"
    tau = f", temperature {train.distill_tau:g}" if train.distillation == "soft" else ""
    return f"{train.distillation}, alpha {train.distill_alpha:g}{tau}; {teacher}"


def _rates(recipe: Recipe, updates: int) -> str:
    rates = learning_rates(recipe.train, updates)
    shown = min(len(rates), recipe.train.warmup_epochs + 1)
    first = ", ".join(f"{rate:.3e}" for rate in rates[:shown])
    moves = "update" if recipe.train.schedule_per_update else "epoch"
    return (
        f"{recipe.train.schedule}, moves each {moves}; first epochs {first}; largest {max(rates):.3e}, "
        f"last {rates[-1]:.1e}"
    )
