"""What records come to: results of runs and variants, and comparisons with the baseline."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from mlpreduce.budget import COSTS
from mlpreduce.errors import ReductionError
from mlpreduce.records.files import finished
from mlpreduce.records.record import SCHEMA, Record
from mlpreduce.records.result import Against, Results, RunResult, VariantResult

__all__ = ["baseline_of", "conditions", "results", "summarize", "summary"]


def conditions(record: Record) -> tuple[Any, ...]:
    """What speed and memory of a run were measured on: equal for those that may be compared or averaged."""
    on = record.hardware
    return on.device, on.machine, on.cpu_cores, on.workers, record.profile.device, record.profile.batch_size


def summary(record: Record) -> RunResult:
    """The results of one finished run.

    Raises:
        ReductionError: the run has no epoch.
    """
    if not record.epochs:
        raise ReductionError(
            f"the record of {record.variant}, seed {record.seed}, is {record.status} and has no epoch; put it back from "
            f"a copy, or move its folder away"
        )
    best = max(record.epochs, key=lambda entry: entry.top1)
    final = record.epochs[-1]
    return RunResult(
        seed=record.seed,
        top1=best.top1,
        top5=best.top5,
        raw_top1=_raw_top1(record),
        peak_epoch=best.epoch,
        final_top1=final.top1,
        peak_to_final=best.top1 - final.top1,
        epochs=len(record.epochs),
        mlflow_run_id=record.mlflow_run_id,
    )


def _raw_top1(record: Record) -> float | None:
    if not record.recipe.get("train", {}).get("ema_decay"):
        return None
    return max((entry.raw_top1 for entry in record.epochs if entry.raw_top1 is not None), default=None)


def results(directory: str | Path) -> Results:
    """What a recipe gave, from the records of its finished runs alone; see `summarize`.

    Raises:
        ReductionError: there is no finished run.
    """
    return summarize(finished(directory))


def baseline_of(records: Iterable[Record]) -> str | None:
    """The variant that the others are compared with: the first without steps, if there is one."""
    return next((record.variant for record in records if not record.steps), None)


def summarize(records: Sequence[Record]) -> Results:
    """What `results.json` holds, from finished records.

    Counts and speed are those of one variant. Runs of equal seed are compared with the first variant that has no steps.
    """
    variants: dict[str, list[Record]] = {}
    for record in records:
        variants.setdefault(record.variant, []).append(record)
    baseline = baseline_of(records)
    reference = {r.seed: summary(r).top1 for r in variants[baseline]} if baseline is not None else {}
    table: dict[str, VariantResult] = {}
    for name, found in variants.items():
        runs = tuple(map(summary, found))
        top1 = [run.top1 for run in runs]
        raw = [run.raw_top1 for run in runs if run.raw_top1 is not None]
        table[name] = VariantResult(
            **found[0].profile.model_dump(include={*COSTS}),
            throughput=_median(found, "throughput"),
            peak_memory_mib=_median(found, "peak_memory_mib"),
            runs=runs,
            top1_mean=fmean(top1),
            top1_std=stdev(top1) if len(top1) > 1 else None,
            raw_top1_mean=fmean(raw) if len(raw) == len(runs) else None,
            top5_mean=fmean([run.top5 for run in runs]),
            peak_to_final_mean=fmean([run.peak_to_final for run in runs]),
            vs_baseline=None if baseline is None or name == baseline else _compare(runs, reference),
        )
    names = dict.fromkeys(record.name for record in records)
    warnings = dict.fromkeys(text for record in records for text in record.warnings)
    return Results(schema=SCHEMA, recipe=" + ".join(names), warnings=tuple(warnings), variants=table)


def _compare(runs: Sequence[RunResult], reference: dict[int, float]) -> Against | None:
    """The comparison over the seeds that both have; None where there is none."""
    pairs = [(run.top1, reference[run.seed]) for run in runs if run.seed in reference]
    if not pairs:
        return None
    differences = [ours - theirs for ours, theirs in pairs]
    p_value = low = high = None
    # equal differences have no variance to test against
    if len(pairs) > 1 and max(differences) - min(differences) > 1e-9:
        from scipy.stats import ttest_rel

        test = ttest_rel(*zip(*pairs, strict=True))
        low, high = (float(bound) for bound in test.confidence_interval(0.95))
        p_value = float(test.pvalue)
    return Against(
        delta=fmean(differences),
        p_value=p_value,
        n=len(pairs),
        test="paired t",
        df=len(pairs) - 1 if len(pairs) > 1 else None,
        ci_low=low,
        ci_high=high,
    )


def _median(found: Sequence[Record], measure: str) -> float | None:
    """Over the runs of a variant; None where nothing was measured, or not on equal hardware."""
    if len({conditions(record) for record in found}) > 1:
        return None
    values = [getattr(record.profile, measure) for record in found]
    known = [value for value in values if value is not None]
    return median(known) if known else None
