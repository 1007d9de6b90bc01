"""What a recipe comes to: one table of all its variants, what to be careful of, which differences are beyond the noise."""

from __future__ import annotations

from collections.abc import Iterator

from mlpreduce.records import Results
from mlpreduce.report.content import Table
from mlpreduce.report.tables import RAW, comparison, mean_std, raw_top1, short

__all__ = ["beyond_noise", "cautions", "overview"]

RATE = 0.05  # of false discoveries
LEAST = 3  # seeds, below which nothing is concluded
BEHIND = 2.0  # points of top-1 by which a moving average must be behind the trained weights to be remarked on
HEADERS = (
    "variant",
    "parameters",
    "MACs",
    "images/s",
    "top-1 %",
    "peak-to-final",
    "vs baseline",
    "95 % interval",
    "p",
    "n",
)


def overview(document: Results) -> Table:
    """One table of all variants, of all points of a sweep, from `results.json` alone.

    Where top-1 is that of a moving average, that of the trained weights is beside it.
    """
    averaged = any(v.raw_top1_mean is not None for _, v in document.every)
    headers = [*HEADERS]
    if averaged:
        headers.insert(headers.index("top-1 %") + 1, RAW)
    rows = []
    for name, v in document.every:
        speed = "" if v.throughput is None else f"{v.throughput:,.0f}"
        top1 = mean_std([run.top1 for run in v.runs])
        compared = comparison(v.vs_baseline) if v.vs_baseline else [""] * 5
        delta, interval, p, n, _ = compared
        raw = [raw_top1(v)] if averaged else []
        cells = [short(v.params), short(v.macs), speed, top1, *raw, f"{v.peak_to_final_mean:.2f}"]
        rows.append([name, *cells, delta, interval, p, n])
    return Table(str(document.recipe), headers, rows)


def cautions(document: Results) -> list[str]:
    """What to be careful of: the warnings that training began with, and averages behind the weights that they average."""
    return [f"Warning: {text}" for text in document.warnings] + list(_behind(document))


def _behind(document: Results) -> Iterator[str]:
    """Which moving averages hide what was learned, and whether the ranking of the variants hangs on it."""
    known = [(name, v.top1_mean, v.raw_top1_mean) for name, v in document.every if v.raw_top1_mean]
    behind = [(name, average, raw) for name, average, raw in known if raw - average > BEHIND]
    if not behind:
        return
    told = "; ".join(
        f"the averaged weights of {name} have {average:.2f} %, the trained weights {raw:.2f} %"
        for name, average, raw in behind
    )
    averaged = [name for name, _, _ in sorted(known, key=lambda row: -row[1])]
    trained = [name for name, _, _ in sorted(known, key=lambda row: -row[2])]
    order = (
        f" The ranking depends on it: from best to worst {', '.join(averaged)} by the average, {', '.join(trained)} by the "
        f"trained weights."
        if averaged != trained
        else ""
    )
    yield f"The moving average hides what was learned. In top-1, {told}.{order}"


def beyond_noise(document: Results) -> str:
    """Which variants differ from their baseline in top-1 beyond the noise; empty where fewer than two can be compared.

    The more variants, the more of them differ by chance: p-values are adjusted by Benjamini and Hochberg's procedure, so that
    at most 5 % of the differences called beyond the noise are expected to be chance.
    """
    from scipy.stats import false_discovery_control

    compared = [(name, v.vs_baseline) for name, v in document.every if v.vs_baseline]
    tested = [(name, v) for name, v in compared if v.p_value is not None and v.n >= LEAST]
    if len(compared) < 2:
        return ""
    untold = [name for name, against in compared if (name, against) not in tested]
    few = f"too few seeds, or equal differences, to tell: {', '.join(untold)}" if untold else ""
    if not tested:
        return f"No difference in top-1 from the baseline can be tested; {few}."
    adjusted = false_discovery_control([against.p_value for _, against in tested])
    marked = list(zip(tested, adjusted, strict=True))
    beyond = [f"{name} ({against.delta:+.2f})" for (name, against), p in marked if p <= RATE]
    within = [name for (name, _), p in marked if p > RATE]
    parts = [
        f"{len(tested)} differences in top-1 from the baseline are tested, over {min(a.n for _, a in tested)} or more seeds",
        f"beyond the noise: {', '.join(beyond) or 'none'}",
        f"within it: {', '.join(within) or 'none'}",
        *([few] if few else []),
    ]
    chance = f"of those beyond, at most {RATE:.0%} are expected to be chance"
    return f"{'; '.join(parts)} (paired t-tests; {chance}: Benjamini-Hochberg)."
