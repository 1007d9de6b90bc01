"""What a report says: tables of text, the same for markdown, HTML and the console."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean, median, stdev

from mlpreduce.records import Against, Record, Results, VariantResult, baseline_of, conditions
from mlpreduce.report import probes, published
from mlpreduce.report.content import Content, Listing, Picture, Table
from mlpreduce.report.gathering import differing
from mlpreduce.report.power import detectable
from mlpreduce.words.values import short, unit_of

__all__ = ["FEW", "NOTES", "RAW", "Part", "comparison", "compose", "few", "mean_std", "raw_top1", "short"]

ABSENT = "not in the paper"
FEW = "(n is too small to conclude)"
RAW = "raw top-1 %"
AVERAGED = (
    "Top-1 and top-5 are those of the moving average of the weights (train.ema_decay). Raw top-1 is that of the trained "
    "weights themselves, at their own best epoch."
)
NOTES = (
    "Tied parameters are counted once. MACs: multiply-accumulates of one image in Linear, Conv and LayerNorm layers, "
    "attention products left out (the paper's convention; macs in results.json).",
    "Top-1 and top-5 are those of the best epoch, chosen on the validation set; mean ± standard deviation over seeds "
    "(ddof=1). Peak-to-final: top-1 of the best epoch minus that of the last, in points.",
    "images/s and peak memory: inference on one worker, medians over the runs; the report names batch, dtype and hardware. A "
    "ratio is to the baseline measured in the same output directory on equal hardware.",
    "vs baseline: mean difference in top-1 over the common seeds, with its 95 % confidence interval; p: paired two-sided "
    "t-test; n: number of pairs, df = n - 1.",
    "detectable: the least true difference that this test finds four times in five (power 80 %, two-sided 5 %, not corrected "
    "for several variants), given the measured deviation of the differences; from three pairs on.",
)


@dataclass(frozen=True)
class _Variant:
    name: str
    results: VariantResult
    records: Sequence[Record]
    published: dict[str, str] | None  # cells; None where the paper has no part
    width: int | None  # features that go into an MLP, if the plans show it
    baseline: str | None  # the variant that it is compared with

    @property
    def source(self) -> str:
        return ", ".join(dict.fromkeys(record.output for record in self.records))

    def spread(self, key: str, digits: int = 2) -> str:
        return mean_std([getattr(run, key) for run in self.results.runs], digits)


# What `results.json` says of finished records, and the records.
Part = tuple[Results, Sequence[Record]]
# A column: header, what stands there for our runs, and the key of the paper's cell.
_Column = tuple[str, Callable[[_Variant], str], str]


def compose(title: str, parts: Sequence[Part], pictures: Sequence[Picture], remarks: Iterable[str] = ()) -> Content:
    """The report of finished records and what `results.json` says of them: one part, or one for each point of a sweep."""
    records = [record for _, found in parts for record in found]
    paper = all(published.reproduces(record.name) for record in records)
    variants = [variant for document, found in parts for variant in _variants(document, found, paper)]
    averaged = any(variant.results.raw_top1_mean is not None for variant in variants)
    params, macs = (_unit(variants, key, paper) for key in ("params", "macs"))
    parameters: _Column = (f"parameters ({params[1]})", partial(_in_unit, "params", params[0]), "params")
    size: list[_Column] = [
        parameters,
        (f"MLP parameters ({params[1]})", partial(_in_unit, "mlp_params", params[0]), "mlp_params"),
        ("unique MLPs", lambda v: str(v.results.unique_mlps), "unique_mlps"),
        (f"MACs ({macs[1]})", partial(_in_unit, "macs", macs[0]), "macs"),
        ("hidden / width", _expansion, "expansion"),
        ("parameters", lambda v: f"{v.results.params:,}", ""),
    ]
    validation: list[_Column] = [
        parameters,
        ("top-1 %", lambda v: v.spread("top1"), "top1"),
        *([(RAW, lambda v: raw_top1(v.results), "")] if averaged else []),
        ("top-5 %", lambda v: v.spread("top5"), "top5"),
        ("best epoch", lambda v: v.spread("peak_epoch", 0), "peak_epoch"),
        ("peak-to-final", lambda v: v.spread("peak_to_final"), "peak_to_final"),
        ("images/s", _images_per_s, "throughput"),
    ]
    cost: list[_Column] = [
        ("top-1 % per M parameters", partial(_per, "params", 1e6), "top1_per_params"),
        ("top-1 % per G MACs", partial(_per, "macs", 1e9), "top1_per_macs"),
    ]
    notes = [*NOTES]
    notes += [AVERAGED] if averaged else []
    notes += [probes.NOTE] if probes.any_in(records) else []
    notes += [published.NOTE] if paper else []
    return Content(
        title=title,
        remarks=[*remarks, *_remarks(records, paper)],
        sections=[
            _table("Table 1: size and compute", size, variants),
            _table("Table 2: validation", validation, variants),
            _table("Accuracy for its cost", cost, variants),
            _against(variants),
            _speed(variants, records),
            *_probes(variants, records),
            _runs(variants),
            _where(records),
            *pictures,
            Listing("Notes", notes),
        ],
    )


def _variants(document: Results, records: Sequence[Record], paper: bool) -> Iterator[_Variant]:
    width, baseline = _width(records), baseline_of(records)
    for name, found in document.variants.items():
        mine = [record for record in records if record.variant == name]
        cells = published.cells_of(mine[0].steps) if paper else None
        yield _Variant(name, found, mine, cells, width, baseline)


def comparison(against: Against) -> list[str]:
    """Mean difference, confidence interval, p, n and df of a `vs_baseline`."""
    low, high, p, df = against.ci_low, against.ci_high, against.p_value, against.df
    interval = "not defined" if low is None else f"[{low:+.2f}, {high:+.2f}]"
    value = "not defined" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"
    return [
        f"{against.delta:+.2f}",
        interval,
        few(value, against.n),
        str(against.n),
        str(df if df else "not defined"),
    ]


def few(p: str, n: int) -> str:
    """A p-value, with a warning where the pairs are fewer than three."""
    return f"{p} {FEW}" if n < 3 else p


def mean_std(values: Sequence[float], digits: int = 2) -> str:
    """Mean and standard deviation (ddof=1); the mean alone for one value."""
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{spread}"


def raw_top1(variant: VariantResult) -> str:
    """Top-1 of the trained weights over the runs of a variant in `results.json`; empty where no average was made."""
    found = [run.raw_top1 for run in variant.runs if run.raw_top1 is not None]
    return mean_std(found) if found else ""


def _unit(variants: Iterable[_Variant], key: str, paper: bool) -> tuple[float, str]:
    """The unit of a column: that of its largest count, or the one that the paper prints beside it."""
    if paper:
        return (1e6, "M") if key == "params" else (1e9, "G")
    return unit_of(max(1000.0, *(getattr(v.results, key) for v in variants)))


def _in_unit(key: str, unit: float, v: _Variant) -> str:
    """Five significant digits."""
    return f"{getattr(v.results, key) / unit:#.5g}".rstrip(".")


def _table(title: str, columns: Sequence[_Column], variants: Iterable[_Variant]) -> Table:
    """A row for each variant and, where the paper has a part, the paper's beside it."""
    rows = []
    for variant in variants:
        rows.append([variant.name, variant.source, *(cell(variant) for _, cell, _ in columns)])
        if variant.published is not None:
            rows.append(
                [variant.name, published.SOURCE, *(variant.published.get(key, ABSENT) for _, _, key in columns)]
            )
    return Table(title, ("variant", "source", *(header for header, _, _ in columns)), rows)


def _against(variants: Iterable[_Variant]) -> Table:
    rows = []
    for v in variants:
        if v.name == v.baseline:
            continue
        against = v.results.vs_baseline
        cells = comparison(against) if against else ["no run of the baseline has its seeds", "", "", "0", ""]
        least = detectable(against)
        cells.append("not defined" if least is None else f"{least:.2f}")
        rows.append([v.name, v.source, *cells])
        if v.published is not None:
            p = v.published.get("p")
            cells = [v.published.get("delta", ABSENT), ABSENT, ABSENT if p is None else few(p, published.SEEDS)]
            rows.append([v.name, published.SOURCE, *cells, str(published.SEEDS) if p else ABSENT, ABSENT, ABSENT])
    headers = ("variant", "source", "vs baseline", "95 % interval", "p", "n", "df", "detectable")
    return Table("Against the baseline", headers, rows)


def _speed(variants: Iterable[_Variant], records: Sequence[Record]) -> Table:
    """Medians over the runs of one directory and hardware, and their ratios to the baseline's that lie there too."""
    rows = []
    for v in variants:
        places = dict.fromkeys((record.output, conditions(record)) for record in v.records)
        for place in places:
            mine = [r for r in v.records if (r.output, conditions(r)) == place]
            base = [r for r in records if (r.output, conditions(r)) == place and r.variant == v.baseline]
            profile = mine[0].profile
            cells = [
                *_measured(mine, base, "throughput", ",.0f"),
                *_measured(mine, base, "peak_memory_mib", ",.1f"),
                str(profile.batch_size or "not recorded"),
                profile.device or "not recorded",
            ]
            rows.append([v.name, place[0], *cells])
        if v.published is not None:
            keys = ("throughput", "throughput_ratio", "", "memory_ratio", "", "")
            rows.append([v.name, published.SOURCE, *(v.published.get(key, ABSENT) for key in keys)])
    speed, memory = ("images/s", "ratio to baseline"), ("peak memory, MiB", "ratio of memory")
    return Table("Speed and memory, inference", ("variant", "source", *speed, *memory, "batch", "device, dtype"), rows)


def _measured(mine: Sequence[Record], base: Sequence[Record], key: str, form: str) -> tuple[str, str]:
    every = [[getattr(r.profile, key) for r in found] for found in (mine, base)]
    ours, theirs = ([value for value in values if value is not None] for values in every)
    if not ours:
        return "not measured", ""
    ratio = f"{median(ours) / median(theirs):.3f}" if theirs else "no baseline there"
    return f"{median(ours):{form}}", ratio


def _probes(variants: Iterable[_Variant], records: Sequence[Record]) -> Iterable[Table]:
    if probes.any_in(records):
        yield Table(probes.TITLE, probes.HEADERS, [[v.name, v.source, *probes.cells(v.records)] for v in variants])


def _runs(variants: Iterable[_Variant]) -> Table:
    rows = [
        [
            *(v.name, record.output, str(run.seed), f"{run.top1:.2f}", str(run.peak_epoch)),
            *(f"{run.final_top1:.2f}", str(run.epochs), str(run.mlflow_run_id)),
        ]
        for v in variants
        for record, run in zip(v.records, v.results.runs, strict=True)
    ]
    headers = ("variant", "source", "seed", "top-1 %", "best epoch", "final top-1 %", "epochs", "MLflow run")
    return Table("Runs", headers, rows)


def _where(records: Iterable[Record]) -> Table:
    rows = {}
    for record in records:
        hardware = [
            "not recorded" if value is None else str(value)
            for value in (getattr(record.hardware, key) for key in ("device", "machine", "cpu_cores", "workers"))
        ]
        versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
        rows[record.output, *hardware, versions] = [record.output, record.name, *hardware, versions]
    headers = ("source", "recipe", "device", "machine", "CPU cores", "workers", "versions")
    return Table("Where it ran", headers, list(rows.values()))


def _remarks(records: Sequence[Record], paper: bool) -> Iterable[str]:
    epochs = sorted({record.epochs_planned for record in records})
    images = sorted({record.train_samples for record in records})
    if paper and (
        any(record.name.endswith("_tiny") for record in records)
        or (epochs, images) != ([published.EPOCHS], [published.TRAIN_SAMPLES])
    ):
        yield (
            f"These runs had {_list(epochs)} epochs on {_list(images)} images, the paper's {published.EPOCHS} on "
            f"{published.TRAIN_SAMPLES:,}: the numbers say nothing about the paper, though they stand side by side."
        )
    different = differing(records)
    if different:
        yield f"The runs differ in their settings: {'; '.join(different)}."


def _list(numbers: Iterable[int]) -> str:
    return " or ".join(f"{number:,}" for number in numbers)


def _images_per_s(v: _Variant) -> str:
    found = v.results.throughput
    if found is not None:
        return f"{found:,.0f}"
    measured = any(record.profile.throughput is not None for record in v.records)
    return "see Speed and memory" if measured else "not measured"


def _per(key: str, unit: float, v: _Variant) -> str:
    ratio: float = v.results.top1_mean / (getattr(v.results, key) / unit)
    return f"{ratio:,.3f}"


def _expansion(v: _Variant) -> str:
    """Hidden features over width, if all MLPs are two Linears with biases and alike."""
    if v.width is None or not v.results.unique_mlps:
        return "not recorded"
    hidden, rest = divmod(
        v.results.mlp_params - v.width * v.results.unique_mlps, (2 * v.width + 1) * v.results.unique_mlps
    )
    return "not recorded" if rest else f"{hidden / v.width:.3g}"


def _width(records: Iterable[Record]) -> int | None:
    """Features that go into an MLP of two Linears with biases, from its hidden features and parameters in a plan."""
    rows = [row for record in records for plan in record.plans for row in plan["rows"]]
    found = {
        divmod(row[6] - row[2], 2 * row[2] + 1) if row[1] == "plain" and row[6] else None for row in rows if row[6]
    }
    if len(found) != 1:
        return None
    (only,) = found
    return only[0] if only is not None and only[1] == 0 else None
