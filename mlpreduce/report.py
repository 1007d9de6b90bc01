"""Tables and figures from records. The only module that imports matplotlib.

Everything is rebuilt from the `record.json` files alone: `report.build(DIR)`.
"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from mlpreduce.records import read, write_results

if TYPE_CHECKING:
    from rich.console import Group

__all__ = ["NOTES", "build", "console_table", "markdown", "plot"]

_HEADERS = (
    "variant",
    "parameters",
    "MLP parameters",
    "unique MLPs",
    "MACs",
    "top-1 %",
    "top-5 %",
    "peak-to-final",
    "images/s",
    "vs baseline",
    "p",
    "n",
)
_COUNTS = (0, 1, 2, 3, 4, 8)
_ACCURACY = (0, 5, 6, 7, 9, 10, 11)
NOTES = (
    "Tied parameters are counted once. MACs: multiply-accumulates of one image in Linear, Conv and LayerNorm layers, "
    "attention products left out (the paper's convention; `macs` in results.json).",
    "Top-1 and top-5 are those of the best epoch, chosen on the validation set; mean ± standard deviation over seeds "
    "(ddof=1). Peak-to-final: top-1 of the best epoch minus that of the last, in points.",
    "images/s: inference, batches of 32, on one worker of this run's hardware.",
    "vs baseline: mean difference in top-1 over the common seeds; p: two-sided paired t-test; n: number of pairs.",
)


def build(directory: str | Path) -> dict[str, Any]:
    """Write `results.json`, `report.md` and `curves.png` into an output directory, from its records alone.

    Returns:
        What `results.json` holds.

    Raises:
        ReductionError: there is no finished run.
    """
    directory = Path(directory)
    document = write_results(directory)
    (directory / "report.md").write_text(markdown(document), encoding="utf-8")
    plot(directory)
    return document


def console_table(document: dict[str, Any]) -> Group:
    """The results for rich's console: one table of counts, one of accuracies."""
    from rich.console import Group
    from rich.table import Table

    rows = _rows(document)
    tables = []
    for title, columns in (("counts and speed", _COUNTS), ("accuracy", _ACCURACY)):
        table = Table(title=f"{document['recipe']}: {title}")
        for column in columns:
            table.add_column(_HEADERS[column], justify="right" if column else "left")
        for row in rows:
            table.add_row(*(row[column] for column in columns))
        tables.append(table)
    return Group(*tables)


def markdown(document: dict[str, Any]) -> str:
    """The results as a markdown document."""
    lines = [f"# {document['recipe']}", "", f"| {' | '.join(_HEADERS)} |", f"|{'---|' * len(_HEADERS)}"]
    lines += [f"| {' | '.join(row)} |" for row in _rows(document)]
    lines += ["", *(f"- {note}" for note in NOTES), "", "## Runs", ""]
    lines += ["| variant | seed | top-1 % | best epoch | final top-1 % | epochs | MLflow run |", f"|{'---|' * 7}"]
    for name, variant in document["variants"].items():
        for run in variant["runs"]:
            lines.append(
                f"| {name} | {run['seed']} | {run['top1']:.2f} | {run['peak_epoch']} | {run['final_top1']:.2f} | "
                f"{run['epochs']} | {run['mlflow_run_id']} |"
            )
    lines += ["", "![validation top-1 and loss](curves.png)", ""]
    return "\n".join(lines)


def plot(directory: str | Path) -> Path:
    """Draw validation top-1 and loss over the epochs into `curves.png`: the mean and the range over the seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = [record for record in read(directory) if record["status"] == "finished"]
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2)
    for axis, key, label in zip(axes, ("top1", "val_loss"), ("validation top-1 (%)", "validation loss"), strict=True):
        for number, variant in enumerate(dict.fromkeys(record["variant"] for record in records)):
            curves = [[e[key] for e in record["epochs"]] for record in records if record["variant"] == variant]
            columns = list(zip(*curves, strict=False))  # epochs that all seeds have
            epochs = range(1, len(columns) + 1)
            colour = f"C{number}"
            axis.plot(epochs, [fmean(c) for c in columns], color=colour, label=f"{variant} ({len(curves)} seeds)")
            axis.fill_between(
                epochs, [min(c) for c in columns], [max(c) for c in columns], color=colour, alpha=0.2, lw=0
            )
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0].legend(loc="lower right")
    figure.suptitle(f"{records[0]['recipe']['name']}: mean and range over seeds")
    path = Path(directory) / "curves.png"
    figure.savefig(path, dpi=120)
    return path


def _rows(document: dict[str, Any]) -> list[list[str]]:
    rows = []
    for name, v in document["variants"].items():
        spread = "" if v["top1_std"] is None else f" ± {v['top1_std']:.2f}"
        speed = "" if v["throughput"] is None else f"{v['throughput']:,.0f}"
        rows.append(
            [
                name,
                f"{v['params']:,}",
                f"{v['mlp_params']:,}",
                str(v["unique_mlps"]),
                _macs(v["macs"]),
                f"{v['top1_mean']:.2f}{spread}",
                f"{v['top5_mean']:.2f}",
                f"{v['peak_to_final_mean']:.2f}",
                speed,
                *_comparison(v["vs_baseline"]),
            ]
        )
    return rows


def _comparison(against: dict[str, Any] | None) -> list[str]:
    if against is None:
        return ["", "", ""]
    p = "not defined" if against["p_value"] is None else f"{against['p_value']:.3f}"
    if against["n"] < 3:
        p += " (n is too small to conclude)"
    return [f"{against['delta']:+.2f}", p, str(against["n"])]


def _macs(macs: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if macs >= size:
            return f"{macs / size:.3f} {unit}"
    return f"{macs:.0f}"
