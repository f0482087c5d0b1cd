"""Bootstrap values that are kept with each cell, so that methods can be compared on the same resamples later.

Resamples are drawn from a seed that names the test rows. Cells with the same rows therefore share their resamples,
whatever the method or the seed of its training: differences between methods are paired, and the average over seeds
that share a test set keeps the variance of its rows. Within a resample, wrong and right answers are as many as in the
test set (``vilu.metrics.bootstrap``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vilu.metrics.bootstrap import SortedScores, resampled_rows
from vilu.metrics.catalog import METRICS

Floats = NDArray[np.float64]

RANKED_BY = ("auroc", "fpr95")
"""Metrics that get intervals; methods are ranked by the first."""


@dataclass(frozen=True)
class Interval:
    """Lower and upper end."""

    low: float
    high: float


@dataclass(frozen=True)
class Gap:
    """A difference of means, its interval, and the two-sided p-value of no difference."""

    difference: float
    low: float
    high: float
    p_value: float


@dataclass(frozen=True)
class Quantity:
    """A number with its bootstrap values, so that whatever is computed from it has an interval, too.

    Quantities of the same test rows share their resamples, so a difference of them is paired.

    Attributes:
        value: The number.
        draws: (B,) its bootstrap values.
    """

    value: float
    draws: Floats

    @classmethod
    def over_seeds(cls, values: Floats, per_seed: Floats) -> Quantity:
        """The mean over seeds of values (S,) with bootstrap values (S, B); the seeds are resampled, too."""
        return cls(float(np.mean(values)), mean_over_seeds(per_seed))

    @classmethod
    def mean(cls, quantities: Sequence[Quantity]) -> Quantity:
        """The mean of several, such as a method's on several data sets."""
        draws = np.mean([one.draws for one in quantities], axis=0)
        return cls(float(np.mean([one.value for one in quantities])), draws)

    @classmethod
    def slope(cls, x: Floats, quantities: Sequence[Quantity]) -> Quantity:
        """Slope of the least-squares line through points at x (n,)."""
        centred = (x - x.mean()) / np.square(x - x.mean()).sum()
        values = np.array([one.value for one in quantities])
        return cls(float(centred @ values), centred @ np.stack([one.draws for one in quantities]))

    def __sub__(self, other: Quantity) -> Quantity:
        return Quantity(self.value - other.value, self.draws - other.draws)

    def interval(self, confidence: float) -> Interval:
        """Percentile interval."""
        tail = (1 - confidence) / 2
        low, high = np.quantile(self.draws, [tail, 1 - tail])
        return Interval(float(low), float(high))

    def p_value(self) -> float:
        """Two-sided, of being zero: that of ``vilu.metrics.bootstrap.paired_bootstrap``."""
        fewer = min(np.count_nonzero(self.draws <= 0), np.count_nonzero(self.draws >= 0))
        return float(min(1.0, 2 * (1 + fewer) / (1 + len(self.draws))))

    def gap(self, confidence: float) -> Gap:
        """Of a difference."""
        ends = self.interval(confidence)
        return Gap(self.value, ends.low, ends.high, self.p_value())


def resampled_metrics(uncertainty: Floats, failure: NDArray[np.int64], n_resamples: int, rows: str) -> Floats:
    """(M, B) values of the metrics ``RANKED_BY`` on B resamples of the rows that ``rows`` names.

    NaN where there is no wrong or no right answer.
    """
    values = np.full((len(RANKED_BY), n_resamples), np.nan)
    wrong = failure == 1
    if not 0 < np.count_nonzero(wrong) < len(wrong):
        return values
    scores = SortedScores(uncertainty, wrong)
    start = 0
    for chosen in resampled_rows(scores, n_resamples, int(rows, 16)):
        counts = scores.counts(*chosen)
        stop = start + len(chosen[0])
        for metric, name in enumerate(RANKED_BY):
            values[metric, start:stop] = METRICS[name].kernel(counts)
        start = stop
    return values


def mean_over_seeds(per_seed: Floats) -> Floats:
    """(B,) bootstrap values of a mean over seeds, from values (S, B) of each seed: the seeds are resampled, too."""
    n_seeds, n_resamples = per_seed.shape
    seeds = np.random.default_rng(n_seeds).integers(n_seeds, size=(n_seeds, n_resamples))
    means: Floats = np.take_along_axis(per_seed, seeds, axis=0).mean(axis=0)
    return means
