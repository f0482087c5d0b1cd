"""Bootstrap values that are kept with each cell, so that methods can be compared on the same resamples later.

Resamples are drawn from a seed that names the test rows. Cells with the same rows therefore share their resamples,
whatever the method or the seed of its training: differences between methods are paired, and the average over seeds
that share a test set keeps the variance of its rows. Within a resample, wrong and right answers are as many as in the
test set (``vilu.metrics.bootstrap``).
"""

from __future__ import annotations

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


def interval(per_seed: Floats, confidence: float) -> Interval:
    """Percentile interval of the mean over seeds, from values (S, B)."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(mean_over_seeds(per_seed), [tail, 1 - tail])
    return Interval(float(low), float(high))


def gap(value_a: Floats, value_b: Floats, per_seed_a: Floats, per_seed_b: Floats, confidence: float) -> Gap:
    """Mean over seeds of a less that of b, from values (S,) and bootstrap values (S, B) of the same seeds.

    The p-value is that of ``vilu.metrics.bootstrap.paired_bootstrap``.
    """
    differences = mean_over_seeds(per_seed_a - per_seed_b)
    tail = (1 - confidence) / 2
    low, high = np.quantile(differences, [tail, 1 - tail])
    fewer = min(np.count_nonzero(differences <= 0), np.count_nonzero(differences >= 0))
    p_value = min(1.0, 2 * (1 + fewer) / (1 + len(differences)))
    return Gap(float(np.mean(value_a - value_b)), float(low), float(high), p_value)
