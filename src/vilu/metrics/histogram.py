"""Scores of any number of rows in bounded memory: counts over bins.

They are the same whatever the order in which the rows came. Every float64 score has a place in one
order of int64 codes; a bin is a code without its lowest ``level`` bits. The level is the smallest
at which at most ``MAX_BINS`` bins are occupied. It depends on nothing but the scores: a part that
has too many bins at a level is never inside a whole that has few enough, so no merge drops a bit
too many.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from vilu.errors import DataError
from vilu.metrics.counts import Floats, Ints, TieCounts, check_pair

MAX_BINS = 2**20  # occupied bins at most: 24 MB
_TINY = 2.0**-512
# whole octaves, so that 0 and 1 begin a bin at every level
_ZERO = np.float64(_TINY).view(np.int64).item() - 2**52
_HALF = np.float64(0.5).view(np.int64).item() - _ZERO
_NEAR = np.float64(2.0**-54).view(np.int64).item()
_ONE = _HALF + np.float64(0.5).view(np.int64).item() - _NEAR
_ONE_BITS = np.float64(1.0).view(np.int64).item()


def codes(scores: Floats) -> Ints:
    """Place (N,) of finite scores in their order.

    Equal scores have equal codes, larger scores larger codes. The bits of a float64 are such a
    code, fine near 0 and coarse near 1 when its low bits are dropped. Probabilities saturate at
    both ends, so between 1/2 and 1 the code is taken from the bits of 1 - score, which is exact. To
    make room for this in 64 bits, magnitudes below 2^-512 count as zero.
    """
    size = np.abs(scores)
    bits = size.view(np.int64)
    code = np.where(size < _TINY, 0, bits - _ZERO)
    beyond = scores > 0.5
    gap = np.where(beyond & (scores < 1), 1 - scores, 2.0**-54)
    upper = np.where(scores < 1, _ONE - (gap.view(np.int64) - _NEAR), _ONE + (bits - _ONE_BITS))
    return np.where(beyond, upper, np.copysign(1, scores).astype(np.int64) * code)


def scores_of(code: Ints) -> Floats:
    """The inverse of ``codes``."""
    size = np.abs(code)
    low = np.where((size == 0) | (code > _HALF), _ZERO, size + _ZERO).view(np.float64)
    low = np.where(size == 0, 0.0, np.where(code < 0, -low, low))
    gap = np.where((code > _HALF) & (code < _ONE), _ONE - code + _NEAR, 0).view(np.float64)
    above = np.where(code >= _ONE, code - _ONE + _ONE_BITS, _ONE_BITS).view(np.float64)
    return np.where(code <= _HALF, low, np.where(code < _ONE, 1 - gap, above))


@dataclass(frozen=True, eq=False)
class Histogram:
    """Correct and wrong answers per bin of the score.

    ``+`` joins two, in any order, to the same counts. Up to ``MAX_BINS`` distinct scores it is
    exact. Beyond, scores of one bin count as tied: the error of AUROC is at most ``tied_pairs`` /
    2, in practice far less.
    """

    bins: Ints  # (G,) int64, ascending: codes without their lowest ``level`` bits
    correct: Ints  # (G,) number of correct answers in each
    wrong: Ints  # (G,) number of wrong answers in each
    level: int = 0  # bits dropped
    low: float = math.inf  # smallest score; infinity without any
    high: float = -math.inf  # largest score

    @classmethod
    def empty(cls) -> Histogram:
        """Of no row."""
        none = np.empty(0, np.int64)
        return cls(none, none, none)

    @classmethod
    def of(cls, uncertainty: ArrayLike, failure: ArrayLike) -> Histogram:
        """Of the rows of two vectors."""
        if not np.size(uncertainty) and not np.size(failure):
            return cls.empty()
        scores, failures = check_pair(uncertainty, failure)
        scores = np.where(np.abs(scores) < _TINY, 0.0, scores)
        wrong = failures.astype(np.int64)
        rows = cls(codes(scores), 1 - wrong, wrong, 0, float(scores.min()), float(scores.max()))
        return rows._collapsed(0)

    @classmethod
    def total(cls, histograms: Iterable[Histogram]) -> Histogram:
        """The sum of many, at most some of which are held at a time."""
        held: list[Histogram] = []
        for histogram in histograms:
            held.append(histogram)
            n_bins = sum(len(part.bins) for part in held)
            if n_bins > 2 * MAX_BINS:
                held = [cls._joined(held)]
        return cls._joined(held) if held else cls.empty()

    def __add__(self, other: Histogram) -> Histogram:
        return self._joined([self, other])

    def without(self, part: Histogram) -> Histogram:
        """The rows that are not of a part of them, all of whose answers are wrong."""
        return self.counted(self.correct, self.wrong - self.rows_of_part(part))

    def against(self, part: Histogram) -> Histogram:
        """The same rows, those of a part of them in place of the wrong ones."""
        wrong = self.rows_of_part(part)
        return self.counted(self.correct + self.wrong - wrong, wrong)

    def rows_of_part(self, part: Histogram) -> Ints:
        """(G,) rows of a part, whose level is never the higher one, in each bin."""
        bins = part.bins >> (self.level - part.level)
        rows = np.zeros_like(self.wrong)
        np.add.at(rows, np.searchsorted(self.bins, bins), part.wrong)
        return rows

    def counted(self, correct: Ints, wrong: Ints) -> Histogram:
        """Other counts (G,) of the same bins, without those that are empty."""
        filled = correct + wrong > 0
        return Histogram(
            self.bins[filled], correct[filled], wrong[filled], self.level, self.low, self.high
        )

    @property
    def n(self) -> int:
        """Number of rows."""
        return self.n_failures + int(self.correct.sum())

    @property
    def n_pictures(self) -> int:
        """Number of pictures: every row has its own."""
        return self.n

    @property
    def rows_per_independent(self) -> float:
        """How many rows say as much as an independent one: every row is independent."""
        return 1.0

    def n_independent(self) -> tuple[int, int]:
        """How many pictures have a wrong answer, and how many a right one."""
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
        """What to say beside metrics that it gives; None where they are exact."""
        if self.exact:
            return None
        return f"histogram of at most {MAX_BINS:,} bins, {52 - self.level} bits of the score"

    @property
    def values(self) -> Floats:
        """(G,) a score of each bin, ascending: its middle.

        It is at most half the width of the bin from every score in it.
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
        """Share of the pairs of a wrong and a correct answer that are in one bin.

        NaN where all answers are wrong, or all correct.
        """
        pairs = self.n_failures * (self.n - self.n_failures)
        return float((self.correct * self.wrong).sum()) / pairs if pairs else math.nan

    def counts(self) -> TieCounts:
        """What every metric is computed from."""
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
        )
        return raw._collapsed(level)

    def _collapsed(self, level: int) -> Histogram:
        """Each bin once, at the smallest level from this one on with at most ``MAX_BINS``."""
        if not len(self.bins):
            return Histogram(self.bins, self.correct, self.wrong, level, self.low, self.high)
        order = np.argsort(self.bins, kind="stable")
        bins = self.bins[order]
        starts = _starts(bins)
        while len(starts) > MAX_BINS:
            bins = bins >> 1
            level += 1
            starts = _starts(bins)
        correct = np.add.reduceat(self.correct[order], starts)
        wrong = np.add.reduceat(self.wrong[order], starts)
        return Histogram(bins[starts], correct, wrong, level, self.low, self.high)


def _starts(bins: Ints) -> Ints:
    """Indices at which another number begins in sorted numbers (N,), the first among them."""
    return np.flatnonzero(np.diff(bins, prepend=~bins[:1]))
