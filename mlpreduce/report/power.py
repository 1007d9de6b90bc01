"""What a comparison over few seeds could have seen."""

from __future__ import annotations

from mlpreduce.records import Against

__all__ = ["ALPHA", "POWER", "detectable"]

ALPHA = 0.05  # two-sided
POWER = 0.8


def detectable(against: Against | None) -> float | None:
    """Compute the least true difference that the paired t-test would have found with a power of 80 %, at 5 %.

    The standard error is the measured one. The test finds a true difference d if |t| is beyond its critical value, and t then
    has the noncentral t distribution with n - 1 degrees of freedom around d over the standard error.

    Args:
        against: a `vs_baseline` of `results.json`.

    Returns:
        Points of top-1; None where the interval is not defined, or of fewer than three pairs.

    Example:
        >>> round(detectable(Against(delta=0.07, n=4, ci_low=-0.912, ci_high=1.052, df=3)), 2)
        1.31
    """
    if against is None or against.ci_low is None or against.ci_high is None or (against.df or 0) < 2:
        return None
    from scipy.optimize import brentq
    from scipy.stats import nct, t

    low, high, df = against.ci_low, against.ci_high, against.df
    critical = t.ppf(1 - ALPHA / 2, df)
    error = (high - low) / 2 / critical

    def lack(shift: float) -> float:
        return float(nct.sf(critical, df, shift)) - POWER  # the other tail has less than a millionth by then

    return float(error * brentq(lack, 0.0, 2 * critical + 2))
