"""Whether a failure probability means what it says. Only for uncertainties that are probabilities."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from vilu.errors import DataError, UsageError, checked, require_at_least
from vilu.metrics.counts import Floats, TieCounts, ratio, tie_counts

Binning = Literal["width", "mass"]

CERTAIN = 1e-12
"""How near to 0 or 1 a probability may come in a logarithm."""


@checked
def ece(probability: ArrayLike, failure: ArrayLike, bins: int = 15, binning: Binning = "width") -> float:
    """Expected calibration error of a failure probability: Σ_b (n_b / N) |failure rate_b - mean probability_b|.

    This is binary calibration of P(failure), not of the larger of p and 1 - p. Bins are closed on the right.

    Args:
        probability: (N,) predicted probabilities of failure, in [0, 1].
        failure: (N,) 1 where the answer is wrong, else 0.
        bins: Number of bins (15 after Guo et al. 2017).
        binning: "width", bins of equal width, or "mass", bins of equal numbers of rows; equal probabilities are never
            parted, so that the order of the rows does not count.

    Raises:
        DataError: If a probability is not in [0, 1], or as for every metric.
        UsageError: If ``bins`` is less than 1, or ``binning`` neither of the two.
    """
    return float(ece_kernel(probability_counts(probability, failure), bins, binning))


def brier(probability: ArrayLike, failure: ArrayLike) -> float:
    """Mean squared error of a failure probability, (1/N) Σ (p - failure)²; a constant 1/2 scores 1/4.

    Raises:
        DataError: If a probability is not in [0, 1], or as for every metric.
    """
    return float(brier_kernel(probability_counts(probability, failure)))


def log_loss(probability: ArrayLike, failure: ArrayLike) -> float:
    """Mean negative log-likelihood, -(1/N) Σ ln(p of what happened), in nats; a constant 1/2 scores ln 2.

    Probabilities nearer to 0 or 1 than 1e-12 count as this far away: a row that was certain and wrong costs 27.6.

    Raises:
        DataError: If a probability is not in [0, 1], or as for every metric.
    """
    return float(log_loss_kernel(probability_counts(probability, failure)))


def probability_counts(probability: ArrayLike, failure: ArrayLike) -> TieCounts:
    """Counts per distinct probability.

    Raises:
        DataError: If a probability is not in [0, 1], or as ``tie_counts``.
    """
    counts = tie_counts(probability, failure)
    low, high = counts.value[0], counts.value[-1]
    if low < 0 or high > 1:
        raise DataError(
            f"a failure probability must be in [0, 1]. Got values from {low:.6g} to {high:.6g}; "
            "calibrate the uncertainty first, or evaluate it without ece, brier and log_loss."
        )
    return counts


MAX_BINS = 1_000_000


def ece_kernel(counts: TieCounts, bins: int = 15, binning: Binning = "width") -> Floats:
    """Expected calibration error (...); see ``ece``."""
    require_at_least("bins", bins, 1)
    if bins > MAX_BINS:
        raise UsageError(f"bins must be at most {MAX_BINS:,}. Got {bins} instead.")
    if binning == "width":
        inner_edges = np.arange(1, bins) / bins
        of_score = np.broadcast_to(np.searchsorted(inner_edges, counts.value, side="left"), counts.size.shape)
    elif binning == "mass":
        of_score = np.minimum((counts.accepted - counts.size) * bins // counts.n[..., None], bins - 1)
    else:
        raise UsageError(f"binning must be 'width' or 'mass'. Got {binning!r} instead.")
    gap = counts.wrong - counts.value * counts.size
    resamples = counts.size.shape[:-1]
    n_resamples = int(np.prod(resamples))
    bin_index = of_score.reshape(n_resamples, -1) + bins * np.arange(n_resamples)[:, None]
    gaps = np.bincount(bin_index.ravel(), weights=gap.ravel(), minlength=bins * n_resamples)
    return ratio(np.abs(gaps.reshape(*resamples, bins)).sum(-1), counts.n)


def brier_kernel(counts: TieCounts) -> Floats:
    """Brier score (...)."""
    squares = counts.correct * counts.value**2 + counts.wrong * (1 - counts.value) ** 2
    return ratio(squares.sum(-1), counts.n)


def log_loss_kernel(counts: TieCounts) -> Floats:
    """Log-loss (...)."""
    p = counts.value.clip(CERTAIN, 1 - CERTAIN)
    return ratio(-(counts.wrong * np.log(p) + counts.correct * np.log1p(-p)).sum(-1), counts.n)
