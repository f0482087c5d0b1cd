"""Estimate of how many calibration rows are copies of fitted rows. Too many copies are refused."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from vilu.calibration.thresholds import binomial_tail, lower_bound
from vilu.embeddings.copies import NEAR_COPY_COSINE
from vilu.embeddings.source import EmbeddingSource
from vilu.errors import DataError
from vilu.metrics.counts import Floats, Ints
from vilu.predictors.contract.predictor import FailurePredictor
from vilu.predictors.contract.seen import MAX_OVERLAP_SHARE
from vilu.predictors.persistence.fit_sample import FitSample

SAME_PICTURE_COSINE: Final = 0.995
"""Smallest cosine between a fitted row and a copy, such as a picture saved again.

CLIP embeddings from five data sets were divided into random halves. In the first half, 0 to 0.24 %
of the rows have a copy in the second half.
"""

COUNT_BOUND_LEVEL: Final = 0.05
"""Level for the upper and for the lower bound on the number of copies."""

SHARE_BOUND_LEVEL: Final = 0.001
"""Level for the lower bound on the share of copies among the calibration rows.

The bound is compared with the share of copies among the fitted rows themselves.
"""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Copies:
    """How many rows are copies of fitted rows, estimated from a sample.

    Each fitted row is in the sample with probability f. A copy is detected only if the copied
    fitted row is in the sample. So k ~ Bin(K, f) of K copies are detected.

    Examples:
        >>> from vilu.calibration.copies import Copies
        >>> copies = Copies(n_detected=1, n=10, sample_share=0.5)
        >>> copies.estimated_share  # 1 / (0.5 * 10)
        0.2
        >>> # If there are 7 copies, at most 1 is detected with probability (1 + 7) / 2^7 = 6 %.
        >>> # If there are 8 copies, this probability is (1 + 8) / 2^8 = 4 %, which is below 5 %.
        >>> copies.upper_n_copies
        7
        >>> copies.lower_n_copies
        1
    """

    n_detected: int  # k, number of detected copies
    n: int  # number of rows, all compared with the sample
    sample_share: float  # f, share of the fitted rows in the sample

    @property
    def estimated_share(self) -> float:
        """Estimated share of copies, k / (f n)."""
        return min(self.n_detected / (self.sample_share * self.n), 1.0)

    @property
    def upper_n_copies(self) -> int:
        """Upper bound on the number of copies: the largest K with P[Bin(K, f) <= k] >= 5 %."""
        # Chance decides how many of the copied fitted rows are in the sample. If only few of them
        # are in the sample, the estimate k / f is too low. So an upper bound is returned.
        n_copies = np.arange(self.n_detected, self.n + 1)
        is_likely = self._probability_of_at_most(self.n_detected, n_copies) >= COUNT_BOUND_LEVEL
        return int(n_copies[is_likely].max())

    @property
    def lower_n_copies(self) -> int:
        """Lower bound on the number of copies: the smallest K with P[Bin(K, f) >= k] >= 5 %."""
        n_copies = np.arange(self.n_detected, self.n + 1)
        # P[at least k] = 1 - P[at most k - 1]
        probability = 1 - self._probability_of_at_most(self.n_detected - 1, n_copies)
        is_likely = probability >= COUNT_BOUND_LEVEL
        # There are at most n copies. If k is much larger than f n, k detected copies are unlikely
        # even if all n rows are copies. Then no K satisfies the condition, and the bound is n.
        if not is_likely.any():
            return self.n
        return int(n_copies[is_likely].min())

    def _probability_of_at_most(self, n_detected: int, n_copies: Ints) -> Floats:
        """Return the probability P[Bin(K, f) <= n_detected] for every K in ``n_copies``."""
        # The sample is drawn without replacement, so the number of detected copies varies a little
        # less than a binomial number. The bounds are therefore conservative.
        if n_detected < 0:
            return np.zeros(len(n_copies))
        n_detected_each = np.full(len(n_copies), n_detected)
        return binomial_tail(n_detected_each, n_copies, self.sample_share)

    def in_words(self, cosine: float) -> str:
        """Say how many rows have a cosine of at least ``cosine`` to fitted rows.

        If the sample lacks some fitted rows, the text also has an estimate and a bound.
        """
        if self.sample_share == 1:
            return (
                f"{self.n_detected} of {self.n} calibration rows have a cosine of at least "
                f"{cosine} with a row that was fitted on"
            )
        return (
            f"{self.n_detected} of {self.n} calibration rows have a cosine of at least {cosine} "
            f"with a row of the sample, which holds {self.sample_share:.1%} of the rows of the "
            f"fit. So about {self.estimated_share:.1%} of the calibration rows are near copies of "
            f"fitted rows, and with 95% confidence at most {self.upper_n_copies / self.n:.1%}"
        )


def check_copies(predictor: FailurePredictor, data: EmbeddingSource, rows: Ints) -> None:
    """Search the calibration rows for near copies of fitted rows, and warn if there are any.

    ``rows`` (M,) holds the calibration rows' indices in ``data``.

    Raises:
        DataError: If more than 1 % of the calibration rows are copies (cosine 0.995), and copies
            are rarer among the fitted rows themselves.
    """
    sample = predictor.sample_
    if sample is None:
        is_bare_table = data.data_kind == "answers" and not data.has_vectors
        if predictor.needs_fit and not is_bare_table:
            logger.warning(
                "this %s comes without a sample of the rows of its fit, so near copies of these "
                "rows cannot be searched for among the calibration rows",
                predictor.name,
            )
        return
    usable_rows = np.intersect1d(rows, data.usable_rows.numpy())
    if not len(usable_rows) or not data.has_vectors:
        return
    nearest_cosine = sample.nearest_cosines(data, torch.from_numpy(usable_rows))
    near_copies = _count_copies(nearest_cosine, NEAR_COPY_COSINE, sample)
    if not near_copies.n_detected:
        return
    same_pictures = _count_copies(nearest_cosine, SAME_PICTURE_COSINE, sample)
    if _has_too_many_copies(same_pictures, sample):
        message = same_pictures.in_words(SAME_PICTURE_COSINE)
        raise DataError(
            f"{message}: more than {MAX_OVERLAP_SHARE:.0%}, and a larger share than among the "
            "fitted rows themselves. Results on copies of fitted rows do not hold for other rows. "
            "Calibrate on pictures that the fit has not seen."
        )
    message = near_copies.in_words(NEAR_COPY_COSINE)
    logger.warning("%s. Results on copies of fitted rows do not hold for other rows", message)


def _count_copies(nearest_cosine: Tensor, cosine: float, sample: FitSample) -> Copies:
    """Count the copies among M rows: the rows with a cosine of at least ``cosine``.

    ``nearest_cosine`` (M,) holds each row's cosine with the nearest row in the sample.
    """
    n_detected = int((nearest_cosine >= cosine).sum())
    return Copies(n_detected=n_detected, n=len(nearest_cosine), sample_share=sample.share)


def _has_too_many_copies(copies: Copies, sample: FitSample) -> bool:
    """Return whether over 1 % of the rows are copies, and clearly more than within the fit.

    ``sample`` is the sample of fitted rows.
    """
    # The lower bound is used, not the estimate. With a 1 % sample from the fitted rows, a single
    # copy gives an estimate of 100 copies, and data with hardly any copies would be refused.
    if copies.lower_n_copies <= MAX_OVERLAP_SHARE * copies.n:
        return False
    # In some data (film frames, product photos) many rows are copies of each other. Then new rows
    # are copies of fitted rows, too, so copies do not make the calibration wrong.
    nearest_cosine = sample.nearest_cosines_within()
    copies_in_fit = _count_copies(nearest_cosine, SAME_PICTURE_COSINE, sample)
    if not copies_in_fit.n_detected:
        return True
    least_share = lower_bound(copies.lower_n_copies, copies.n, SHARE_BOUND_LEVEL)
    return least_share > copies_in_fit.estimated_share
