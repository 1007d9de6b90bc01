"""What a recipe comes to: the types of `results.json`. What another version has written besides is kept as it is.

What does not last, such as speed, may be missing: pages keep results without it.
"""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from mlpreduce.records.record import SCHEMA, Document

__all__ = ["Against", "Results", "RunResult", "VariantResult", "Variants"]


class RunResult(Document):
    """One finished run. Accuracies in percent; the best epoch is chosen on the validation set.

    Attributes:
        seed: of the run.
        top1: of the best epoch.
        top5: of the same.
        raw_top1: of the trained weights beside their moving average, at their own best epoch; None without an average.
        peak_epoch: the best one.
        final_top1: of the last.
        peak_to_final: the difference, in points.
        epochs: how many.
        mlflow_run_id: where it is mirrored.
    """

    seed: int
    top1: float
    top5: float
    raw_top1: float | None = None
    peak_epoch: int
    final_top1: float
    peak_to_final: float
    epochs: int
    mlflow_run_id: str | None = None


class Against(Document):
    """Top-1 of a variant against the baseline's: a paired two-sided t-test over the seeds that both have.

    What is not defined is None: all but the difference for one pair; p and the interval for equal differences.

    Attributes:
        delta: mean difference, in points.
        p_value: of no difference.
        n: pairs.
        test: its name.
        df: degrees of freedom.
        ci_low: lower end of the 95 % confidence interval of the mean difference.
        ci_high: upper end.
    """

    delta: float
    p_value: float | None = None
    n: int
    test: str = "paired t"
    df: int | None = None
    ci_low: float | None = None
    ci_high: float | None = None


class VariantResult(Document):
    """One variant: counts of its model, and what its runs come to. Standard deviations have ddof=1; None for one run."""

    params: int
    mlp_params: int
    unique_mlps: int
    macs_linear: int
    macs: int
    macs_with_attention: int
    throughput: float | None = None  # images/s, median over the runs; None where not measured on equal hardware
    peak_memory_mib: float | None = None  # likewise
    runs: tuple[RunResult, ...]
    top1_mean: float
    top1_std: float | None = None
    raw_top1_mean: float | None = None
    top5_mean: float
    peak_to_final_mean: float
    vs_baseline: Against | None = None


class Variants(Document):
    """The variants at a point of a sweep."""

    variants: dict[str, VariantResult]


class Results(Document):
    """All variants of a recipe, or of each point of its sweep.

    Attributes:
        version: of the schema.
        recipe: its name.
        warnings: that training began with.
        variants: by name; none where there are points.
        points: of a sweep, by name.
    """

    version: int = Field(SCHEMA, alias="schema")
    recipe: str
    warnings: tuple[str, ...] = ()
    variants: dict[str, VariantResult] = Field(default_factory=dict)
    points: dict[str, Variants] = Field(default_factory=dict)

    @property
    def every(self) -> Iterator[tuple[str, VariantResult]]:
        """The variants of all points, by names that have the point's in front."""
        yield from self.variants.items()
        for point, part in self.points.items():
            yield from ((f"{point} {name}", found) for name, found in part.variants.items())
