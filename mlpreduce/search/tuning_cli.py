"""The command `mlpreduce tune MODEL --data DIR --budget ...`: `mlpreduce.tune` of a timm model on folders of images."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlpreduce.data import DataSettings, calibration
from mlpreduce.data.folders import split_folders
from mlpreduce.errors import ReductionError, require
from mlpreduce.graph import example_inputs, tensors_in
from mlpreduce.plugins import add_option, load_plugins
from mlpreduce.reduction.builds import made_by_timm
from mlpreduce.words.console import from_here, run_command, width, wrapped
from mlpreduce.words.notation import read_words

__all__ = ["main"]

_HELD = 0.1  # of class folders without train/ and val/; those images are not looked at


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status: 0, or 2 after a ReductionError."""
    return run_command(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    options = _parser().parse_args(argv)
    require("mlpreduce tune", "optuna", "scipy")
    load_plugins(options.plugins)
    print(_run(options))
    return 0


def _run(options: argparse.Namespace) -> str:
    import mlpreduce
    from mlpreduce.train.settings import ModelSettings
    from mlpreduce.train.weights import load_weights

    kwargs, steps = read_words(options.arguments)
    if steps:
        raise ReductionError(
            f"tune {steps[0][0]}: it is given no transforms, it searches for them; write key=value alone"
        )
    if options.weights is None and not options.pretrained:
        raise ReductionError("tune: weights are needed, since nothing is trained; give --weights FILE or --pretrained")
    if options.save is not None and Path(options.save).exists():
        raise ReductionError(f"tune --save {options.save}: it exists, and is not overwritten")
    model = made_by_timm(options.model, {**kwargs, "pretrained": options.pretrained}, "tune").eval()
    if options.weights is not None:
        settings = ModelSettings(name=options.model, kwargs=kwargs, weights=options.weights)
        load_weights(model, settings, Path(options.weights))
    data = calibration(_images(options, model), 2 * options.calibration)
    given = {name: getattr(options, name) for name in _GIVEN}
    found = mlpreduce.tune(model, data=[images for images, _ in data], budget=options.budget, **given)
    lines = [str(found)]
    if options.output is not None:
        files = found.save(options.output)
        lines.append(f"report   {from_here(files[0].parent) / 'report.html'}")
    if options.save is not None:
        for made in found.plans:
            mlpreduce.apply(model, made)
        mlpreduce.save(model, options.save)
        lines.append(f"model    {options.save}: the best, for mlpreduce.load")
    return "\n".join([lines[0], *(wrapped(line, width(), " " * 9) for line in lines[1:])])


_GIVEN = (
    *("space", "trials", "timeout", "sampler", "seed", "calibration"),
    *("output", "storage", "resume", "workers", "track"),
)


def _images(options: argparse.Namespace, model: Any) -> DataSettings:
    """The images as the model's configuration wants them."""
    from timm.data import resolve_model_data_config

    seen = resolve_model_data_config(model)
    shape = {
        "image_size": tensors_in(example_inputs(model, 1))[0].shape[-1],  # timm's is not that of other arguments
        "mean": seen["mean"],
        "std": seen["std"],
        "crop_pct": seen["crop_pct"],
        "interpolation": seen["interpolation"],
        "workers": 0,
    }
    if "/" in options.data and options.data.partition("/")[0] in ("torch", "hfds"):
        return DataSettings(name=options.data, root=options.root, **shape)
    folders = split_folders(options.data)
    if folders["train"] is not None and folders["val"] is not None:
        return DataSettings(root=options.data, **shape)
    return DataSettings(root=str(folders["train"] or options.data), val_share=_HELD, **shape)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlpreduce tune",
        description="Find the widths of a trained timm model that keep most of it within a budget.",
    )
    parser.add_argument("model", metavar="MODEL", help="a timm architecture")
    parser.add_argument("arguments", nargs="*", metavar="key=value", help="arguments of timm.create_model")
    parser.add_argument("--data", required=True, metavar="DIR", help="class folders of images, or torch/NAME")
    parser.add_argument("--root", default="", metavar="DIR", help="of torch/NAME: where its files lie")
    parser.add_argument(
        "--weights", metavar="FILE", help="a .safetensors file, or a folder of mlpreduce.save or of a run"
    )
    parser.add_argument("--pretrained", action="store_true", help="timm's weights")
    parser.add_argument(
        "--budget", action="append", required=True, help='such as "params<=0.67" or "macs<=9e9"; may be repeated'
    )
    parser.add_argument("--space", default="trained", help="a search space (default: trained), or a path to a .py")
    parser.add_argument("--trials", type=int, default=100, help="points that are scored (default: 100)")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="after which no further point is begun")
    parser.add_argument("--sampler", default="auto", help="auto (TPE), tpe, nsga2, gp, random or grid")
    parser.add_argument("--seed", type=int, default=0, help="of the sampler (default: 0)")
    parser.add_argument(
        "--calibration", type=int, default=512, help="images to calibrate with; as many score (default: 512)"
    )
    parser.add_argument("--output", metavar="DIR", help="keep the study there, with its report")
    parser.add_argument("--storage", metavar="URL", help="of Optuna's storage")
    parser.add_argument("--resume", action="store_true", help="go on with the study")
    parser.add_argument(
        "--workers", type=int, default=0, help="points scored at a time, by processes of Ray (default: 0)"
    )
    parser.add_argument("--track", action="store_true", help="keep a run for each score in MLflow")
    parser.add_argument("--save", metavar="DIR", help="write the best model there")
    add_option(parser)
    return parser
