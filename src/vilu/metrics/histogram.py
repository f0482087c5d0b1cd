"""Score histogram for any number of rows, in bounded memory.

Every float64 score has an int64 code, and the codes have the same order as the scores. A bin is a
code without the lowest ``level`` bits. The level is the smallest level at which at most
``MAX_BINS`` bins are occupied.

The histogram depends only on the scores, not on the order in which rows or parts are added. If
a part of the rows has too many bins at some level, all rows have too many bins at this level, too.
Therefore a part's level is never higher than the level of the whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from vilu.errors import DataError
from vilu.metrics.counts import Floats, Ints, TieCounts, check_scores_and_failures

MAX_BINS = 2**20
"""Largest number of occupied bins. This many bins take 24 MB."""
_SMALLEST_MAGNITUDE = 2.0**-512  # scores with a smaller magnitude count as 0


def _bits_of(number: float) -> int:
    """Read the bits of a float64 as an integer."""
    bits = np.float64(number).view(np.int64)
    return bits.item()


# An octave (all numbers from a power of two to the next) has 2^52 codes. The codes of 0 and of 1
# are multiples of 2^52. So at every level a bin starts at 0, and another bin starts at 1.
# For scores up to 1/2, the code is the score's bits minus this number:
_BITS_MINUS_CODE = _bits_of(_SMALLEST_MAGNITUDE) - 2**52
_CODE_OF_HALF = _bits_of(0.5) - _BITS_MINUS_CODE
_SMALLEST_GAP = 2.0**-54  # half the gap between 1 and the largest float64 below 1
_BITS_OF_SMALLEST_GAP = _bits_of(_SMALLEST_GAP)
# The gap 1 - score falls from 1/2 to the smallest gap, so these scores need as many codes as there
# are numbers between the two gaps.
_CODE_OF_ONE = _CODE_OF_HALF + _bits_of(0.5) - _BITS_OF_SMALLEST_GAP
_BITS_OF_ONE = _bits_of(1.0)


def codes_of_scores(scores: Floats) -> Ints:
    """Encode finite scores (N,) as int64. Equal scores get equal codes, larger scores larger codes.

    The bits of a float64 would also be a valid code. But without the low bits, the bins would be
    narrow near 0 and wide near 1, and probabilities can be close to both ends. Therefore a score
    between 1/2 and 1 gets a code from the bits of the gap 1 - score, which is exact. To make room
    for these codes in 64 bits, magnitudes below 2^-512 count as zero.
    """
    magnitude = np.abs(scores)
    bits = magnitude.view(np.int64)
    is_zero = magnitude < _SMALLEST_MAGNITUDE
    code_up_to_half = np.where(is_zero, 0, bits - _BITS_MINUS_CODE)
    is_above_half = scores > 0.5
    is_below_one = scores < 1
    # For scores outside the range from 1/2 to 1, the gap is an unused constant.
    gap = np.where(is_above_half & is_below_one, 1 - scores, _SMALLEST_GAP)
    code_up_to_one = _CODE_OF_ONE - (gap.view(np.int64) - _BITS_OF_SMALLEST_GAP)
    code_from_one = _CODE_OF_ONE + (bits - _BITS_OF_ONE)
    code_above_half = np.where(is_below_one, code_up_to_one, code_from_one)
    sign = np.copysign(1, scores).astype(np.int64)
    return np.where(is_above_half, code_above_half, sign * code_up_to_half)


def scores_of_codes(code: Ints) -> Floats:
    """Decode codes (N,) to scores (N,), the inverse of ``codes_of_scores``."""
    code_size = np.abs(code)
    is_zero = code_size == 0
    is_above_half = code > _CODE_OF_HALF
    is_below_one = code < _CODE_OF_ONE
    # In an array with a float64 view, every entry must have valid bits. So unused entries get a
    # constant.
    bits_up_to_half = np.where(
        is_zero | is_above_half, _BITS_MINUS_CODE, code_size + _BITS_MINUS_CODE
    )
    magnitude = bits_up_to_half.view(np.float64)
    signed = np.where(code < 0, -magnitude, magnitude)
    score_up_to_half = np.where(is_zero, 0.0, signed)
    gap_bits = np.where(
        is_above_half & is_below_one, _CODE_OF_ONE - code + _BITS_OF_SMALLEST_GAP, 0
    )
    score_up_to_one = 1 - gap_bits.view(np.float64)
    bits_from_one = np.where(is_below_one, _BITS_OF_ONE, code - _CODE_OF_ONE + _BITS_OF_ONE)
    score_from_one = bits_from_one.view(np.float64)
    score_above_half = np.where(is_below_one, score_up_to_one, score_from_one)
    return np.where(is_above_half, score_above_half, score_up_to_half)


@dataclass(frozen=True, eq=False)
class Histogram:
    """Correct and wrong answers, counted in each score bin.

    ``a + b`` is the histogram for the rows in ``a`` and ``b``, and equals ``b + a``. With at most
    ``max_bins`` distinct scores a histogram is exact. With more distinct scores, scores in the same
    bin count as tied. Then the AUROC has an error of at most ``tied_pairs`` / 2, and in practice
    far smaller.
    """

    bins: Ints  # (G,) int64, ascending: codes without the lowest ``level`` bits
    correct: Ints  # (G,) correct answers in each bin
    wrong: Ints  # (G,) wrong answers in each bin
    level: int = 0  # how many low bits are dropped
    low: float = math.inf  # smallest score. If there is no row: infinity
    high: float = -math.inf  # largest score. If there is no row: minus infinity
    max_bins: int = MAX_BINS  # largest number of occupied bins

    @classmethod
    def empty(cls) -> Histogram:
        """Return a histogram without rows."""
        nothing = np.empty(0, np.int64)
        return cls(bins=nothing, correct=nothing, wrong=nothing)

    @classmethod
    def of(cls, uncertainty: ArrayLike, failure: ArrayLike, max_bins: int = MAX_BINS) -> Histogram:
        """Make a histogram from rows with uncertainties (N,) and failures (N,)."""
        if not np.size(uncertainty) and not np.size(failure):
            return cls.empty()
        scores, failures = check_scores_and_failures(uncertainty, failure)
        is_zero = np.abs(scores) < _SMALLEST_MAGNITUDE  # as in ``codes_of_scores``
        scores = np.where(is_zero, 0.0, scores)
        wrong = failures.astype(np.int64)
        one_bin_per_row = cls(
            bins=codes_of_scores(scores),
            correct=1 - wrong,
            wrong=wrong,
            low=float(scores.min()),
            high=float(scores.max()),
            max_bins=max_bins,
        )
        return one_bin_per_row._merge_bins(level=0)

    @classmethod
    def total(cls, histograms: Iterable[Histogram]) -> Histogram:
        """Add many histograms, with a bounded number of bins in memory at a time."""
        parts: list[Histogram] = []
        for histogram in histograms:
            parts.append(histogram)
            n_bins = sum(len(part.bins) for part in parts)
            if n_bins > 2 * parts[0].max_bins:
                parts = [cls._join(parts)]
        return cls._join(parts) if parts else cls.empty()

    def __add__(self, other: Histogram) -> Histogram:
        return self._join([self, other])

    def without(self, part: Histogram) -> Histogram:
        """Return a histogram without the rows in ``part``.

        All answers in ``part`` must be wrong.
        """
        n_in_part = self.rows_of_part(part)
        return self.with_counts(self.correct, self.wrong - n_in_part)

    def with_part_as_wrong(self, part: Histogram) -> Histogram:
        """Return a histogram with the rows in ``part`` as wrong, and all other rows as correct.

        ``part`` contains only rows of this histogram with wrong answers.
        """
        n_in_part = self.rows_of_part(part)
        n_not_in_part = self.correct + self.wrong - n_in_part
        return self.with_counts(correct=n_not_in_part, wrong=n_in_part)

    def rows_of_part(self, part: Histogram) -> Ints:
        """Count, for each bin (G,), the rows of ``part`` in the bin.

        All answers in ``part`` must be wrong.
        """
        # Not negative, because a part's level is never higher than the level of the whole.
        n_more_dropped_bits = self.level - part.level
        bins_of_part = part.bins >> n_more_dropped_bits
        index_of_bin = np.searchsorted(self.bins, bins_of_part)
        n_rows = np.zeros_like(self.wrong)
        np.add.at(n_rows, index_of_bin, part.wrong)
        return n_rows

    def with_counts(self, correct: Ints, wrong: Ints) -> Histogram:
        """Return a histogram with these counts (G,) in the same bins, without empty bins."""
        is_filled = (correct + wrong) > 0
        return replace(
            self,
            bins=self.bins[is_filled],
            correct=correct[is_filled],
            wrong=wrong[is_filled],
        )

    @property
    def n(self) -> int:
        """Row count."""
        return self.n_failures + int(self.correct.sum())

    @property
    def n_pictures(self) -> int:
        """Picture count. In a histogram every row counts as a separate picture."""
        return self.n

    @property
    def design_effect(self) -> float:
        """How many rows count as one independent row: 1, because all rows are independent."""
        return 1.0

    def n_independent_answers(self) -> tuple[int, int]:
        """Count the pictures with a wrong answer, and the pictures with a right answer."""
        return self.n_failures, self.n - self.n_failures

    @property
    def n_failures(self) -> int:
        """Count of wrong answers."""
        return int(self.wrong.sum())

    @property
    def exact(self) -> bool:
        """Whether every distinct score has a separate bin."""
        return self.level == 0

    @property
    def note(self) -> str | None:
        """Note on the precision of this histogram's metrics. If the metrics are exact, None."""
        if self.exact:
            return None
        n_bits = 52 - self.level  # a float64 has 52 bits after the leading 1
        return f"histogram of at most {self.max_bins:,} bins, {n_bits} bits of the score"

    @property
    def values(self) -> Floats:
        """Scores (G,) in the middle of each bin, ascending.

        The first and the last bin end at the smallest and the largest score.
        """
        if not len(self.bins):
            return np.empty(0)
        first_code = self.bins << self.level
        last_code = first_code + (1 << self.level) - 1
        score_range = np.array([self.low, self.high])
        smallest, largest = codes_of_scores(score_range)
        start_code = np.maximum(first_code, smallest)
        start = scores_of_codes(start_code)
        end_code = np.minimum(last_code, largest)
        end = scores_of_codes(end_code)
        return start / 2 + end / 2  # not (start + end) / 2, because the sum may overflow

    @property
    def tied_pairs(self) -> float:
        """Share of pairs in the same bin, among all pairs with a wrong and a correct answer.

        If all answers are wrong, or if all answers are correct, the share is NaN.
        """
        n_pairs = self.n_failures * (self.n - self.n_failures)
        if n_pairs == 0:
            return math.nan
        n_tied = float((self.correct * self.wrong).sum())
        return n_tied / n_pairs

    def counts(self) -> TieCounts:
        """Return the counts per score, the input for every metric."""
        if not len(self.bins):
            raise DataError("a metric needs at least one row. Got none.")
        return TieCounts(self.values, self.correct, self.wrong)

    @staticmethod
    def _join(histograms: list[Histogram]) -> Histogram:
        """Join one or several histograms into one histogram with all rows."""
        level = max(part.level for part in histograms)
        bins = np.concatenate([part.bins >> (level - part.level) for part in histograms])
        correct = np.concatenate([part.correct for part in histograms])
        wrong = np.concatenate([part.wrong for part in histograms])
        histogram_of_all_bins = Histogram(
            bins=bins,
            correct=correct,
            wrong=wrong,
            level=level,
            low=min(part.low for part in histograms),
            high=max(part.high for part in histograms),
            max_bins=min(part.max_bins for part in histograms),
        )
        return histogram_of_all_bins._merge_bins(level)

    def _merge_bins(self, level: int) -> Histogram:
        """Merge equal bins, and raise the level until there are at most ``max_bins`` bins.

        ``level`` is the level of ``bins`` at the beginning. The bins need not be sorted, and a bin
        may occur several times.
        """
        if not len(self.bins):
            return replace(self, level=level)
        order = np.argsort(self.bins, kind="stable")
        bins = self.bins[order]
        starts = _starts_of_equal_bins(bins)
        while len(starts) > self.max_bins:
            bins = bins >> 1
            level += 1
            starts = _starts_of_equal_bins(bins)
        correct = np.add.reduceat(self.correct[order], starts)
        wrong = np.add.reduceat(self.wrong[order], starts)
        return replace(self, bins=bins[starts], correct=correct, wrong=wrong, level=level)


def _starts_of_equal_bins(bins: Ints) -> Ints:
    """Return the first entry's index for each distinct number in the sorted ``bins`` (N,)."""
    # A number different from the first entry is prepended, so index 0 is a start, too.
    different_number = ~bins[:1]
    return np.flatnonzero(np.diff(bins, prepend=different_number))
