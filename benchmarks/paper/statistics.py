"""Means, and paired tests of two methods over the same seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats


@dataclass(frozen=True)
class Paired:
    """How two methods differ over runs with the same seeds.

    Attributes:
        mean: Of the differences.
        low: Lower end of the 95 % confidence interval of the mean (Student's t).
        high: Its upper end.
        t: The p-value of the paired t-test, two-sided.
        wilcoxon: The p-value of Wilcoxon's signed-rank test, two-sided; runs that do not differ
            are left out.
        runs: How many.
    """

    mean: float
    low: float
    high: float
    t: float
    wilcoxon: float
    runs: int


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and sample standard deviation; 0 for that of a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def paired(values: Sequence[float], others: Sequence[float]) -> Paired | None:
    """Compare two methods; None for fewer than two runs.

    Args:
        values: Of one method, by seed.
        others: Of the other one, by the same seeds.

    Raises:
        ValueError: If they are not as many.
    """
    differences = [a - b for a, b in zip(values, others, strict=True)]
    if len(differences) < 2:
        return None
    mean = statistics.fmean(differences)
    if max(differences) - min(differences) < 1e-9:  # no spread, to which no test applies
        p = 1.0 if abs(mean) < 1e-9 else 0.0
        return Paired(mean, mean, mean, p, _wilcoxon(differences), len(differences))
    test = stats.ttest_1samp(differences, 0.0)
    interval = test.confidence_interval(0.95)
    return Paired(
        mean,
        float(interval.low),
        float(interval.high),
        float(test.pvalue),
        _wilcoxon(differences),
        len(differences),
    )


def _wilcoxon(differences: list[float]) -> float:
    # Accuracies are counts: what is zero and what is tied must not hang on rounding.
    rounded = [round(difference, 6) for difference in differences]
    if not any(rounded):
        return 1.0
    return float(stats.wilcoxon(rounded).pvalue)
