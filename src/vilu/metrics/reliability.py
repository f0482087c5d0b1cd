"""How well failure probabilities are calibrated: ECE, Brier score and log-loss.

These metrics are defined only for probabilities.
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

PROBABILITY_MARGIN = 1e-12
"""Before a logarithm is taken, probabilities are moved at least this far from 0 and from 1."""


@checked
def ece(
    probability: ArrayLike, failure: ArrayLike, bins: int = 15, binning: Binning = "width"
) -> float:
    """Compute the expected calibration error for failure probabilities.

    The rows are divided into bins by probability. If bin b has n_b of the N rows, the error is

        ECE = Σ_b (n_b / N) |failure rate_b - mean probability_b|

    The probability is P(failure) itself, not the larger one of P(failure) and 1 - P(failure). A
    bin contains its upper edge.

    Args:
        probability: (N,) predicted failure probabilities, in [0, 1].
        failure: (N,) 1 where the answer is wrong, else 0.
        bins: Bin count (15 after Guo et al. 2017).
        binning: "width": bins of equal width. "mass": bins with about equal row counts. Rows with
            equal probabilities are always in the same bin, so the row order does not matter.

    Raises:
        DataError: If a probability is not in [0, 1], or if the vectors are empty, differ in length
            or hold invalid values.
        UsageError: If ``bins`` or ``binning`` is invalid.

    Examples:
        >>> import vilu
        >>> probability = [0.1, 0.1, 0.9, 0.9]
        >>> failure = [0, 0, 1, 0]
        >>> error = vilu.metrics.ece(probability, failure, bins=2)
        >>> round(error, 4)  # 2/4 * |0/2 - 0.1| + 2/4 * |1/2 - 0.9|
        0.25
    """
    counts = probability_counts(probability, failure)
    return float(ece_kernel(counts, bins, binning))


def brier(probability: ArrayLike, failure: ArrayLike) -> float:
    """Compute the Brier score, the mean squared error of the failure probabilities.

    For N probabilities p, the score is (1/N) Σ (p - failure)². A constant probability of 1/2 has
    the score 1/4.

    Examples:
        >>> import vilu
        >>> probability = [0.0, 0.5, 1.0]
        >>> failure = [0, 1, 1]
        >>> round(vilu.metrics.brier(probability, failure), 4)  # (0² + 0.5² + 0²) / 3
        0.0833
    """
    counts = probability_counts(probability, failure)
    return float(brier_kernel(counts))


def log_loss(probability: ArrayLike, failure: ArrayLike) -> float:
    """Compute the mean negative log-likelihood of the outcomes, in nats.

    For N probabilities p,

        log-loss = -(1/N) Σ (failure ln p + (1 - failure) ln(1 - p))

    A constant probability p = 1/2 has the score ln 2. Probabilities are clipped to
    [1e-12, 1 - 1e-12]. Therefore a failed row with p = 0 adds -ln(1e-12) / N = 27.6 / N.

    Examples:
        >>> import vilu
        >>> probability = [0.2, 0.5]
        >>> failure = [0, 1]
        >>> round(vilu.metrics.log_loss(probability, failure), 4)  # -(ln 0.8 + ln 0.5) / 2
        0.4581
    """
    counts = probability_counts(probability, failure)
    return float(log_loss_kernel(counts))


def probability_counts(probability: ArrayLike, failure: ArrayLike) -> TieCounts:
    """Count correct and wrong answers (G,) per distinct probability.

    Raises:
        DataError: If a probability is not in [0, 1].
    """
    counts = tie_counts(probability, failure)
    smallest = counts.value[0]
    largest = counts.value[-1]
    if smallest < 0 or largest > 1:
        raise DataError(
            "a failure probability must be in [0, 1]. "
            f"Got values from {smallest:.6g} to {largest:.6g}; "
            "calibrate the uncertainty first, or evaluate it without ece, brier and log_loss."
        )
    return counts


MAX_BINS = 1_000_000  # largest bin count for ``ece``


def ece_kernel(counts: TieCounts, bins: int = 15, binning: Binning = "width") -> Floats:
    """Compute the expected calibration error (...), as in ``ece``."""
    gap_of_score = counts.wrong - counts.value * counts.size
    (gap_of_bin,) = _sums_per_bin(counts, bins, binning, gap_of_score)
    sum_of_gaps = np.abs(gap_of_bin).sum(-1)
    return ratio(sum_of_gaps, counts.n)


def _sums_per_bin(counts: TieCounts, bins: int, binning: Binning, *values: Floats) -> list[Floats]:
    """Sum each array (..., G) in ``values`` over the scores in each bin: (..., bins)."""
    require_one_of("binning", binning, get_args(Binning))
    require_at_least("bins", bins, 1)
    if bins > MAX_BINS:
        raise UsageError(f"bins must be at most {MAX_BINS:,}. Got {bins} instead.")
    if binning == "width":
        inner_edges = np.arange(1, bins) / bins
        # "left": a score at an edge belongs to the bin below
        bin_of_value = np.searchsorted(inner_edges, counts.value, side="left")
        bin_of_score = np.broadcast_to(bin_of_value, counts.size.shape)
    else:
        # The share of rows with smaller scores decides on a score's bin. If the last scores have
        # no rows in a resample, all rows are below. Such scores belong to the last bin.
        n_below = counts.accepted - counts.size
        bin_of_score = n_below * bins // counts.n[..., None]
        bin_of_score = np.minimum(bin_of_score, bins - 1).astype(np.int64)
    leading_shape = counts.size.shape[:-1]  # the resample axes
    n_resamples = int(np.prod(leading_shape))
    # One bincount call sums over all resamples: the cells of resample r begin at r * bins.
    first_cell = bins * np.arange(n_resamples)[:, None]
    cells = bin_of_score.reshape(n_resamples, -1) + first_cell
    sums = []
    for numbers in values:
        sum_of_cell = np.bincount(
            cells.ravel(), weights=numbers.ravel(), minlength=bins * n_resamples
        )
        sum_of_bin = sum_of_cell.astype(np.float64).reshape(*leading_shape, bins)
        sums.append(sum_of_bin)
    return sums


CLEAR_ERRORS = 2.0
"""A gap is clear if the gap is at least this many standard errors (see ``BinnedError``)."""


@dataclass(frozen=True)
class BinnedError:
    """The kernel of ``ece``, with an interval corrected for the ECE's bias.

    Let g_b be the observed gap of bin b: failures minus expected failures, divided by the total
    row count. The estimate of the ECE is T = sum_b |g_b|. A gap contains noise e_b, so on average
    |g_b| is too large, by up to E|e_b|. For example, the estimate is 9 % on 180 rows from a
    calibrated predictor, where the true ECE is 0. Resampled rows add this bias once more, so the
    percentiles lie above T.

    Therefore the noise is drawn instead of rows:

    1. e_b is drawn from a normal distribution with mean 0, and with the same variance as the mean
       of (failure - p) 1[row in bin b]. If a calibrated predictor would have a larger variance, the
       larger variance is taken.
    2. A gap is clear if |g_b| is at least two standard errors. The clear gaps are c_b = g_b, and
       c_b = 0 for the bins with an unclear gap.
    3. Every draw gives the noisy sums S_g = sum_b |g_b + e_b| and S_c = sum_b |c_b + e_b|.

    With q_hi the upper quantile over the draws, the ends of the interval are

        low  = T - q_hi(S_c - sum_b |c_b|)
        high = q_hi(S_g) - (mean S_g - T)

    The lower end subtracts the largest plausible bias, the upper end only the smallest. The draws
    are not stratified by failure, because the ECE compares probabilities with observed failures.
    ``python -m benchmarks.ece_coverage`` measures how often the interval contains the true ECE.
    """

    bins: int = 15  # bin count
    binning: Binning = "width"  # as in ``ece``
    interval_note: ClassVar[str] = "corrected for the bias of the bins"

    def __call__(self, counts: TieCounts) -> Floats:
        """Compute the expected calibration error (...)."""
        return ece_kernel(counts, self.bins, self.binning)

    def interval(
        self, counts: TieCounts, n_resamples: int, confidence: float, seed: int
    ) -> tuple[float, float]:
        """Return the interval's lower and upper end for counts (G,), from ``n_resamples`` draws.

        The interval contains the estimate.
        """
        gap, deviation = self._gaps(counts)
        rng = np.random.default_rng(seed)
        noise = deviation * rng.standard_normal((n_resamples, self.bins))
        estimate = np.abs(gap).sum()  # T
        level = 1 - (1 - confidence) / 2  # for the upper quantiles q_hi
        is_unclear = np.abs(gap) < CLEAR_ERRORS * deviation
        clear_gap = np.where(is_unclear, 0.0, gap)  # c_b
        drawn_clear_error = np.abs(clear_gap + noise).sum(axis=1)  # S_c for each draw
        clear_error = np.abs(clear_gap).sum()  # sum_b |c_b|
        largest_bias = np.quantile(drawn_clear_error - clear_error, level)
        low = min(estimate - largest_bias, estimate)
        drawn_error = np.abs(gap + noise).sum(axis=1)  # S_g for each draw
        smallest_bias = drawn_error.mean() - estimate
        high = max(np.quantile(drawn_error, level) - smallest_bias, estimate)
        return float(max(low, 0.0)), float(min(high, 1.0))

    def _gaps(self, counts: TieCounts) -> tuple[Floats, Floats]:
        """Return the gaps (bins,), as shares of all rows, and their standard errors (bins,)."""
        p = counts.value
        n = float(counts.n)
        gap_of_score = counts.wrong - p * counts.size  # sum of (failure - p) over the rows
        # sum of (failure - p)^2 over the rows
        square_of_score = counts.wrong * (1 - p) ** 2 + counts.correct * p**2
        # the variance of the failures if the predictor is calibrated
        calibrated_variance_of_score = counts.size * p * (1 - p)
        sums = _sums_per_bin(
            counts,
            self.bins,
            self.binning,
            gap_of_score,
            square_of_score,
            calibrated_variance_of_score,
        )
        # each (bins,), a mean over all rows
        gap, square, calibrated_variance = [sum_of_bin / n for sum_of_bin in sums]
        observed_variance = square - gap**2
        larger_variance = np.maximum(observed_variance, calibrated_variance)
        variance = np.maximum(larger_variance, 0)  # rounding can give a value below 0
        return gap, np.sqrt(variance / n)


def brier_kernel(counts: TieCounts) -> Floats:
    """Compute the Brier score (...)."""
    squares = counts.correct * counts.value**2 + counts.wrong * (1 - counts.value) ** 2
    sum_of_squares = squares.sum(-1)
    return ratio(sum_of_squares, counts.n)


def log_loss_kernel(counts: TieCounts) -> Floats:
    """Compute the log-loss (...)."""
    p = counts.value.clip(PROBABILITY_MARGIN, 1 - PROBABILITY_MARGIN)
    log_likelihood = (counts.wrong * np.log(p) + counts.correct * np.log1p(-p)).sum(-1)
    return ratio(-log_likelihood, counts.n)
