"""The `mlpreduce` command: list, plan, profile, bench, recipe, search, report, coverage. It dispatches and prints."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mlpreduce.errors import ReductionError, did_you_mean
from mlpreduce.values import parse_pairs

if TYPE_CHECKING:
    from torch import nn

Step = tuple[str, dict[str, Any]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, or 2 after a ReductionError."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["recipe"]:
        from mlpreduce.recipe import main as recipe

        return recipe(arguments[1:])
    if arguments[:1] == ["search"]:
        from mlpreduce.search import main as search

        return search(arguments[1:])
    if arguments[:1] == ["bench"]:
        from mlpreduce.bench import main as bench

        return bench(arguments[1:])
    if arguments[:1] == ["report"]:
        from mlpreduce.report import main as report

        return report(arguments[1:])
    if arguments[:1] == ["coverage"]:
        return _coverage(arguments[1:])
    options = _parser().parse_args(arguments)
    try:
        print(options.run(options))
    except ReductionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _coverage(arguments: Sequence[str]) -> int:
    from mlpreduce.coverage import main as coverage

    try:
        return coverage(arguments)
    except ReductionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mlpreduce", description="Reduce the MLPs of Vision Transformers.")
    commands = parser.add_subparsers(required=True, metavar="{list,plan,profile,bench,recipe,search,report,coverage}")
    words = "timm arguments as key=value, then transforms, each followed by its own key=value"

    listing = commands.add_parser("list", help="transforms, criteria and recipes")
    listing.set_defaults(run=_list)

    plan = commands.add_parser("plan", help="what a transform would do to a timm model")
    plan.add_argument("model", help="a timm architecture")
    plan.add_argument("words", nargs="+", metavar="TRANSFORM key=value", help=words)
    plan.add_argument("--include", action="append", help="glob over MLP names; may be repeated")
    plan.add_argument("--exclude", action="append", help="glob over MLP names; may be repeated")
    plan.set_defaults(run=_plan)

    profile = commands.add_parser("profile", help="parameters, MACs and speed of a timm model, reduced or not")
    profile.add_argument("model", help="a timm architecture")
    profile.add_argument("words", nargs="*", metavar="TRANSFORM key=value", help=words)
    profile.add_argument("--measure", action="store_true", help="time inference on this machine")
    profile.add_argument("--batch-size", type=int, default=32, help="images of a timed batch (default: 32)")
    profile.set_defaults(run=_profile)

    commands.add_parser("bench", help="time applying or training, beside a peer that does the same", add_help=False)
    commands.add_parser("recipe", help="run an experiment; the same as python -m mlpreduce.recipe", add_help=False)
    commands.add_parser(
        "search", help="find a better reduction; the same as python -m mlpreduce.search", add_help=False
    )
    commands.add_parser("report", help="tables and figures of training runs, from their records", add_help=False)
    commands.add_parser("coverage", help="which architectures of timm are reduced, and the proof", add_help=False)
    for command in (plan, profile):
        command.add_argument("--pretrained", action="store_true", help="with timm's weights (else none are made)")
    for command in (listing, plan, profile):
        command.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _list(options: argparse.Namespace) -> str:
    from mlpreduce.criteria import list_criteria
    from mlpreduce.recipe import list_recipes
    from mlpreduce.search import list_spaces
    from mlpreduce.transforms import get_transform, list_transforms

    transforms = [get_transform(name) for name in list_transforms()]
    defaults = {t.name: {key: p.default for key, p in t.parameters.items()} for t in transforms}
    if options.json:
        every = {"criteria": list_criteria(), "recipes": sorted(list_recipes()), "search_spaces": sorted(list_spaces())}
        return json.dumps({"transforms": defaults, **every})
    lines = ["transforms"]
    for transform in transforms:
        given = ", ".join(f"{key}={value!r}" for key, value in defaults[transform.name].items())
        lines += [f"  {transform.name}({given})", f"      {transform.summary}"]
    for title, names in (("criteria", list_criteria()), ("recipes", list_recipes()), ("search spaces", list_spaces())):
        lines += [title, f"  {', '.join(sorted(names))}"]
    return "\n".join(lines)


def _plan(options: argparse.Namespace) -> str:
    import mlpreduce

    settings, steps = _steps(options.words)
    if len(steps) != 1:
        raise ReductionError(
            f"plan: {len(steps)} transforms; give one, for instance: mlpreduce plan {options.model} grouped group=2"
        )
    name, config = steps[0]
    model = _model(options, settings)
    made = mlpreduce.plan(model, name, include=options.include, exclude=options.exclude, **config)
    return made.to_json() if options.json else str(made)


def _profile(options: argparse.Namespace) -> str:
    import mlpreduce

    settings, steps = _steps(options.words)
    model = _model(options, settings, steps)
    profile = mlpreduce.profile(model, measure_speed=options.measure, batch_size=options.batch_size)
    return json.dumps(asdict(profile)) if options.json else str(profile)


def _steps(words: Sequence[str]) -> tuple[dict[str, Any], list[Step]]:
    """timm arguments, and transforms with theirs."""
    settings: dict[str, Any] = {}
    steps: list[Step] = []
    for word in words:
        if "=" not in word:
            steps.append((word, {}))
        else:
            (steps[-1][1] if steps else settings).update(parse_pairs([word]))
    return settings, steps


def _model(options: argparse.Namespace, settings: dict[str, Any], steps: Sequence[Step] = ()) -> nn.Module:
    """A timm model; without weights unless they are asked for or timed."""
    import contextlib

    import timm
    import torch

    import mlpreduce
    from mlpreduce.models import is_model
    from mlpreduce.transforms import check_config

    if not is_model(options.model):
        raise ReductionError(
            f"timm has no architecture {options.model!r}{did_you_mean(options.model, timm.list_models())}"
        )
    transforms = [check_config(name, config) for name, config in steps]
    real = options.pretrained or getattr(options, "measure", False)
    with contextlib.nullcontext() if real else torch.device("meta"):
        if transforms and transforms[0].construction:
            model = mlpreduce.create_model(
                options.model, steps[0][0], pretrained=options.pretrained, **settings, **steps[0][1]
            )
            steps = steps[1:]
        else:
            try:
                model = timm.create_model(options.model, pretrained=options.pretrained, **settings)
            except TypeError as error:
                raise ReductionError(f"timm cannot build {options.model} with {settings}: {error}") from error
    for name, config in steps:
        mlpreduce.apply(model, name, **config)
    return model


if __name__ == "__main__":
    sys.exit(main())
