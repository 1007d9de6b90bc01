"""The `mlpreduce` command: list, plan, profile, tune, bench, recipe, search, report, coverage. It dispatches and prints."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mlpreduce import __version__
from mlpreduce.errors import ReductionError
from mlpreduce.plugins import add_option, load_plugins
from mlpreduce.words.console import run_command, width, wrapped
from mlpreduce.words.notation import Step, read_words

if TYPE_CHECKING:
    from torch import nn

_OWN = {name: name for name in ("bench", "recipe", "search", "report", "coverage")}  # where the `main` of a command is
_OWN["tune"] = "search.tuning_cli"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    Returns:
        0 when all is done; 2 after a ReductionError or an unknown command; 141 when the reader of the output has
        gone; else what the command says.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    return run_command(lambda: _run(arguments))


def _run(arguments: list[str]) -> int:
    if arguments[:1] and arguments[0] in _OWN:
        status: int = importlib.import_module(f"mlpreduce.{_OWN[arguments[0]]}").main(arguments[1:])
        return status
    parser = _parser()
    if not arguments:
        parser.print_help()
        return 0
    options = parser.parse_args(arguments)
    load_plugins(options.plugins)
    print(options.run(options))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mlpreduce", description="Reduce the MLPs of Vision Transformers.")
    parser.add_argument("--version", action="version", version=f"mlpreduce {__version__}")
    commands = parser.add_subparsers(
        required=True, metavar="{list,plan,profile,tune,bench,recipe,search,report,coverage}"
    )
    words = 'timm arguments as key=value, then transforms: "grouped(group=2)", or grouped group=2'

    listing = commands.add_parser(
        "list", help="transforms, criteria, recipes and search spaces, or one with its options"
    )
    listing.add_argument("name", nargs="?", metavar="NAME", help="show every option of one of them")
    listing.set_defaults(run=_list)

    plan = commands.add_parser("plan", help="what transforms would do to a timm model")
    plan.add_argument("model", help="a timm architecture")
    plan.add_argument("words", nargs="+", metavar="TRANSFORM", help=words)
    plan.add_argument("--include", action="append", help="glob over MLP names; may be repeated")
    plan.add_argument("--exclude", action="append", help="glob over MLP names; may be repeated")
    plan.set_defaults(run=_plan)

    profile = commands.add_parser("profile", help="parameters, MACs and speed of a timm model, reduced or not")
    profile.add_argument("model", help="a timm architecture")
    profile.add_argument("words", nargs="*", metavar="TRANSFORM", help=words)
    profile.add_argument("--measure", action="store_true", help="time inference on this machine")
    profile.add_argument("--batch-size", type=int, default=32, help="images of a timed batch (default: 32)")
    profile.set_defaults(run=_profile)

    commands.add_parser("tune", help="reduce a trained timm model within a budget, without training", add_help=False)
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
        add_option(command)
        command.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _list(options: argparse.Namespace) -> str:
    if options.name is not None:
        return _describe(options.name, as_json=options.json)
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
    lines.append("`mlpreduce list NAME` shows every option of one of them.")
    columns = width()
    return "\n".join(wrapped(line, columns, "" if line.startswith("      ") else "    ") for line in lines)


def _describe(name: str, *, as_json: bool) -> str:
    from mlpreduce.describing import described

    found = described(name)
    if as_json:
        return json.dumps([asdict(description) for description in found])
    return "\n\n".join(map(str, found))


def _plan(options: argparse.Namespace) -> str:
    """The plans of all transforms, each made after those before it were applied, and what they come to together."""
    import mlpreduce
    from mlpreduce.edits.plan import costs_text
    from mlpreduce.transforms import check_config

    settings, steps = read_words(options.words)
    if not steps:
        raise ReductionError(
            f'plan: no transform; give one, for instance: mlpreduce plan {options.model} "grouped(group=2)"'
        )
    for name, config in steps:
        check_config(name, config)
    model = _model(options, settings)
    before = mlpreduce.profile(model) if len(steps) > 1 and not options.json else None
    plans = []
    for number, (name, config) in enumerate(steps):
        made = mlpreduce.plan(model, name, include=options.include, exclude=options.exclude, **config)
        plans.append(made.to_json() if options.json else str(made))  # as it is now: applied, it has no costs
        if number < len(steps) - 1 or before is not None:
            mlpreduce.apply(model, made)
    if options.json:
        return plans[0] if len(plans) == 1 else f"[{', '.join(plans)}]"
    if before is not None:
        total = costs_text(before, mlpreduce.profile(model))
        plans.append("\n".join(wrapped(line, width()) for line in (f"all {len(steps)} together", *total)))
    return "\n\n".join(plans)


def _profile(options: argparse.Namespace) -> str:
    import mlpreduce

    settings, steps = read_words(options.words)
    model = _model(options, settings, steps)
    profile = mlpreduce.profile(model, measure_speed=options.measure, batch_size=options.batch_size)
    return json.dumps(asdict(profile)) if options.json else str(profile)


def _model(options: argparse.Namespace, settings: dict[str, Any], steps: Sequence[Step] = ()) -> nn.Module:
    """A timm model; without weights unless they are asked for or timed."""
    import contextlib

    import torch

    import mlpreduce
    from mlpreduce.reduction.builds import made_by_timm
    from mlpreduce.transforms import check_config

    if "pretrained" in settings:
        raise ReductionError("pretrained is not given as an argument; use --pretrained")
    transforms = [check_config(name, config) for name, config in steps]
    real = options.pretrained or getattr(options, "measure", False)
    with contextlib.nullcontext() if real else torch.device("meta"):
        if transforms and transforms[0].construction:
            (name, config), *steps = steps
            if twice := [key for key in config if key in settings]:
                raise ReductionError(f"{twice[0]} is given twice: to {options.model} and to {name}; leave one out")
            if wrong := [key for key in ("name", "transform", "data", "loss") if key in settings]:
                raise ReductionError(f"{wrong[0]} is not an argument of {options.model}; leave it out")
            model = mlpreduce.create_model(options.model, name, pretrained=options.pretrained, **settings, **config)
        else:
            model = made_by_timm(options.model, {**settings, "pretrained": options.pretrained})
    for name, config in steps:
        mlpreduce.apply(model, name, **config)
    return model


if __name__ == "__main__":
    sys.exit(main())
