"""Calibration rows that are near copies of fitted rows: how many, and when that is too many."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from vilu.calibration.thresholds import lower_bound, tail
from vilu.embeddings.copies import NEAR_COPY
from vilu.embeddings.source import EmbeddingSource
from vilu.errors import DataError
from vilu.metrics.counts import Floats, Ints
from vilu.predictors.contract.predictor import FailurePredictor
from vilu.predictors.contract.seen import MAX_SHARED
from vilu.predictors.persistence.fit_sample import FitSample

SAME: Final = 0.995
"""Cosine from which on a row counts as a copy of a fitted one: a picture that was saved anew, or
scaled. Between random halves of five sets 0 to 0.24 % of the rows have so near a neighbour by real
CLIP.
"""

DELTA: Final = 0.05
"""Level of the bounds of a number of copies."""

CHANCE: Final = 0.001
"""Level at which calibration rows have more copies than the fitted rows among themselves."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Copies:
    """How many of some rows are copies of fitted rows, of which a share is known.

    A copy of one fitted row is seen with the probability f that this row is in the sample, so of K
    copies k ~ Bin(K, f) are seen.
    """

    n_seen: int  # k
    n: int  # rows that were looked at
    share: float  # f

    @property
    def estimate(self) -> float:
        """Share of the rows that are copies, k / (f n)."""
        return min(self.n_seen / (self.share * self.n), 1.0)

    @property
    def most(self) -> int:
        """Largest K with P[Bin(K, f) <= k] >= 5 %."""
        # The fitted row of each copy is in the sample or not, by chance: without the tail a lucky
        # sample that holds few of them would pass many copies.
        numbers = np.arange(self.n_seen, self.n + 1)
        likely = self._at_most(self.n_seen, numbers) >= DELTA
        return int(numbers[likely][-1])

    @property
    def least(self) -> int:
        """Smallest K with P[Bin(K, f) >= k] >= 5 %."""
        numbers = np.arange(self.n_seen, self.n + 1)
        likely = 1 - self._at_most(self.n_seen - 1, numbers) >= DELTA
        if not likely.any():
            return self.n
        return int(numbers[likely][0])

    def _at_most(self, n_seen: int, numbers: Ints) -> Floats:
        """P[Bin(K, f) <= k] for every K."""
        # Binomial: each copied row is in the sample with the probability f. Drawn without
        # replacement the count varies a little less, so these bounds err on the safe side.
        if n_seen < 0:
            return np.zeros(len(numbers))
        return tail(np.full(len(numbers), n_seen), numbers, self.share)

    def in_words(self, cosine: float) -> str:
        """How many, with the bound where it is no count."""
        if self.share == 1:
            return (
                f"{self.n_seen} of {self.n} calibration rows have a cosine of at least {cosine} "
                "with a row that was fitted on"
            )
        return (
            f"{self.n_seen} of {self.n} calibration rows have a cosine of at least {cosine} with a "
            f"row of the sample, which holds {self.share:.1%} of the rows of the fit. So about "
            f"{self.estimate:.1%} of the calibration rows are near copies of fitted rows, and with "
            f"95% confidence at most {self.most / self.n:.1%}"
        )


def check_copies(predictor: FailurePredictor, data: EmbeddingSource, rows: Ints) -> None:
    """Look for near copies of fitted rows among calibration rows (M,); warn, and refuse too many.

    Raises:
        DataError: If more than 1 % of the rows are copies (cosine 0.995), and the fitted rows have
            fewer among themselves.
    """
    sample = predictor.sample_
    if sample is None:
        if predictor.needs_fit:
            logger.warning(
                "this %s comes without a sample of the rows of its fit, so near copies of them "
                "among the calibration rows cannot be looked for",
                predictor.name,
            )
        return
    usable = np.intersect1d(rows, data.usable_rows.numpy())
    if not len(usable):
        return
    nearest = sample.nearest(data, torch.from_numpy(usable))
    near = _copies(nearest, NEAR_COPY, sample)
    if not near.n_seen:
        return
    same = _copies(nearest, SAME, sample)
    if _too_many(same, sample):
        raise DataError(
            f"{same.in_words(SAME)}: more than {MAX_SHARED:.0%}, and more than the fitted rows "
            "have among themselves. What is measured on copies of fitted rows holds for no "
            f"others. Calibrate on pictures that the fit has not seen."
        )
    words = near.in_words(NEAR_COPY)
    logger.warning("%s. What is measured on copies of fitted rows holds for no others", words)


def _copies(nearest: Tensor, cosine: float, sample: FitSample) -> Copies:
    n_seen = int((nearest >= cosine).sum())
    return Copies(n_seen, len(nearest), sample.share)


def _too_many(copies: Copies, sample: FitSample) -> bool:
    """Whether more than 1 % are copies, and clearly more than among the fitted rows themselves."""
    # By the lower bound, not by the estimate: in a sample of 1 % one copy that is seen is an
    # estimate of a hundred, and would refuse sets that have hardly any.
    if copies.least <= MAX_SHARED * copies.n:
        return False
    # Sets with copies among themselves (films, products) have as many between halves: new rows are
    # then copies of fitted ones, too, and the measure holds for them.
    within = _copies(sample.nearest_within(), SAME, sample)
    if not within.n_seen:
        return True
    return lower_bound(copies.least, copies.n, CHANCE) > within.estimate
