"""Whether a failure probability means what it says.

Only for uncertainties that are probabilities.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike

from vilu.errors import DataError, UsageError
from vilu.metrics.counts import Floats, TieCounts, ratio, tie_counts
from vilu.validation import checked, require_at_least, require_one_of

Binning = Literal["width", "mass"]

CERTAIN = 1e-12  # how near to 0 or 1 a probability may come in a logarithm


@checked
def ece(
    probability: ArrayLike, failure: ArrayLike, bins: int = 15, binning: Binning = "width"
) -> float:
    """Expected calibration error: Σ_b (n_b / N) |failure rate_b - mean probability_b|.

    This is binary calibration of P(failure), not of the larger of p and 1 - p. Bins are closed on
    the right.

    Args:
        probability: (N,) predicted probabilities of failure, in [0, 1].
        failure: (N,) 1 where the answer is wrong, else 0.
        bins: Number of bins (15 after Guo et al. 2017).
        binning: "width", bins of equal width, or "mass", bins of equal numbers of rows; equal
            probabilities are never parted, so that the order of the rows does not count.

    Raises:
        DataError: If a probability is not in [0, 1], or as for every metric.
        UsageError: If ``bins`` is less than 1, or ``binning`` neither of the two.

    Examples:
        >>> import vilu
        >>> probability, failure = [0.1, 0.1, 0.9, 0.9], [0, 0, 1, 0]
        >>> error = vilu.metrics.ece(probability, failure, bins=2)
        >>> round(error, 4)  # 1/2 * |0 - 0.1| + 1/2 * |1/2 - 0.9|
        0.25
    """
    return float(ece_kernel(probability_counts(probability, failure), bins, binning))


def brier(probability: ArrayLike, failure: ArrayLike) -> float:
    """Mean squared error, (1/N) Σ (p - failure)²; a constant 1/2 scores 1/4.

    Examples:
        >>> import vilu
        >>> round(vilu.metrics.brier([0.0, 0.5, 1.0], [0, 1, 1]), 4)  # 1/4 over three rows
        0.0833
    """
    return float(brier_kernel(probability_counts(probability, failure)))


def log_loss(probability: ArrayLike, failure: ArrayLike) -> float:
    """Mean negative log-likelihood, -(1/N) Σ ln(p of what happened), in nats.

    A constant 1/2 scores ln 2. Probabilities nearer to 0 or 1 than 1e-12 count as this far away: a
    row that was certain and wrong costs 27.6.

    Examples:
        >>> import vilu
        >>> round(vilu.metrics.log_loss([0.2, 0.5], [0, 1]), 4)  # -(ln 0.8 + ln 0.5) / 2
        0.4581
    """
    return float(log_loss_kernel(probability_counts(probability, failure)))


def probability_counts(probability: ArrayLike, failure: ArrayLike) -> TieCounts:
    """Counts per distinct probability."""
    counts = tie_counts(probability, failure)
    low = counts.value[0]
    high = counts.value[-1]
    if low < 0 or high > 1:
        raise DataError(
            f"a failure probability must be in [0, 1]. Got values from {low:.6g} to {high:.6g}; "
            "calibrate the uncertainty first, or evaluate it without ece, brier and log_loss."
        )
    return counts


MAX_BINS = 1_000_000


def ece_kernel(counts: TieCounts, bins: int = 15, binning: Binning = "width") -> Floats:
    """Expected calibration error (...); see ``ece``."""
    (gaps,) = _per_bin(counts, bins, binning, counts.wrong - counts.value * counts.size)
    return ratio(np.abs(gaps).sum(-1), counts.n)


def _per_bin(counts: TieCounts, bins: int, binning: Binning, *values: Floats) -> list[Floats]:
    """(..., bins) sums of numbers (..., G) over the scores of every bin."""
    require_one_of("binning", binning, get_args(Binning))
    require_at_least("bins", bins, 1)
    if bins > MAX_BINS:
        raise UsageError(f"bins must be at most {MAX_BINS:,}. Got {bins} instead.")
    if binning == "width":
        inner_edges = np.arange(1, bins) / bins
        bin_of_value = np.searchsorted(inner_edges, counts.value, side="left")
        of_score = np.broadcast_to(bin_of_value, counts.size.shape)
    else:
        place = (counts.accepted - counts.size) * bins // counts.n[..., None]
        of_score = np.minimum(place, bins - 1).astype(np.int64)
    resamples = counts.size.shape[:-1]
    n_resamples = int(np.prod(resamples))
    index = (of_score.reshape(n_resamples, -1) + bins * np.arange(n_resamples)[:, None]).ravel()
    sums = []
    for numbers in values:
        total = np.bincount(index, numbers.ravel(), bins * n_resamples).astype(np.float64)
        sums.append(total.reshape(*resamples, bins))
    return sums


CLEAR = 2.0  # standard errors from which on a gap counts as one in the lower end of an interval


@dataclass(frozen=True)
class BinnedError:
    """The kernel of ``ece``, with an interval that knows of its bias.

    A sum of absolute values g_b + e_b is too large by up to E|e_b| a bin: on 180 rows of a
    calibrated predictor 9 %, where the truth is 0; resampled rows have that bias once more, so
    their percentiles lie above the estimate. Here the noise is drawn instead: e_b normal with the
    variance of the mean of (failure - p) 1[bin b], or what it is at calibration where that is
    larger. With T(g) = sum_b |g_b + e_b|, quantiles q, and c the gaps of at least two standard
    errors, the others being 0, the ends are

        low = T - q_hi(T(c) - sum |c_b|),    high = q_hi(T(g)) - (mean T(g) - T):

    the lower one allows for all the bias there may be, the upper one for the least. The rows are
    not stratified: what is stated is compared with the failures that were there. Coverage: ``python
    -m benchmarks.ece_coverage``.
    """

    bins: int = 15
    binning: Binning = "width"
    interval_note: ClassVar[str] = "corrected for the bias of the bins"

    def __call__(self, counts: TieCounts) -> Floats:
        """Expected calibration error (...)."""
        return ece_kernel(counts, self.bins, self.binning)

    def interval(
        self, counts: TieCounts, n_resamples: int, confidence: float, seed: int
    ) -> tuple[float, float]:
        """Ends of the interval for counts (G,), from so many draws.

        They enclose the error itself.
        """
        gap, deviation = self._gaps(counts)
        noise = deviation * np.random.default_rng(seed).standard_normal((n_resamples, self.bins))
        error = np.abs(gap).sum()
        tail = (1 - confidence) / 2
        clear = np.where(np.abs(gap) < CLEAR * deviation, 0.0, gap)
        most_bias = np.abs(clear + noise).sum(axis=1) - np.abs(clear).sum()
        low = error - np.quantile(most_bias, 1 - tail)
        drawn = np.abs(gap + noise).sum(axis=1)
        high = np.quantile(drawn, 1 - tail) - (drawn.mean() - error)
        return float(max(min(low, error), 0.0)), float(min(max(high, error), 1.0))

    def _gaps(self, counts: TieCounts) -> tuple[Floats, Floats]:
        """(bins,) gap of every bin as a share of all rows, and its standard error."""
        p = counts.value
        n = float(counts.n)
        squares = counts.wrong * (1 - p) ** 2 + counts.correct * p**2
        sums = (counts.wrong - p * counts.size, squares, counts.size * p * (1 - p))
        per_bin = _per_bin(counts, self.bins, self.binning, *sums)
        gap, square, calibrated = [total / n for total in per_bin]
        # calibrated, the mean gap is 0, and its square no part of the variance
        variance = np.maximum(np.maximum(square - gap**2, calibrated), 0)
        return gap, np.sqrt(variance / n)


def brier_kernel(counts: TieCounts) -> Floats:
    """Brier score (...)."""
    squares = counts.correct * counts.value**2 + counts.wrong * (1 - counts.value) ** 2
    return ratio(squares.sum(-1), counts.n)


def log_loss_kernel(counts: TieCounts) -> Floats:
    """Log-loss (...)."""
    p = counts.value.clip(CERTAIN, 1 - CERTAIN)
    return ratio(-(counts.wrong * np.log(p) + counts.correct * np.log1p(-p)).sum(-1), counts.n)
