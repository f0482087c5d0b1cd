"""Thresholds that may be tested again after every label, with anytime-valid evidence.

Fix a threshold t. The accepted answers are labelled one after another. The answers are independent
draws, each wrong with probability R(t). A bet b in (0, 1] against "the error rate is above r" has a
wealth, which begins at 1. Let wrong be 1 for a wrong answer and 0 for a right answer. Every label
multiplies the wealth by

    1 - b (wrong - r) / (1 - r).

The mean of this factor is at most 1 where R(t) >= r. If k of the first m answers are wrong, the
wealth after m labels is

    (1 - b)^k (1 + b r / (1 - r))^(m - k).

E(t) is the mean wealth of several bets. Let a in (0, 1) be a level. Where R(t) >= r, the
probability that E(t) ever reaches 1 / a is at most a (Ville 1939). So labelling may go on until a
threshold is certified, and every look uses the same level. An exact binomial test that is repeated
at every look would not be valid.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from typing import Final, Self

import numpy as np
from numpy.typing import ArrayLike
from pydantic import Field

from vilu.artifacts.documents import FrozenModel
from vilu.calibration.thresholds import MAX_SEARCHED_ROWS, find_sufficient_number
from vilu.errors import DataError
from vilu.metrics.counts import Floats, Ints
from vilu.validation import require_between

BETS_WITH_SHARES: Final = ((0.95, 0.4), (0.8, 0.25), (0.6, 0.2), (0.35, 0.15))
"""Bets b, each with a share of the initial wealth.

With these bets 72 right answers and no wrong answer certify a risk of 5 % with confidence 95 %. The
exact test for a single look needs 59.
"""

N_THRESHOLDS_UP_TO_LIMIT: Final = 64
"""Number of thresholds in a grid up to the first uncertainty limit for labelling.

Only rows with an uncertainty up to the limit are labelled. ``vilu triage`` may raise the limit
later, but never changes the grid.
"""

SEQUENCE_STARTS: Final = ((40, 0.3), (N_THRESHOLDS_UP_TO_LIMIT, 0.7))
"""For every sequence of thresholds: number of the first threshold, and the share of the level.

Thresholds are numbered from 1. The thresholds 1 to ``N_THRESHOLDS_UP_TO_LIMIT`` divide the rows up
to the first limit into equal parts. So threshold ``N_THRESHOLDS_UP_TO_LIMIT`` accepts all rows up
to this limit, and its test uses all labels until the limit is raised. Therefore the sequence that
starts there gets the largest share.
"""

GROWTH_BEYOND_LIMIT: Final = 1.02
"""Beyond the limit, each threshold accepts this many times the rows of the previous threshold."""


@np.errstate(under="ignore")  # terms far smaller than the largest term are rounded to 0
def log_evidence(n_wrong: ArrayLike, n_accepted: ArrayLike, max_risk: float) -> Floats:
    """Return the log evidence (...) against "the error rate is above ``max_risk``": log E.

    ``n_accepted`` is the number of labels so far, and ``n_wrong`` the number of wrong answers.

    Examples:
        >>> import math
        >>> from vilu.calibration.anytime import log_evidence
        >>> # With the risk 1/2, a wrong answer has the factor 1 - b, and a right answer 1 + b. The
        >>> # mean bet is 0.4 * 0.95 + 0.25 * 0.8 + 0.2 * 0.6 + 0.15 * 0.35 = 0.7525.
        >>> [round(math.exp(log_evidence(k, 1, 0.5)), 6) for k in (1, 0)]  # the mean is 1
        [0.2475, 1.7525]
        >>> # after n right answers: is the risk below 5 %, at level 1/20?
        >>> is_certified = [log_evidence(0, n, 0.05) >= math.log(20) for n in range(100)]
        >>> is_certified.index(True)
        72
    """
    bets, wealth_shares = np.array(BETS_WITH_SHARES).T
    # The added last axis is for the bets.
    k = np.asarray(n_wrong, dtype=np.float64)[..., None]
    m = np.asarray(n_accepted, dtype=np.float64)[..., None]
    # Logarithms are added, because after thousands of labels the wealth leaves the float64 range.
    change_by_wrong = k * np.log1p(-bets)
    change_by_right = (m - k) * np.log1p(bets * max_risk / (1 - max_risk))
    # The mean wealth of the bets has an expectation of at most 1, so Ville's inequality holds. The
    # largest wealth among the bets must not be used instead: its expectation can exceed 1.
    log_wealth_of_bets = np.log(wealth_shares) + change_by_wrong + change_by_right
    evidence: Floats = np.logaddexp.reduce(log_wealth_of_bets, axis=-1)
    return evidence


def n_right_labels_needed(max_risk: float, delta: float) -> int:
    """Return the smallest number of right answers that certifies a threshold at level delta."""
    return n_labels_needed(n_wrong=0, max_risk=max_risk, delta=delta)


def n_labels_needed(n_wrong: int, max_risk: float, delta: float) -> int:
    """Return the smallest number of labels that certifies a threshold at level delta.

    ``n_wrong`` of these labels are for wrong answers.

    Examples:
        >>> from vilu.calibration.anytime import n_labels_needed
        >>> [n_labels_needed(n_wrong, max_risk=0.05, delta=0.05) for n_wrong in (0, 1, 2)]
        [72, 124, 169]
    """

    def evidence_of(n_right: int) -> float:
        return float(log_evidence(n_wrong, n_wrong + n_right, max_risk))

    # Every bet wins at a right answer. So the evidence rises with the number of right answers, and
    # bisection finds the smallest sufficient number.
    log_evidence_needed = -math.log(delta)  # log of 1 / delta
    n_right = bisect_left(range(MAX_SEARCHED_ROWS), log_evidence_needed, key=evidence_of)
    return n_wrong + n_right


def level_of(attempt: int, delta: float) -> float:
    """Return the level for predictor number k = ``attempt`` (from 1): delta / 2^k.

    The levels of infinitely many predictors add up to delta.

    Examples:
        >>> from vilu.calibration.anytime import level_of
        >>> [level_of(k, delta=0.08) for k in (1, 2, 3)]
        [0.04, 0.02, 0.01]
    """
    # The number of predictors is not known in advance, so delta cannot be divided equally. If each
    # predictor had all of delta, the probability of any wrong certificate could exceed delta (union
    # bound).
    return delta * 0.5**attempt


def threshold_grid(uncertainty: Floats, limit: float) -> Floats:
    """Choose thresholds (G,) from scores (N,), without labels.

    The first 64 thresholds divide the rows up to ``limit`` into equal parts. Beyond the limit, each
    threshold accepts ``GROWTH_BEYOND_LIMIT`` times as many rows as the previous threshold.
    """
    # The grid is fixed before any label is seen. Thresholds that depend on labels would favour
    # scores where the answers happen to be right, and a test for fixed thresholds would not hold.
    ascending = np.sort(uncertainty)
    n_up_to_limit = int(np.searchsorted(ascending, limit, side="right"))
    if not n_up_to_limit:
        raise DataError(f"no score is at most {limit:.6g}, so nothing could be accepted.")
    n_accepted = []
    for threshold_number in range(1, N_THRESHOLDS_UP_TO_LIMIT + 1):
        n_rows = math.ceil(n_up_to_limit * threshold_number / N_THRESHOLDS_UP_TO_LIMIT)
        n_accepted.append(n_rows)
    while n_accepted[-1] < len(ascending):
        n_next = math.ceil(n_accepted[-1] * GROWTH_BEYOND_LIMIT)
        n_accepted.append(min(n_next, len(ascending)))
    index_of_last_accepted = np.array(n_accepted) - 1
    grid: Floats = ascending[index_of_last_accepted]
    return grid


def n_accepted_relative_to_limit(n_thresholds: int) -> Floats:
    """Return each threshold's number of accepted rows (G,), relative to the first limit.

    The number is divided by the number of rows up to the limit given to ``threshold_grid``, which
    chose the thresholds. The quotients are not rounded to whole rows, so
    they depend only on the number of thresholds.
    """
    threshold_number = np.arange(1, n_thresholds + 1)
    share_up_to_limit = np.minimum(threshold_number / N_THRESHOLDS_UP_TO_LIMIT, 1.0)
    n_steps_beyond_limit = np.maximum(threshold_number - N_THRESHOLDS_UP_TO_LIMIT, 0)
    relative_n_accepted: Floats = share_up_to_limit * GROWTH_BEYOND_LIMIT**n_steps_beyond_limit
    return relative_n_accepted


def require_grid(grid: Floats) -> None:
    """Raise a DataError for a grid with too few thresholds, or not in ascending order."""
    if len(grid) < N_THRESHOLDS_UP_TO_LIMIT or (np.diff(grid) < 0).any():
        thresholds = np.asarray(grid).tolist()
        raise DataError(
            f"a grid must have at least {N_THRESHOLDS_UP_TO_LIMIT} thresholds, in ascending order. "
            f"Got {thresholds}."
        )


class SavedThresholdTests(FrozenModel):
    """Saved settings for repeated tests (``ThresholdTests``).

    The settings are fixed before any label is seen.
    """

    grid: tuple[float, ...]  # thresholds, ascending
    delta: float = Field(gt=0, lt=1)  # level
    limit: float  # only rows up to this uncertainty are labelled

    @classmethod
    def of(cls, tests: ThresholdTests) -> Self:
        """Return the settings of the tests ``tests``."""
        grid = tuple(tests.grid.tolist())
        return cls(grid=grid, delta=tests.delta, limit=tests.limit)

    def tests(self, max_risk: float) -> ThresholdTests:
        """Make the threshold tests for a maximal risk."""
        grid = np.array(self.grid)
        return ThresholdTests(grid, max_risk, self.delta, self.limit)


@dataclass(frozen=True)
class ThresholdTests:
    """Repeatable tests for a threshold grid: all thresholds may be tested after every label.

    The hypothesis H_t, "the error rate at t is above max_risk", is rejected if E(t) >= 1 / level.
    Thresholds are tested from strict to lax. Sequences start at ``SEQUENCE_STARTS``, each with a
    share of ``delta``. If a sequence reaches the start of the next sequence, the next sequence's
    level grows by the earlier sequence's level.

    1. The level at a true H_t is the sum of some shares. These shares belong to the sequences that
       started after the preceding true H_t.
    2. So the levels at all true H_t add up to at most delta.
    3. Ville's inequality holds for every level at all times. So

           P[ever certifying a t with R(t) > max_risk] <= delta.

    Args:
        grid: Thresholds (G,), ascending, fixed before the labels (``threshold_grid``).
        max_risk: Largest error rate among accepted answers, in (0, 1).
        delta: The level, in (0, 1).
        limit: Only rows up to this uncertainty are labelled, so no larger threshold is tested.

    Source: our combination of Ville (1939) and Wiens, A fixed sequence Bonferroni procedure (2003).

    Examples:
        >>> import numpy as np
        >>> from vilu.calibration.anytime import ThresholdTests
        >>> tests = ThresholdTests(grid=np.linspace(0.01, 0.64, 64), max_risk=0.05, delta=0.05)
        >>> uncertainty = np.full(90, 0.005)  # below all thresholds
        >>> failure = np.zeros(90, int)  # no answer is wrong
        >>> tests.index_of_laxest_certified_threshold(uncertainty, failure)  # the last threshold
        63
        >>> # 50 labels are too few
        >>> print(tests.index_of_laxest_certified_threshold(uncertainty[:50], failure[:50]))
        None
    """

    grid: Floats
    max_risk: float
    delta: float
    limit: float = math.inf

    def __post_init__(self) -> None:
        require_between("max_risk", self.max_risk)
        require_between("delta", self.delta)
        require_grid(self.grid)

    @property
    def last_tested_index(self) -> int:
        """Index of the laxest threshold up to the limit."""
        n_up_to_limit = int(np.searchsorted(self.grid, self.limit, side="right"))
        return n_up_to_limit - 1

    def count_wrong_and_accepted(self, uncertainty: Floats, failure: Ints) -> tuple[Ints, Ints]:
        """Count for each threshold (G,) the accepted wrong answers, and all accepted answers.

        ``uncertainty`` (N,) and ``failure`` (N,) belong to the N labelled answers.
        """
        threshold = self.grid[:, None]  # (G, 1)
        is_accepted = uncertainty <= threshold  # (G, N)
        is_accepted_and_wrong = is_accepted & (failure == 1)
        return is_accepted_and_wrong.sum(axis=1), is_accepted.sum(axis=1)

    def index_of_laxest_certified_threshold(self, uncertainty: Floats, failure: Ints) -> int | None:
        """Return the index of the laxest threshold certified by the labels (N,) so far.

        None if the labels certify no threshold.
        """
        n_wrong, n_accepted = self.count_wrong_and_accepted(uncertainty, failure)
        return self._laxest_index_by_counts(n_wrong, n_accepted)

    def can_certify(self, uncertainty: Floats) -> bool:
        """Return whether these rows (N,) would certify a threshold if all answers were right.

        If not, a test can certify nothing yet. Such a test does not count as a look.
        """
        # All answers count as right here, so the result does not depend on the labels.
        no_failures = np.zeros(len(uncertainty), dtype=np.int64)
        n_wrong, n_accepted = self.count_wrong_and_accepted(uncertainty, no_failures)
        return self._laxest_index_by_counts(n_wrong, n_accepted) is not None

    def _laxest_index_by_counts(self, n_wrong: Ints, n_accepted: Ints) -> int | None:
        """Return the index of the laxest certified threshold, or None if no threshold is certified.

        ``n_wrong`` (G,) and ``n_accepted`` (G,) are the results of ``count_wrong_and_accepted``.
        """
        # maps the number of a sequence's first threshold to the sequence's share of the level
        share_at_start = dict(SEQUENCE_STARTS)
        level = 0.0
        laxest_index = None
        # Labelled rows are a random sample only up to the limit. So no threshold beyond the limit
        # is tested.
        n_tested = self.last_tested_index + 1
        evidence = log_evidence(n_wrong, n_accepted, self.max_risk)[:n_tested]
        for index, log_e in enumerate(evidence.tolist()):
            threshold_number = index + 1
            level += self.delta * share_at_start.get(threshold_number, 0.0)
            # log E >= log(1 / level). Without a level nothing is rejected.
            is_rejected = level > 0 and log_e >= -math.log(level)
            if is_rejected:
                # The next threshold is tested at the full level. A sequence makes an error only by
                # rejecting the first true H_t that it meets, so the level counts once (Wiens).
                laxest_index = index
            else:
                # H_t may be true, and this test has used up the level. If the same level were used
                # again, the levels at true hypotheses could add up to more than delta.
                level = 0.0
        return laxest_index

    def n_more_labels_needed(self, uncertainty: Floats, failure: Ints) -> int | None:
        """Estimate how many more labels would certify a threshold, at the same error rates.

        Only labels for rows up to the limit count. Without any label so far, all answers are
        assumed to be right. None if no number of labels would be enough.
        """
        n_wrong, n_accepted = self.count_wrong_and_accepted(uncertainty, failure)
        # All new labels are for rows up to the limit. A threshold that accepts half of these rows
        # also accepts about half of the newly labelled rows.
        relative_n_accepted = n_accepted_relative_to_limit(len(self.grid))
        relative_at_limit = relative_n_accepted[self.last_tested_index]
        share_accepted = np.minimum(relative_n_accepted / relative_at_limit, 1.0)
        error_rate = np.minimum(n_wrong / np.maximum(n_accepted, 1), 1.0)

        def is_enough(n_more_labels: int) -> bool:
            n_more_accepted = np.floor(n_more_labels * share_accepted).astype(np.int64)
            n_accepted_then = n_accepted + n_more_accepted
            # The numbers are rounded up, so that the estimate is not too small. The tolerance 1e-9
            # keeps a float64 like 3.0000000001 at 3.
            n_wrong_then = np.ceil(error_rate * n_accepted_then - 1e-9).astype(np.int64)
            return self._laxest_index_by_counts(n_wrong_then, n_accepted_then) is not None

        if is_enough(0):
            return 0
        return find_sufficient_number(is_enough, first_tried=1)
