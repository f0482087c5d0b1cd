"""Histogram of the scores of any number of rows, in bounded memory.

Every float64 score has an int64 code, and the codes have the same order as the scores. A bin is a
code without its lowest ``level`` bits. The level is the smallest one at which at most ``MAX_BINS``
bins are occupied.

The histogram depends only on the scores, not on the order in which rows or parts are added. If a
part has too many bins at some level, the whole has too many bins at this level, too. So the level
of a part is never higher than that of the whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from vilu.errors import DataError
from vilu.metrics.counts import Floats, Ints, TieCounts, check_pair

MAX_BINS = 2**20
"""Maximum number of occupied bins; they take 24 MB."""
_TINY = 2.0**-512
# The offsets are whole octaves, so that 0 and 1 are the start of a bin at every level.
_ZERO = np.float64(_TINY).view(np.int64).item() - 2**52
_HALF = np.float64(0.5).view(np.int64).item() - _ZERO
_NEAR = np.float64(2.0**-54).view(np.int64).item()
_ONE = _HALF + np.float64(0.5).view(np.int64).item() - _NEAR
_ONE_BITS = np.float64(1.0).view(np.int64).item()


def codes(scores: Floats) -> Ints:
    """Codes (N,) int64 of finite scores: equal scores have equal codes, larger scores larger codes.

    The bits of a float64 would be such a code. But when low bits are dropped, this code would be
    fine near 0 and coarse near 1. Probabilities can be close to both ends. So between 1/2 and 1 the
    code is taken from the bits of 1 - score, which is exact. To make room for these codes in 64
    bits, magnitudes below 2^-512 count as zero.
    """
    size = np.abs(scores)
    bits = size.view(np.int64)
    code = np.where(size < _TINY, 0, bits - _ZERO)
    beyond = scores > 0.5
    gap = np.where(beyond & (scores < 1), 1 - scores, 2.0**-54)
    upper = np.where(scores < 1, _ONE - (gap.view(np.int64) - _NEAR), _ONE + (bits - _ONE_BITS))
    return np.where(beyond, upper, np.copysign(1, scores).astype(np.int64) * code)


def scores_of(code: Ints) -> Floats:
    """Scores (N,) of codes (N,), the inverse of ``codes``."""
    size = np.abs(code)
    low = np.where((size == 0) | (code > _HALF), _ZERO, size + _ZERO).view(np.float64)
    low = np.where(size == 0, 0.0, np.where(code < 0, -low, low))
    gap = np.where((code > _HALF) & (code < _ONE), _ONE - code + _NEAR, 0).view(np.float64)
    above = np.where(code >= _ONE, code - _ONE + _ONE_BITS, _ONE_BITS).view(np.float64)
    return np.where(code <= _HALF, low, np.where(code < _ONE, 1 - gap, above))


@dataclass(frozen=True, eq=False)
class Histogram:
    """Numbers of correct and wrong answers in each bin of the score.

    ``+`` joins two histograms; the order does not matter. With at most ``max_bins`` distinct scores
    the histogram is exact. With more, scores in the same bin count as tied. Then the error of AUROC
    is at most ``tied_pairs`` / 2, and in practice far less.
    """

    bins: Ints  # (G,) int64, ascending: codes without their lowest ``level`` bits
    correct: Ints  # (G,) number of correct answers in each bin
    wrong: Ints  # (G,) number of wrong answers in each bin
    level: int = 0  # number of low bits that are dropped
    low: float = math.inf  # smallest score; infinity if there is no row
    high: float = -math.inf  # largest score; minus infinity if there is no row
    max_bins: int = MAX_BINS  # maximum number of occupied bins

    @classmethod
    def empty(cls) -> Histogram:
        """Histogram without rows."""
        none = np.empty(0, np.int64)
        return cls(none, none, none)

    @classmethod
    def of(cls, uncertainty: ArrayLike, failure: ArrayLike, max_bins: int = MAX_BINS) -> Histogram:
        """Histogram of rows with uncertainties (N,) and failures (N,)."""
        if not np.size(uncertainty) and not np.size(failure):
            return cls.empty()
        scores, failures = check_pair(uncertainty, failure)
        scores = np.where(np.abs(scores) < _TINY, 0.0, scores)
        wrong = failures.astype(np.int64)
        low = float(scores.min())
        high = float(scores.max())
        rows = cls(codes(scores), 1 - wrong, wrong, 0, low, high, max_bins)
        return rows._collapsed(0)

    @classmethod
    def total(cls, histograms: Iterable[Histogram]) -> Histogram:
        """Sum of many histograms; only a bounded number of bins is in memory at a time."""
        held: list[Histogram] = []
        for histogram in histograms:
            held.append(histogram)
            n_bins = sum(len(part.bins) for part in held)
            if n_bins > 2 * held[0].max_bins:
                held = [cls._joined(held)]
        return cls._joined(held) if held else cls.empty()

    def __add__(self, other: Histogram) -> Histogram:
        return self._joined([self, other])

    def without(self, part: Histogram) -> Histogram:
        """Histogram without the rows of ``part``, whose answers must all be wrong."""
        return self.counted(self.correct, self.wrong - self.rows_of_part(part))

    def against(self, part: Histogram) -> Histogram:
        """Histogram that counts the rows of ``part`` as wrong and all other rows as correct.

        ``part`` holds some of the rows with wrong answers.
        """
        wrong = self.rows_of_part(part)
        return self.counted(self.correct + self.wrong - wrong, wrong)

    def rows_of_part(self, part: Histogram) -> Ints:
        """Number (G,) of rows of ``part`` in each bin of this histogram.

        The level of a part is never higher than that of the whole.
        """
        bins = part.bins >> (self.level - part.level)
        rows = np.zeros_like(self.wrong)
        np.add.at(rows, np.searchsorted(self.bins, bins), part.wrong)
        return rows

    def counted(self, correct: Ints, wrong: Ints) -> Histogram:
        """Histogram with other counts (G,) in the same bins, without empty bins."""
        filled = correct + wrong > 0
        return replace(self, bins=self.bins[filled], correct=correct[filled], wrong=wrong[filled])

    @property
    def n(self) -> int:
        """Number of rows."""
        return self.n_failures + int(self.correct.sum())

    @property
    def n_pictures(self) -> int:
        """Number of pictures. In a histogram every row counts as a picture of its own."""
        return self.n

    @property
    def rows_per_independent(self) -> float:
        """Rows per independent row (see ``vilu.metrics.pictures``): 1, all rows are independent."""
        return 1.0

    def n_independent(self) -> tuple[int, int]:
        """Number of pictures with a wrong answer, and number of pictures with a right answer."""
        return self.n_failures, self.n - self.n_failures

    @property
    def n_failures(self) -> int:
        """Number of wrong answers."""
        return int(self.wrong.sum())

    @property
    def exact(self) -> bool:
        """Whether every distinct score has a bin of its own."""
        return self.level == 0

    @property
    def note(self) -> str | None:
        """Note on the precision of metrics from this histogram; None if they are exact."""
        if self.exact:
            return None
        return f"histogram of at most {self.max_bins:,} bins, {52 - self.level} bits of the score"

    @property
    def values(self) -> Floats:
        """Scores (G,) in the middle of each bin, ascending.

        The first and the last bin end at the smallest and the largest score.
        """
        if not len(self.bins):
            return np.empty(0)
        start = self.bins << self.level
        end = start + (1 << self.level) - 1
        first, last = codes(np.array([self.low, self.high]))
        low = scores_of(np.maximum(start, first))
        high = scores_of(np.minimum(end, last))
        return low / 2 + high / 2

    @property
    def tied_pairs(self) -> float:
        """Share of the pairs of a wrong and a correct answer that are in the same bin.

        NaN if all answers are wrong, or if all answers are correct.
        """
        pairs = self.n_failures * (self.n - self.n_failures)
        return float((self.correct * self.wrong).sum()) / pairs if pairs else math.nan

    def counts(self) -> TieCounts:
        """Counts per score, from which every metric is computed."""
        if not len(self.bins):
            raise DataError("a metric needs at least one row. Got none.")
        return TieCounts(self.values, self.correct, self.wrong)

    @staticmethod
    def _joined(histograms: list[Histogram]) -> Histogram:
        level = max(part.level for part in histograms)
        raw = Histogram(
            np.concatenate([part.bins >> (level - part.level) for part in histograms]),
            np.concatenate([part.correct for part in histograms]),
            np.concatenate([part.wrong for part in histograms]),
            level,
            min(part.low for part in histograms),
            max(part.high for part in histograms),
            min(part.max_bins for part in histograms),
        )
        return raw._collapsed(level)

    def _collapsed(self, level: int) -> Histogram:
        """Merge equal bins, and raise the level until there are at most ``max_bins`` bins.

        ``level`` is the current level of ``bins``, which need not be sorted or distinct.
        """
        if not len(self.bins):
            return replace(self, level=level)
        order = np.argsort(self.bins, kind="stable")
        bins = self.bins[order]
        starts = _starts(bins)
        while len(starts) > self.max_bins:
            bins = bins >> 1
            level += 1
            starts = _starts(bins)
        correct = np.add.reduceat(self.correct[order], starts)
        wrong = np.add.reduceat(self.wrong[order], starts)
        return replace(self, bins=bins[starts], correct=correct, wrong=wrong, level=level)


def _starts(bins: Ints) -> Ints:
    """Indices at which each distinct number begins in sorted numbers (N,)."""
    return np.flatnonzero(np.diff(bins, prepend=~bins[:1]))
