"""Guarantees about the unlabelled photos of one folder, from draws without replacement.

The folder is a closed set of photos. Fix a predictor and a threshold t. The threshold accepts c
photos in the set, and the answers about K of these photos are wrong. Nobody knows K, and K never
changes. The photos are labelled in a random order, fixed before the first label. Let k of the first
m answers be wrong. Then c - m photos have no label. The guarantee says: among the answers about
photos without a label, at most the share r is wrong. The guarantee is false if

    K >= k + floor(r (c - m)) + 1.

The right side changes with every label, but Ville's inequality needs a fixed hypothesis. The
sequences of ``vilu.calibration.anytime`` do not help either: the first threshold with a false
guarantee would have to stay the same. So the hypotheses here are the fixed values of K:

1. E(K) is the evidence against "exactly K of c are wrong". E(K) is a likelihood ratio. Let the
   share of wrong answers be drawn from a beta distribution. The numerator is then the probability
   of the labels. The denominator is the probability of the labels if K are wrong. A label for a
   wrong answer multiplies E(K) by q / p, and a label for a right answer by (1 - q) / (1 - p). Under
   the beta distribution, a wrong answer has the probability q. If K are wrong, a wrong answer has
   the probability p = (K - k) / (c - m), and E(K) has the expectation 1.
2. A guarantee is certified when all K that break the guarantee are rejected. If such a guarantee is
   false, the true K is among the rejected K. So only the rejection of the true K is an error, and
   every K may be tested at the full level, as in a confidence sequence.
3. The thresholds share the level. Every threshold has a share w, and the shares add up to 1. Take
   the sum of w E(K) over all thresholds, where K is each threshold's true K. The sum has an
   expectation of at most 1. So by Ville's inequality (1939) the probability is at most delta that
   the sum is ever 1 / delta or more.

Source: Waudby-Smith and Ramdas, Confidence sequences for sampling without replacement (2020),
section 2, with a mixture over thresholds in place of a single threshold.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from typing import Final, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field
from scipy.special import betaln, gammaln, logsumexp

from vilu.artifacts.documents import FrozenModel
from vilu.calibration.anytime import (
    N_THRESHOLDS_UP_TO_LIMIT,
    SavedThresholdTests,
    ThresholdTests,
    require_grid,
)
from vilu.errors import DataError
from vilu.metrics.counts import Floats, Ints
from vilu.text import plural
from vilu.validation import require_between

PRIOR_A: Final = 0.5
"""First parameter of the beta distribution for the share of wrong answers."""

PRIOR_RELATIVE_MEAN: Final = 0.1
"""Mean of this beta distribution, divided by the largest allowed error rate."""

LEVEL_SHARE_AT_LIMIT: Final = 0.5
"""Share of the level for the threshold at the first limit for draws.

This threshold's number is ``N_THRESHOLDS_UP_TO_LIMIT``.
"""

LEVEL_SHARE_BELOW_LIMIT: Final = 0.3
"""Share of the level for the thresholds below the first limit, divided equally."""

LEVEL_SHARE_BEYOND_LIMIT: Final = 0.2
"""Share of the level for all thresholds beyond the first limit.

The j-th threshold beyond the limit gets the part 1 / (j (j + 1)) of this share.
"""

ROUNDING_TOLERANCE: Final = 1e-9
"""Tolerance for rounding up: a float64 like 3.0000000001 is rounded to 3."""

MAX_TRIED_NUMBERS: Final = 100
"""``n_more_labels_needed`` tries at most this many evenly spaced label counts."""


def _log_falling_factorial(n: Floats, k: Floats) -> Floats:
    """Return the logarithm of the product n (n - 1) ... with k factors, for 0 <= k <= n."""
    factors: Floats = gammaln(n + 1) - gammaln(n - k + 1)
    return factors


def log_evidence(
    n_wrong_drawn: ArrayLike,
    n_drawn: ArrayLike,
    n_photos: ArrayLike,
    min_n_wrong: ArrayLike,
    max_risk: float,
) -> Floats:
    """Return the log evidence (...) against "``min_n_wrong`` or more photos are answered wrongly".

    Args:
        n_wrong_drawn: Number of wrong answers among the drawn photos.
        n_drawn: Number of photos that were drawn in the random order and labelled.
        n_photos: Number of photos in the closed set.
        min_n_wrong: The tested hypothesis is: at least ``min_n_wrong`` answers about the closed
            set are wrong.
        max_risk: Largest allowed error rate. ``max_risk`` sets the beta distribution's mean.

    Returns:
        The log evidence, infinite where ``min_n_wrong`` or more wrong answers are impossible.

    Examples:
        >>> import math
        >>> import numpy as np
        >>> from vilu.calibration.closed_set import log_evidence
        >>> # Are at least 2 of 4 answers wrong? With the largest error rate 1/2, the beta
        >>> # distribution has the mean 0.05, with a = 0.5 and b = 9.5. A right first label gives
        >>> # (1 - 0.5 / 10) / (1 - 2 / 4) = 1.9. A right second label multiplies this number by
        >>> # (1 - 0.5 / 11) / (1 - 2 / 3).
        >>> evidence = log_evidence(0, [1, 2], n_photos=4, min_n_wrong=2, max_risk=0.5)
        >>> np.exp(evidence).round(4).tolist()
        [1.9, 5.4409]
        >>> # After a wrong first label, the likeliest number of wrong answers is 4. The evidence is
        >>> # (0.5 / 10) / (4 / 4).
        >>> round(math.exp(log_evidence(1, 1, n_photos=4, min_n_wrong=2, max_risk=0.5)), 4)
        0.05
        >>> # 80 of 500 photos are drawn, and no answer is wrong. Is "22 or more of all 500 answers
        >>> # are wrong" rejected at the level 1 / 20?
        >>> bool(log_evidence(0, 80, 500, 22, 0.05) >= math.log(20))
        True
    """
    k = np.asarray(n_wrong_drawn, dtype=np.float64)
    m = np.asarray(n_drawn, dtype=np.float64)
    c = np.asarray(n_photos, dtype=np.float64)
    # The probability of the labels rises with the number of wrong answers up to the mode and falls
    # beyond the mode. So the evidence against all numbers from ``min_n_wrong`` on is least at
    # ``min_n_wrong``, or at the mode if the mode is larger.
    smallest_n_wrong = np.asarray(min_n_wrong, dtype=np.float64)
    mode = np.floor(k * (c + 1) / np.maximum(m, 1))
    tested_n_wrong = np.maximum(smallest_n_wrong, np.minimum(mode, c))
    # m - k of the drawn answers are right. This is impossible if the whole set has fewer than m - k
    # right answers.
    n_right = c - tested_n_wrong
    is_impossible = n_right < m - k
    # Where the labels are impossible, k takes the place of the tested number, only to keep the
    # logarithms finite. The evidence there is set to infinity below.
    n_wrong = np.where(is_impossible, k, tested_n_wrong)
    # log probability of the m labels, in the drawn order, if n_wrong of c answers are wrong
    log_null = (
        _log_falling_factorial(n_wrong, k)
        + _log_falling_factorial(c - n_wrong, m - k)
        - _log_falling_factorial(c, m)
    )
    # log probability of the labels if the share of wrong answers has the beta distribution. This
    # distribution has the mean PRIOR_A / (PRIOR_A + prior_b) = PRIOR_RELATIVE_MEAN * max_risk.
    prior_b = PRIOR_A / (PRIOR_RELATIVE_MEAN * max_risk) - PRIOR_A
    log_bet = betaln(PRIOR_A + k, prior_b + m - k) - betaln(PRIOR_A, prior_b)
    evidence: Floats = np.where(is_impossible, np.inf, log_bet - log_null)
    return evidence


def level_shares(n_thresholds: int) -> Floats:
    """Return each threshold's share (G,) of the level, fixed before any label is seen."""
    n_below_limit = N_THRESHOLDS_UP_TO_LIMIT - 1
    shares = np.full(n_thresholds, LEVEL_SHARE_BELOW_LIMIT / n_below_limit)
    shares[n_below_limit] = LEVEL_SHARE_AT_LIMIT
    # Threshold number j = 1, 2, ... beyond the first limit gets the part 1 / (j (j + 1)) of
    # LEVEL_SHARE_BEYOND_LIMIT. These parts add up to at most 1, for any number of thresholds. So
    # the shares for a grid of any length add up to at most 1.
    j = np.arange(1, n_thresholds - N_THRESHOLDS_UP_TO_LIMIT + 1)
    shares[N_THRESHOLDS_UP_TO_LIMIT:] = LEVEL_SHARE_BEYOND_LIMIT / (j * (j + 1))
    return shares


class ClosedCounts(FrozenModel):
    """Counts of accepted photos in a closed set (a fixed photo set, such as one folder).

    Each attribute has a number for each threshold (G,) in a grid.

    Attributes:
        photos: Number of all accepted photos, with or without a label.
        aside: Number of accepted photos with a label that were not drawn at random. These photos
            are counted apart from the random sample.
        aside_wrong: Number of photos among ``aside`` with a wrong answer.
    """

    photos: tuple[int, ...]
    aside: tuple[int, ...]
    aside_wrong: tuple[int, ...]

    @classmethod
    def of(
        cls, grid: Floats, photo_scores: Floats, aside_scores: Floats, aside_failure: Ints
    ) -> Self:
        """Count the photos in a closed set.

        Args:
            grid: Thresholds (G,), ascending.
            photo_scores: Uncertainties (N,) for all photos in the set.
            aside_scores: Uncertainties (M,) for the photos with a label that were not drawn at
                random.
            aside_failure: (M,) 1 for a wrong answer, 0 for a right answer.
        """
        photos = _count_accepted(grid, photo_scores)
        aside = _count_accepted(grid, aside_scores)
        aside_wrong = _count_accepted(grid, aside_scores[aside_failure == 1])
        return cls(photos=photos, aside=aside, aside_wrong=aside_wrong)


def _count_accepted(grid: Floats, uncertainty: Floats) -> tuple[int, ...]:
    """Count for each threshold (G,) the accepted uncertainties among ``uncertainty`` (N,)."""
    ascending = np.sort(uncertainty)
    n_accepted = np.searchsorted(ascending, grid, side="right")
    return tuple(n_accepted.tolist())


class ClosedPhotos(FrozenModel):
    """Photos under a guarantee about a folder.

    These photos are accepted, and had no label when the guarantee was certified.

    Attributes:
        pictures: Picture identities, ascending (``EmbeddingSource.picture_identities``).
        files: Number of files with these pictures.
    """

    pictures: tuple[int, ...] = Field(min_length=1)
    files: int = Field(ge=1)

    def covers(self, pictures: Ints) -> NDArray[np.bool_]:
        """Return the mask (N,) of the pictures (N,) under the guarantee."""
        covered_pictures = np.array(self.pictures)
        return np.isin(pictures, covered_pictures)

    def __str__(self) -> str:
        n_pictures = len(self.pictures)
        if n_pictures == self.files:
            return plural(n_pictures, "photo")
        return f"{plural(n_pictures, 'picture')} ({self.files:,} files)"


class SavedClosedSetTests(FrozenModel):
    """Saved settings for the tests on a closed set (``ClosedSetTests``)."""

    grid: tuple[float, ...]  # thresholds, ascending
    delta: float = Field(gt=0, lt=1)  # level
    limit: float  # only photos up to this uncertainty are labelled
    counts: ClosedCounts

    @classmethod
    def of(cls, tests: ClosedSetTests) -> Self:
        """Return the settings of the tests ``tests``."""
        grid = tuple(tests.grid.tolist())
        return cls(grid=grid, delta=tests.delta, limit=tests.limit, counts=tests.photo_counts)

    def tests(self, max_risk: float) -> ClosedSetTests:
        """Make the threshold tests for a maximal risk."""
        grid = np.array(self.grid)
        return ClosedSetTests(grid, max_risk, self.delta, self.counts, self.limit)


@dataclass(frozen=True)
class ClosedSetTests:
    """Repeatable tests for a threshold grid on a closed set: a test is valid after every label.

    ``ClosedSetTests`` has the methods of ``vilu.calibration.anytime.ThresholdTests``, but certifies
    a different statement. Let a threshold accept n unlabelled photos in the set. The statement is:
    at most the share ``max_risk`` of the answers about these n photos is wrong.

    Let B be the number of wrong answers among the labels, plus floor(max_risk n). If the statement
    is false, the set up to the threshold holds at least B + 1 wrong answers. The set up to every
    laxer threshold then holds at least B + 1 wrong answers, too. So the threshold is certified if
    the evidence against "at least B + 1" reaches 1 / delta. This evidence is a sum over the
    threshold and all laxer thresholds, weighted with ``level_shares``. Then

        P[the statement about a certified threshold is ever false] <= delta

    Labels for photos that were not drawn at random are counted in B, but are no evidence.

    Args:
        grid: Thresholds (G,), ascending, fixed before the labels (``anytime.threshold_grid``).
        max_risk: Largest error rate among accepted answers without a label, in (0, 1).
        delta: The level, in (0, 1).
        photo_counts: Counts of accepted photos in the set, for each threshold.
        limit: Only photos up to this uncertainty are labelled, so no larger threshold is tested.

    Examples:
        >>> import numpy as np
        >>> from vilu.calibration.closed_set import ClosedCounts, ClosedSetTests
        >>> grid = np.linspace(0.01, 0.64, 64)
        >>> photos = np.linspace(0, 0.64, 500)  # the set has 500 photos
        >>> no_failure = np.zeros(0, int)
        >>> counts = ClosedCounts.of(grid, photos, np.zeros(0), aside_failure=no_failure)
        >>> tests = ClosedSetTests(grid, max_risk=0.05, delta=0.05, photo_counts=counts)
        >>> drawn = photos[::5]  # 100 of the photos are labelled
        >>> failure = np.zeros(100, int)  # no answer is wrong
        >>> # the last threshold is certified, for the 400 photos without a label
        >>> tests.index_of_laxest_certified_threshold(drawn, failure)
        63
        >>> # 50 labels are too few
        >>> print(tests.index_of_laxest_certified_threshold(drawn[::2], failure[::2]))
        None
    """

    grid: Floats
    max_risk: float
    delta: float
    photo_counts: ClosedCounts
    limit: float = math.inf

    def __post_init__(self) -> None:
        require_between("max_risk", self.max_risk)
        require_between("delta", self.delta)
        require_grid(self.grid)
        if len(self.photo_counts.photos) != len(self.grid):
            raise DataError(
                f"the photos of a closed set must be counted for each of the {len(self.grid)} "
                f"thresholds. Got {len(self.photo_counts.photos)} counts."
            )

    @property
    def last_tested_index(self) -> int:
        """Index of the laxest threshold up to the limit."""
        n_up_to_limit = int(np.searchsorted(self.grid, self.limit, side="right"))
        return n_up_to_limit - 1

    def count_wrong_and_accepted(self, uncertainty: Floats, failure: Ints) -> tuple[Ints, Ints]:
        """Count for each threshold (G,) the accepted wrong answers, and all accepted answers.

        ``uncertainty`` (N,) and ``failure`` (N,) belong to the N drawn photos.
        """
        n_accepted = _count_accepted(self.grid, uncertainty)
        n_wrong = _count_accepted(self.grid, uncertainty[failure == 1])
        return np.array(n_wrong), np.array(n_accepted)

    def count_unlabelled(self, n_drawn: Ints) -> Ints:
        """Count for each threshold (G,) the accepted photos without a label.

        ``n_drawn`` (G,) is the number of accepted drawn photos. All drawn photos have a label.
        """
        n_photos = np.array(self.photo_counts.photos)
        n_aside = np.array(self.photo_counts.aside)
        n_unlabelled: Ints = n_photos - n_aside - n_drawn
        return n_unlabelled

    def index_of_laxest_certified_threshold(self, uncertainty: Floats, failure: Ints) -> int | None:
        """Return the index of the laxest threshold certified by the drawn labels (N,).

        None if the labels certify no threshold.
        """
        n_wrong, n_drawn = self.count_wrong_and_accepted(uncertainty, failure)
        return self._laxest_index_by_counts(n_wrong, n_drawn)

    def can_certify(self, uncertainty: Floats) -> bool:
        """Return whether these rows (N,) would certify a threshold if all answers were right."""
        no_failures = np.zeros(len(uncertainty), dtype=np.int64)
        n_wrong, n_drawn = self.count_wrong_and_accepted(uncertainty, no_failures)
        return self._laxest_index_by_counts(n_wrong, n_drawn) is not None

    def _laxest_index_by_counts(self, n_wrong: Ints, n_drawn: Ints) -> int | None:
        """Return the index of the laxest certified threshold, or None if no threshold is certified.

        ``n_wrong`` (G,) and ``n_drawn`` (G,) are the results of ``count_wrong_and_accepted``.
        """
        n_unlabelled = self.count_unlabelled(n_drawn)
        n_known_wrong = n_wrong + np.array(self.photo_counts.aside_wrong)
        n_tolerated = n_known_wrong + np.floor(self.max_risk * n_unlabelled).astype(np.int64)
        n_tested = self.last_tested_index + 1  # number of thresholds up to the limit
        evidence = self._evidence(n_wrong[:n_tested], n_drawn[:n_tested], n_tolerated[:n_tested])
        is_rejected = evidence >= -math.log(self.delta)
        # A guarantee about no photo at all would be true, but useless.
        has_unlabelled = n_unlabelled[:n_tested] > 0
        certified_indices = np.flatnonzero(is_rejected & has_unlabelled)
        return int(certified_indices[-1]) if len(certified_indices) else None

    def _evidence(self, n_wrong: Ints, n_drawn: Ints, n_tolerated: Ints) -> Floats:
        """Return the log evidence (T,) against a false guarantee for each tested threshold.

        Args:
            n_wrong: (T,) number of wrong answers among the drawn photos.
            n_drawn: (T,) number of drawn photos.
            n_tolerated: (T,) largest number of wrong answers under a true guarantee.
        """
        n_photos = np.array(self.photo_counts.photos[: len(n_wrong)])
        # ``log_e`` is a matrix (T, T). A matrix row stands for the threshold with the tested
        # guarantee, and a column for the threshold with the labels that are evidence. If n answers
        # are wrong up to the row's threshold, at least n are wrong up to every laxer threshold. So
        # the columns of laxer thresholds test the row's number, too.
        min_n_wrong = n_tolerated[:, None] + 1
        log_e = log_evidence(n_wrong, n_drawn, n_photos, min_n_wrong, self.max_risk)
        # True where the column's threshold is laxer than the row's threshold, or equal
        is_evidence = np.triu(np.ones(log_e.shape, np.bool_))
        level_share = level_shares(len(self.grid))[: len(n_wrong)]
        log_level_share = np.log(level_share)
        terms = np.where(is_evidence, log_e + log_level_share, -np.inf)
        evidence: Floats = logsumexp(terms, axis=1)
        return evidence

    def n_more_labels_needed(self, uncertainty: Floats, failure: Ints) -> int | None:
        """Estimate how many more labels would certify a threshold, at the same error rates.

        Only labels for photos up to the limit count. Without any label so far, all answers are
        assumed to be right. None if the photos up to the limit are too few.
        """
        n_wrong, n_drawn = self.count_wrong_and_accepted(uncertainty, failure)
        n_unlabelled = self.count_unlabelled(n_drawn)
        # photos up to the limit without a label
        n_up_to_limit = int(n_unlabelled[self.last_tested_index])

        def is_enough(n_more: int) -> bool:
            return self._would_certify(n_wrong, n_drawn, n_more)

        # Every label takes a photo out of the guarantee, so more labels may certify less. Bisection
        # over all numbers could therefore end far above the smallest number. So evenly spaced
        # numbers are tried first, in ascending order. Bisection then searches between the first
        # number that is enough and the number before.
        evenly_spaced = np.linspace(0, n_up_to_limit, MAX_TRIED_NUMBERS, endpoint=False)
        rounded_up = np.ceil(evenly_spaced)
        distinct_numbers = np.unique(rounded_up.astype(np.int64))
        numbers_to_try: list[int] = distinct_numbers.tolist()
        too_small = -1  # no number was tried yet
        for n_more in numbers_to_try:
            if is_enough(n_more):
                numbers_between = range(too_small + 1, n_more)
                n_between_too_small = bisect_left(numbers_between, True, key=is_enough)
                return too_small + 1 + n_between_too_small
            too_small = n_more
        return None

    def _would_certify(self, n_wrong: Ints, n_drawn: Ints, n_more: int) -> bool:
        """Return whether more labels would certify a threshold, at the same error rates.

        Args:
            n_wrong: (G,) number of wrong answers among the accepted drawn photos.
            n_drawn: (G,) number of accepted drawn photos, for each threshold.
            n_more: Number of additional labels, for photos up to the limit.
        """
        error_rate = n_wrong / np.maximum(n_drawn, 1)
        n_unlabelled = self.count_unlabelled(n_drawn)
        n_up_to_limit = int(n_unlabelled[self.last_tested_index])
        # The next photos are drawn from the unlabelled photos up to the limit. A threshold that
        # accepts half of them accepts about half of the newly drawn photos.
        n_more_drawn = np.floor(n_more * n_unlabelled / max(n_up_to_limit, 1)).astype(np.int64)
        n_drawn_then = n_drawn + n_more_drawn
        # The numbers are rounded up, so that the estimate is not too small.
        n_wrong_then = np.ceil(error_rate * n_drawn_then - ROUNDING_TOLERANCE).astype(np.int64)
        return self._laxest_index_by_counts(n_wrong_then, n_drawn_then) is not None


AnyThresholdTests = ThresholdTests | ClosedSetTests
"""Threshold tests, about new photos or about the photos in a closed set."""

AnySavedTests = SavedThresholdTests | SavedClosedSetTests
"""Saved settings for ``AnyThresholdTests``."""


def settings_of_tests(tests: AnyThresholdTests) -> AnySavedTests:
    """Return the settings of the tests ``tests``, to be saved."""
    if isinstance(tests, ClosedSetTests):
        return SavedClosedSetTests.of(tests)
    return SavedThresholdTests.of(tests)
