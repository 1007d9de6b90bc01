"""How accurate a trained ViT is once its MLPs are sliced, by each criterion: `python -m mlpreduce bench criteria`.

The model is that of the recipe digits, trained once for each seed; then its hidden units are chosen by each criterion, fc2 is
refitted or not, and the validation images are classified, without any training after. `--write` stores the page and, beside it,
the accuracies of every model as JSON; `--read` makes the page from them again.
"""

from __future__ import annotations

import argparse
import copy
import shlex
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import mlpreduce
from mlpreduce import recipe
from mlpreduce.bench.rounds import at_least_one
from mlpreduce.bench.stored_page import check_page_file, read_page, write_page
from mlpreduce.criteria import choose, list_criteria
from mlpreduce.data import load
from mlpreduce.errors import ReductionError
from mlpreduce.plugins import add_option
from mlpreduce.records import SCHEMA
from mlpreduce.train import fit

__all__ = ["corrected", "main", "page", "page_of"]

# every criterion as it is, and those options that give other units; random several times, as a draw is one of many
CHOICES: tuple[Any, ...] = (
    *list_criteria(),
    {"name": "gram_schmidt", "source": "fc1+bias"},
    {"name": "gram_schmidt", "source": "fc1+fc2"},
    {"name": "taylor", "site": "fc1"},
    {"name": "taylor", "site": "both"},
    {"name": "nvit", "site": "both"},
    {"name": "activation", "statistic": "frequency"},
)
_ORDERS = ("first", "last", "random", "gram_schmidt")  # give no scores to compare MLPs by
_DRAWS = 5  # of random, averaged for each seed
_REPAIRS = ("none", "parallel")

Table = dict[str, dict[tuple[float, str], list[float]]]  # criterion -> ratio and repair -> top-1 by seed


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is not trained yet, measure, print the page and write it; the exit status: 0, or 2 after an error."""
    parser = argparse.ArgumentParser(
        prog="mlpreduce bench criteria",
        description="Accuracy after slicing by each criterion, with and without repair.",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 123, 7, 1, 2, 3], help="of the trained models")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.25, 0.1], help="of the hidden units kept")
    parser.add_argument("--samples", type=int, default=512, help="calibration images (default: 512)")
    parser.add_argument("--scope", choices=["uniform", "global"], default="uniform", help="as of shallow")
    parser.add_argument("--output", type=Path, default=Path("runs/bench_criteria"), help="where the models are trained")
    parser.add_argument(
        "--write", type=Path, help="a file for the page, such as docs/results/criteria.md; JSON beside it"
    )
    parser.add_argument("--read", type=Path, help="make the page from the JSON of an earlier run; nothing is measured")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe digits")
    add_option(parser)
    options = parser.parse_args(argv)
    try:
        at_least_one(options, ["samples"], "criteria")
        check_page_file(options.write)
        for ratio in options.ratios:
            if not 0 < ratio <= 1:
                raise ReductionError(f"--ratios {ratio}: a ratio is above 0 and at most 1")
        document = (
            _measured(options, _command(parser, options)) if options.read is None else read_page(options.read, page_of)
        )
        write_page(document, page_of, options.write)
    except ReductionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _command(parser: argparse.ArgumentParser, options: argparse.Namespace) -> str:
    """The command that makes the same page, with what is not as by default; where models lie changes nothing."""
    words = ["python", "-m", "mlpreduce", "bench", "criteria", *options.overrides]
    for key, value in vars(options).items():
        if key == "plugins":
            words += [word for file in value for word in ("--plugin", file)]
        elif key not in ("output", "overrides", "read") and value != parser.get_default(key):
            words += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


def _measured(options: argparse.Namespace, command: str) -> dict[str, Any]:
    """Train and slice; the top-1 of each model by criterion, ratio and repair, as the JSON beside the page holds it."""
    overrides = ["variants={ baseline = [] }", f"seeds={options.seeds}", "launch.workers=0", *options.overrides]
    torch.set_num_threads(1)  # sums of several threads round otherwise, and other images may then be right
    known = recipe.load("digits", overrides, options.plugins)
    own = [name for name in list_criteria() if name not in CHOICES]
    trained = recipe.runs(known, options.output)
    loaders = load(known.data, known.train, micro_batch=known.train.batch_size, rank=0, world=1, device="cpu")
    data = _first(loaders.train, options.samples)
    table: dict[str, dict[str, dict[str, list[float]]]] = {}
    whole = []
    for number, run in enumerate(trained):
        print(f"training and measuring {number + 1} of {len(trained)}: seed {run.seed}", file=sys.stderr)
        fit(run)
        model = mlpreduce.load(Path(run.directory) / "model").eval()
        whole.append(top1(model, loaders.val))
        for choice in (*CHOICES, *own):
            row = table.setdefault(str(choose(choice)).removesuffix("()"), {})
            for ratio in options.ratios:
                for repair in _REPAIRS:
                    found = _sliced(model, choice, ratio, repair, options.scope, data, loaders.val)
                    if found is not None:
                        row.setdefault(str(ratio), {}).setdefault(repair, []).append(found)
    return {
        "schema": SCHEMA,
        "command": command,
        "recipe": " ".join(["recipe digits", *options.overrides]),
        "seeds": options.seeds,
        "samples": sum(len(images) for images, _ in data),
        "images": loaders.val_samples,
        "scope": options.scope,
        "whole": whole,
        "top1": {name: row for name, row in table.items() if row},
    }


def _sliced(
    model: nn.Module, criterion: Any, ratio: float, repair: str, scope: str, data: Any, val: Any
) -> float | None:
    """Top-1 after slicing; of random the mean of several draws; None where the criterion gives no scores for the scope."""
    config = {"ratio": ratio, "criterion": criterion, "scope": scope, "repair": repair, "guard": False}
    draws = range(_DRAWS if criterion == "random" else 1)
    if scope != "uniform" and choose(criterion).criterion.name in _ORDERS:
        return None
    models = [mlpreduce.apply(copy.deepcopy(model), "shallow", data=data, seed=100 * d, **config) for d in draws]
    return statistics.mean(top1(other, val) for other in models)


def _first(batches: Any, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The first examples of a loader, as one batch."""

    def some() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        missing = count
        for images, labels in batches:
            yield images[:missing], labels[:missing]
            missing -= len(images)
            if missing <= 0:
                return

    images, labels = zip(*some(), strict=True)
    return [(torch.cat(images), torch.cat(labels))]


@torch.no_grad()
def top1(model: nn.Module, batches: Any) -> float:
    """Top-1 accuracy in percent."""
    right = seen = 0
    for images, labels in batches:
        right += int((model(images).argmax(-1) == labels).sum())
        seen += len(labels)
    return 100 * right / seen


def page_of(document: dict[str, Any]) -> str:
    """Make the page from the JSON that `--write` stores beside it."""
    table: Table = {
        name: {(float(ratio), repair): found for ratio, pair in row.items() for repair, found in pair.items()}
        for name, row in document["top1"].items()
    }
    return page(table, document["whole"], document)


def page(table: Table, whole: Sequence[float], facts: dict[str, Any]) -> str:
    """The page: a table, and what it says about repair and about the criteria."""
    columns = list(next(iter(table.values())))
    rows = sorted(table.items(), key=lambda item: -statistics.mean(item[1][columns[-2]]))
    seeds = ", ".join(map(str, facts["seeds"]))
    lines = [
        "# Which hidden units stay: accuracy after slicing",
        "",
        f"Top-1 in percent on the {facts['images']} validation images of the digits, mean and standard deviation (ddof=1) over",
        f"{len(whole)} trained model{'s' if len(whole) > 1 else ''} ({facts['recipe']}, seeds {seeds}), after",
        f'`shallow(ratio, criterion, scope="{facts["scope"]}", guard=False)` without any training after;',
        'repaired: with repair="parallel".',
        f"Whole models: {_spread(whole)}. Criteria of data and the repair looked at {facts['samples']} training images.",
        f"`random` is the mean of {_DRAWS} draws for each model. One image is {100 / facts['images']:.2f} points.",
        "Rows are sorted by the last ratio without repair. All of it ran on one thread.",
        "",
        "```sh",
        facts["command"],
        "```",
        "",
        "| criterion | " + " | ".join(f"{r:.0%}{', repaired' if p != 'none' else ''}" for r, p in columns) + " |",
        "|---|" + "---|" * len(columns),
        *(f"| `{name}` | " + " | ".join(_spread(row[key]) for key in columns) + " |" for name, row in rows),
        "",
        *_claims(table, columns),
    ]
    return "\n".join(lines) + "\n"


def _claims(table: Table, columns: Sequence[tuple[float, str]]) -> list[str]:
    lines = ["Paired over the models:", ""]
    for ratio in dict.fromkeys(ratio for ratio, _ in columns):
        gains = [
            after - before
            for row in table.values()
            for before, after in zip(row[ratio, "none"], row[ratio, "parallel"], strict=True)
        ]
        lines.append(
            f"- at {ratio:.0%} repair adds {statistics.mean(gains):+.2f} points on average over criteria and models "
            f"({sum(gain > 0 for gain in gains)} of {len(gains)} better, {sum(gain < 0 for gain in gains)} worse)"
        )
        if "random" in table and len(table) > 1:
            lines += [_best(table, ratio, repair) for repair in _REPAIRS]
            models = len(table["random"][ratio, "none"])
    if "random" in table and len(table) > 1:
        lines += ["", *_METHOD, f"With {models} models no p is below {min(1.0, 2 / 2**models):.3f}."]
    return lines


_METHOD = (
    "p tests all criteria against `random` at once, so it holds although the table chose the best. It is the share of all",
    "sign flips of the models' differences in which the largest paired |t| of any criterion reaches that of the named one",
    "(two-sided). Each column is corrected for its criteria; nothing corrects for the number of columns.",
)


def _best(table: Table, ratio: float, repair: str) -> str:
    """What the best criterion of a column is worth beside `random`."""
    names = [name for name in table if name != "random"]
    chance = np.asarray(table["random"][ratio, repair])
    ahead = np.asarray([table[name][ratio, repair] for name in names]) - chance
    best = int(ahead.mean(axis=1).argmax())
    p_values = corrected(ahead)
    p = "no p from one model" if p_values is None else f"p = {p_values[best]:.3f} for the best of {len(names)}"
    return (
        f"- at {ratio:.0%} {'repaired' if repair != 'none' else 'without repair'} the best criterion, `{names[best]}`, is "
        f"{_spread(list(ahead[best]))} points from `random`, ahead for {int((ahead[best] > 0).sum())} of {ahead.shape[1]} "
        f"models; {p}"
    )


def corrected(differences: np.ndarray) -> np.ndarray | None:
    """Test several mean differences at once, so that the p-value of each holds whichever of them is looked at.

    Under the hypothesis that no row differs, the differences of one model are as likely with the other sign. All sign flips
    are taken, the same for all rows, which keeps what the rows have in common; the largest |t| of a flip is what a chosen
    best reaches by chance (Westfall and Young's maxT). Holm's procedure would treat rows that move together as
    independent, and with few models no p-value could then be small.

    Args:
        differences: (rows, models), paired differences.

    Returns:
        (rows,), two-sided p-values; None for fewer than two models.

    Example:
        >>> import numpy as np
        >>> corrected(np.array([[1.0, 2.0, 3.0, 2.0], [0.1, -0.1, 0.2, -0.2]])).tolist()
        [0.25, 1.0]
    """
    if differences.shape[1] < 2:
        return None
    from scipy.stats import permutation_test

    def t(values: np.ndarray, axis: int) -> np.ndarray:
        mean, error = values.mean(axis=axis), values.std(axis=axis, ddof=1) / values.shape[axis] ** 0.5
        found: np.ndarray = np.abs(mean) / np.maximum(error, 1e-9)  # equal differences have no spread
        return found

    test = permutation_test(
        (differences,),
        t,
        permutation_type="samples",
        vectorized=True,
        n_resamples=np.inf,
        axis=-1,
        alternative="greater",
    )
    largest = np.asarray(test.null_distribution).max(axis=-1)
    reached: np.ndarray = (largest[:, None] >= np.asarray(test.statistic) * (1 - 1e-9)).mean(axis=0)
    return reached


def _spread(values: Sequence[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"
