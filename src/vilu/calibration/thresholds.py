"""Thresholds with a bound on the risk, from exact binomial tails."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple, Self

import numpy as np
from pydantic import Field

from vilu.artifacts.documents import FrozenModel
from vilu.metrics.counts import Floats, Ints, TieCounts

MAX_SEARCHED_ROWS = 2**40
"""Largest number of rows in a search."""

StartShares = tuple[tuple[float, float], ...]
"""For every sequence: share of rows at the sequence's start, and the share of the level."""


def binomial_tail(n_wrong: Ints, n_accepted: Ints, risk: float) -> Floats:
    """Return the p-value (...) of "the error rate is above ``risk``".

    With k = ``n_wrong`` and m = ``n_accepted``, the p-value is the binomial tail

        P[Bin(m, risk) <= k],

    where Bin(m, risk) is the number of wrong answers among m independent answers, each wrong with
    probability ``risk``. The p-value is 1 where nothing is accepted.

    Examples:
        >>> import numpy as np
        >>> from vilu.calibration.thresholds import binomial_tail
        >>> # three answers, each wrong with probability 1/2: at most 0 wrong, at most 1 wrong
        >>> binomial_tail(np.array([0, 1]), np.array([3, 3]), risk=0.5).tolist()  # 1/8, (1 + 3)/8
        [0.125, 0.5]
    """
    # imported here, because the import takes half a second and scoring does not need SciPy
    from scipy import special

    # The tail equals the regularised incomplete beta function I(m - k, k + 1) at 1 - risk. SciPy
    # computes this function exactly for whole arrays. A normal approximation to the tail would be
    # too small, because errors are rare here.
    has_right = n_wrong < n_accepted
    # The function's parameters m - k and k + 1 must be above 0. Where no answer is right, both are
    # set to 1, and the result is replaced by 1.
    a = np.where(has_right, n_accepted - n_wrong, 1)
    b = np.where(has_right, n_wrong + 1, 1)
    p = special.betainc(a, b, 1 - risk)
    return np.where(has_right, p, 1.0)


def upper_bound(n_wrong: float, n_accepted: float, delta: float) -> float:
    """Return the upper Clopper-Pearson bound on an error rate, with confidence 1 - delta.

    For k = ``n_wrong`` and m = ``n_accepted``, the bound is the b where P[Bin(m, b) <= k] = delta.

    Examples:
        >>> from vilu.calibration.thresholds import upper_bound
        >>> round(upper_bound(0, 2, delta=0.25), 6)  # (1 - b)^2 = 1/4
        0.5
    """
    from scipy import special

    if n_wrong >= n_accepted:
        return 1.0
    # The bound is exact at every m. A normal approximation would be 0 where no answer is wrong.
    return float(special.betaincinv(n_wrong + 1, n_accepted - n_wrong, 1 - delta))


def lower_bound(n_hits: float, n: float, delta: float) -> float:
    """Return the lower Clopper-Pearson bound on a rate, with confidence 1 - delta.

    For k = ``n_hits``, the bound is the b where P[Bin(n, b) >= k] = delta.

    Examples:
        >>> from vilu.calibration.thresholds import lower_bound
        >>> round(lower_bound(2, 2, delta=0.25), 6)  # b^2 = 1/4
        0.5
    """
    from scipy import special

    if not n_hits:
        return 0.0
    return float(special.betaincinv(n_hits, n - n_hits + 1, delta))


def percent(share: float, decimals: int = 2, rounding: Callable[[float], int] = math.ceil) -> str:
    """Return a bound in per cent as a text, rounded to the safe side.

    An upper bound is rounded up (``math.ceil``), a lower bound is rounded down (``math.floor``). A
    small share is shown with more than ``decimals`` decimals.
    """
    if share > 0:
        # The first two digits after the leading zeros must be shown: 0.0123 % needs three decimals,
        # and log10(0.0123) = -1.9 is rounded down to -2.
        decimals_of_two_digits = 1 - math.floor(math.log10(100 * share))
        decimals = max(decimals, decimals_of_two_digits)
    # A unit is 1 in the last shown decimal. The + 2 stands for the factor 100 of per cent.
    units_per_one = 10 ** (decimals + 2)
    # Rounded to six decimals first: 0.07 * 10,000 is a little more than 700 in float64, and
    # rounding up alone would give 7.01 %.
    n_units = rounding(round(share * units_per_one, 6))
    return f"{n_units / units_per_one:.{decimals}%}"


def exact_percent(confidence: float) -> str:
    """Return a confidence in per cent with all decimals: 99.9 % is not shown as 100 %."""
    return f"{100 * confidence:.10g}%"


def n_right_needed(risk: float, delta: float) -> int:
    """Return the smallest m with (1 - risk)^m <= delta: m right answers certify the risk.

    Examples:
        >>> from vilu.calibration.thresholds import n_right_needed
        >>> n_right_needed(risk=0.5, delta=0.1)  # (1/2)^3 = 0.125, (1/2)^4 = 0.0625
        4
        >>> n_right_needed(risk=0.05, delta=0.05)
        59
    """
    if risk >= 1:
        return 1
    # In float64 a whole quotient could come out a little larger. Without the tolerance 1e-9, such a
    # quotient would be rounded up to the next whole number.
    return max(math.ceil(math.log(delta) / math.log1p(-risk) - 1e-9), 1)


def n_accepted_needed(n_wrong: int, risk: float, delta: float) -> int | None:
    """Return the smallest m with P[Bin(m, risk) <= n_wrong] <= delta, or None if m is above 2^40.

    m accepted answers with ``n_wrong`` wrong answers certify the risk.
    """

    def is_enough(m: int) -> bool:
        return bool(binomial_tail(np.asarray(n_wrong), np.asarray(m), risk) <= delta)

    # For a fixed number of wrong answers the tail falls as m grows, so bisection is possible.
    fewest = max(n_right_needed(risk, delta), n_wrong + 1)
    return find_sufficient_number(is_enough, first_tried=fewest)


def find_sufficient_number(is_enough: Callable[[int], bool], first_tried: int) -> int | None:
    """Find a number m such that m is enough and m - 1 is not. None if m would be above 2^40.

    The search begins at ``first_tried``, doubles the number until the number is enough, and then
    bisects.
    """
    high = first_tried
    while not is_enough(high):
        high *= 2
        if high > MAX_SEARCHED_ROWS:
            return None
    # If the number was ever doubled, ``low`` is the last number that was not enough. Otherwise half
    # of ``first_tried`` is taken as not enough, without a test.
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        if is_enough(middle):
            high = middle
        else:
            low = middle
    return high


START_SHARES = ((1 / 16, 0.3), (1 / 4, 0.7))
"""For each sequence: share of rows at the start, and the share of the level.

The level is the part of delta that the sequence at all rows does not use
(``LARGEST_SHARE_AT_ALL_ROWS``).
"""

LARGEST_SHARE_AT_ALL_ROWS = 1 / 4
"""Largest share of delta for the sequence that starts at all rows."""

LARGEST_START_QUOTIENT = 2 / 3
"""Two sequences are merged if the quotient of the starts is above this number.

The starts are row counts, and the earlier start is divided by the later start. A merged sequence
starts at the later start, with the levels of both sequences.
"""

FLOOR_ROW_SHARES = (1 / 32, 1 / 16, 1 / 8, 1 / 4)
"""Shares of rows that a floor leaves for review. These are the most trusted rows.

A floor helps if these rows are wrong so often that no threshold without a floor is certified.
"""

FLOOR_LEVEL_SHARE = 0.01
"""Share of delta for the tests above each floor."""


class FloorPlan(NamedTuple):
    """Which floors are tested, and how.

    Attributes:
        min_rows: Smallest row count with this plan.
        row_shares: Shares of rows that the floors leave for review.
        level_share: Share of delta for the tests above each floor.
        start_shares: Starts and shares of the level, as in ``START_SHARES``, for the sequences
            above a floor.
    """

    min_rows: int
    row_shares: tuple[float, ...]
    level_share: float
    start_shares: StartShares


FLOOR_PLANS = (
    FloorPlan(500, FLOOR_ROW_SHARES, FLOOR_LEVEL_SHARE, ((1 / 4, 0.5), (1 / 2, 0.5))),
    FloorPlan(300, (1 / 8, 1 / 4), 0.05, ((2 / 3, 1.0),)),
    FloorPlan(0, (), 0.0, ()),
)
"""The plans, from many rows to few. The first one whose floors all have enough rows above is taken.

With few rows, a small level would certify nothing above a floor. So a floor has 0.05 delta there,
and one sequence. With fewer than 300 rows, one or two wrong answers among the most trusted rows may
be chance, so thresholds without a floor get all of delta.
"""

NO_FLOOR = -1
"""Index in place of a floor if there is no floor. All scores from the next index, 0, are tested."""

BLOCK_SIZE = 2**14
"""Number of p-values per computation block."""


class Threshold(FrozenModel):
    """Interval of accepted uncertainties, floor < u <= threshold, with the evidence.

    Attributes:
        threshold: Accept where the uncertainty is at most this number. None: accept nothing.
        n: Number of calibration rows.
        n_accepted: Number of accepted calibration rows.
        n_wrong: Number of wrong rows among the accepted calibration rows.
        risk_bound: The guaranteed bound on the risk. None where nothing is accepted.
        why: Why nothing is accepted. None if something is accepted.
        n_needed: Smallest number of calibration rows to certify anything. None if there are enough
            rows, or if no number of rows is enough. More rows than ``n_needed`` may be needed,
            depending on how many rows are accepted and right.
        floor: Review where the uncertainty is at most this number, because too many of the most
            trusted answers are wrong. None: no floor.
    """

    threshold: float | None
    n: int = Field(ge=0)
    n_accepted: int = Field(ge=0)
    n_wrong: int = Field(ge=0)
    risk_bound: float | None
    why: str | None = None
    n_needed: int | None = None
    floor: float | None = None

    @classmethod
    def at(
        cls, counts: TieCounts, index: int, risk_bound: float, floor_index: int = NO_FLOOR
    ) -> Self:
        """Make the threshold for accepting the scores with the indices floor_index + 1 to index.

        The indices are indices into ``counts.value``. ``floor_index`` is the index for the largest
        score below the interval, or ``NO_FLOOR``.
        """
        interval = slice(floor_index + 1, index + 1)
        floor_score = None if floor_index == NO_FLOOR else float(counts.value[floor_index])
        return cls(
            threshold=float(counts.value[index]),
            n=int(counts.n),
            n_accepted=int(counts.size[interval].sum()),
            n_wrong=int(counts.wrong[interval].sum()),
            risk_bound=risk_bound,
            floor=floor_score,
        )

    @classmethod
    def accepting_nothing(cls, n: int, why: str, n_needed: int | None = None) -> Self:
        """Make a threshold without accepted rows, for n calibration rows."""
        return cls(
            threshold=None,
            n=n,
            n_accepted=0,
            n_wrong=0,
            risk_bound=None,
            why=why,
            n_needed=n_needed,
        )

    @property
    def coverage(self) -> float:
        """Share of accepted rows among the calibration rows."""
        if not self.n:
            return 0.0
        return self.n_accepted / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """Numbers (a, b): uncertainties u with a < u <= b are accepted.

        Both numbers are -inf where nothing is accepted.
        """
        if self.threshold is None:
            return -math.inf, -math.inf
        if self.floor is None:
            return -math.inf, self.threshold
        return self.floor, self.threshold

    def __str__(self) -> str:
        if self.threshold is None:
            return f"accepts nothing: {self.why}"
        above_floor = "" if self.floor is None else f"{self.floor:.6g} < "
        return (
            f"{above_floor}uncertainty <= {self.threshold:.6g} accepts {self.coverage:.1%} "
            f"({self.n_wrong} wrong of {self.n_accepted} accepted, of {self.n})"
        )


def learn_then_test(counts: TieCounts, max_risk: float, delta: float) -> Threshold | None:
    """Return the certified interval that accepts most rows, or None if none is certified.

    The probability is at least 1 - delta that the error rate in the interval is at most max_risk.

    **Test of a single threshold.** Let R(t) be the error rate among answers with a score up to t.
    Of the m_t calibration rows with a score up to t, k_t rows are wrong. The hypothesis H_t,
    "R(t) > max_risk", is rejected at level a if

        P[Bin(m_t, max_risk) <= k_t] <= a.

    **Fixed sequences.** A sequence tests thresholds from strict to lax, all at the same level,
    until an H_t is not rejected. R need not be monotone. A sequence must start where enough rows
    are accepted for a rejection to be possible. A single unlucky wrong answer near the start ends
    the sequence. Therefore there are three sequences, with starts near 1/16 of the rows, near 1/4
    of the rows, and at all rows. If a sequence reaches the next sequence's start, the next
    sequence's level grows by the earlier sequence's level (Wiens' fallback procedure). If there
    are few rows, a single sequence has all of delta.

    **Exact starts.** A binomial tail has steps: a level between two steps rejects no more than the
    lower step does. So a sequence starts at a row count where one more wrong answer has just become
    admissible. There the test uses nearly all of the level. The sequence at all rows has as its
    level the largest tail value up to delta / 4. This sequence is left out if the test would admit
    no wrong answer.

    **Floors.** All sequences fail if many of the most trusted answers are wrong. So intervals of
    scores above a floor l and up to t are tested in the same way. With 300 rows or more, floors lie
    at 1/8 and 1/4 of the rows, with a level of 0.05 delta each. With 500 rows or more, they lie at
    1/32, 1/16, 1/8 and 1/4, with 0.01 delta each. Floors are left out if the first sequence above
    them has too few rows for a rejection. At 5 % and delta = 0.05 there are two floors from 300
    rows on, and four from 870 rows on. At 1 % it is 1,196 and 4,411 rows.

    **Proof for scores without ties.** (Scores with ties are simulated in the tests.)

    1. All starts are ranks of scores. So the starts do not depend on the wrong answers.
    2. A bad range is an interval of t with R(t) > max_risk. At both ends R(t) = max_risk.
    3. Condition on the number of rows in every range. Then Bin(m, max_risk) of the m rows before a
       bad range are wrong. The row counts also determine in which bad range, and at which level, a
       sequence meets its first true H_t.
    4. To enter this range, the sequence must reject the last H_t before the range. By step 3 the
       probability of this rejection is at most the level.
    5. If the sequence starts inside a bad range, the first threshold t is the score of a row chosen
       by rank. So this row is no random draw. Given t, the number of wrong answers among the
       remaining m - 1 rows is at least Bin(m - 1, max_risk) in distribution. So these m - 1 rows
       are tested first, and then all m rows. If only the first test rejects, the threshold just
       before t is certified, because many rows may share the score t, and all of these rows may be
       wrong.
    6. A level is passed on only if the sequence has met no true H_t. So the levels at which
       true hypotheses are met add up to at most delta.
    7. Given a floor, the rows above the floor are independent draws. The floors share delta (union
       bound).

    Alternative starts and floors are compared in ``benchmarks/thresholds.py``.

    Sources: Angelopoulos et al., Learn then Test (2021), Sec. 2. Wiens, A fixed sequence Bonferroni
    procedure (2003).

    Examples:
        >>> from vilu.calibration.thresholds import learn_then_test
        >>> from vilu.metrics.counts import tie_counts
        >>> counts = tie_counts([1, 2, 3, 4, 5, 6, 7, 8], [0, 0, 0, 0, 0, 0, 1, 1])
        >>> # There is one sequence, at the level 0.1. It starts at the fifth row, because four
        >>> # right answers are needed: (1/2)^4 = 0.06. With seven rows, one of them wrong, the tail
        >>> # is (1 + 7) / 2^7 = 0.06. With eight rows it is (1 + 8 + 28) / 2^8 = 0.14.
        >>> print(learn_then_test(counts, max_risk=0.5, delta=0.1))
        uncertainty <= 7 accepts 87.5% (1 wrong of 7 accepted, of 8)
    """
    plan, floor_indices = _floors(counts.accepted, max_risk, delta)
    # The interval with most accepted rows is chosen after all tests. So the tests share delta
    # (union bound). If each test had all of delta, the guarantee would be broken too often.
    level_without_floor = delta * (1 - plan.level_share * len(floor_indices))
    best_threshold = _fallback_procedure(
        counts,
        floor_index=NO_FLOOR,
        start_shares=START_SHARES,
        share_at_all_rows=LARGEST_SHARE_AT_ALL_ROWS,
        max_risk=max_risk,
        delta=level_without_floor,
    )
    for floor_index in floor_indices:
        threshold_above_floor = _fallback_procedure(
            counts,
            floor_index=floor_index,
            start_shares=plan.start_shares,
            share_at_all_rows=0.0,
            max_risk=max_risk,
            delta=delta * plan.level_share,
        )
        if threshold_above_floor is None:
            continue
        if best_threshold is None or threshold_above_floor.n_accepted > best_threshold.n_accepted:
            best_threshold = threshold_above_floor
    return best_threshold


def _floors(n_accepted: Ints, max_risk: float, delta: float) -> tuple[FloorPlan, list[int]]:
    """Return the plan for these rows, and the indices of the floors."""
    n = int(n_accepted[-1])
    plan = next(plan for plan in FLOOR_PLANS if _has_enough_rows(plan, n, max_risk, delta))
    # Floors are chosen by rank. If the wrong answers decided where a floor lies, the rows above the
    # floor would not be independent draws.
    ranks = [_rank_of_floor(n, share) for share in plan.row_shares]
    floor_indices = np.searchsorted(n_accepted, ranks)
    return plan, floor_indices.tolist()


def _rank_of_floor(n: int, share: float) -> int:
    """Return how many of n rows a floor leaves for review, without ties."""
    return math.ceil(n * share)


def _has_enough_rows(plan: FloorPlan, n: int, max_risk: float, delta: float) -> bool:
    """Return whether a rejection is possible above every floor, at the first start."""
    if n < plan.min_rows:
        return False
    for share in plan.row_shares:
        start_share, level_share = plan.start_shares[0]
        level = delta * plan.level_share * level_share
        n_at_start = (n - _rank_of_floor(n, share)) * start_share
        if n_at_start < n_right_needed(max_risk, level) + 1:
            return False
    return True


def _count_above_floor(cumulated_counts: Ints, floor_index: int) -> Ints:
    """Return the cumulated row counts above a floor, for each score above the floor.

    ``cumulated_counts`` (G,) holds the cumulated counts for all rows. ``floor_index`` is an index
    into ``cumulated_counts``.
    """
    if floor_index == NO_FLOOR:
        return cumulated_counts
    above_floor: Ints = cumulated_counts[floor_index + 1 :] - cumulated_counts[floor_index]
    return above_floor


def _fallback_procedure(
    counts: TieCounts,
    *,
    floor_index: int,
    start_shares: StartShares,
    share_at_all_rows: float,
    max_risk: float,
    delta: float,
) -> Threshold | None:
    """Return the laxest threshold above a floor, certified by Wiens' fallback procedure.

    ``floor_index`` is a score's index in ``counts``, or ``NO_FLOOR``. ``start_shares`` and
    ``share_at_all_rows`` are passed to ``sequence_starts``.
    """
    n_accepted = _count_above_floor(counts.accepted, floor_index)
    n_wrong = _count_above_floor(counts.accepted_wrong, floor_index)
    first_index = floor_index + 1  # index of the first score above the floor
    is_all_wrong = (counts.size == counts.wrong)[first_index:]  # for each score above the floor
    levels = _level_at_start(n_accepted, start_shares, share_at_all_rows, max_risk, delta)
    carried_level = 0.0
    laxest_index = None
    for start, end in pairwise([*sorted(levels), len(n_accepted)]):
        level = carried_level + levels[start]
        # One row, the row at the first threshold, determines where the sequence starts. So this row
        # is no random draw, and the binomial law holds for the remaining rows only. If several rows
        # have the same score, the left-out row is taken as right, unless all of them are wrong.
        n_remaining = n_accepted[start] - 1
        n_wrong_of_remaining = n_wrong[start] - is_all_wrong[start]
        first_not_rejected = start
        if binomial_tail(n_wrong_of_remaining, n_remaining, max_risk) <= level:
            first_not_rejected = _first_not_rejected(
                n_wrong, n_accepted, max_risk, level, start, end
            )
            # If all rows together do not reject H_t at the start, the threshold before t is
            # certified: many rows may have the score t, and all of these rows may be wrong.
            laxest_index = first_not_rejected - 1
        # The level is carried on only if all hypotheses were rejected. A hypothesis that is not
        # rejected may be true, and then the test has used up the level (Wiens 2003).
        are_all_rejected = first_not_rejected == end
        carried_level = level if are_all_rejected else 0.0
    if laxest_index is None:
        return None
    return Threshold.at(counts, first_index + laxest_index, max_risk, floor_index)


def _level_at_start(
    n_accepted: Ints,
    start_shares: StartShares,
    share_at_all_rows: float,
    max_risk: float,
    delta: float,
) -> dict[int, float]:
    """Map each sequence's start, an index in ``n_accepted``, to the sequence's level.

    ``n_accepted`` (G,) is the number of accepted rows with each score as the threshold.
    """
    n = int(n_accepted[-1]) if len(n_accepted) else 0
    levels: dict[int, float] = {}
    for sequence_start in sequence_starts(n, start_shares, share_at_all_rows, max_risk, delta):
        index = _index_of_start(n_accepted, sequence_start)
        # two sequences with the same start become a single sequence with both levels
        levels[index] = levels.get(index, 0.0) + sequence_start.level
    return levels


def _index_of_start(n_accepted: Ints, sequence_start: SequenceStart) -> int:
    """Return the index in ``n_accepted`` for a sequence's start.

    If rows have equal scores, perhaps no index accepts exactly the best number of rows for a start.
    Then the sequence starts at the index with the nearest number.
    """
    # A start depends on row counts only. A start where the answers happen to be right would be the
    # best of many tests, but the level allows for a single test.
    best_n_rows = sequence_start.best_n_rows
    index = int(np.searchsorted(n_accepted, best_n_rows))  # the first with at least best_n_rows
    if index == 0:
        return index
    n_before = n_accepted[index - 1]
    has_enough_rows = n_before >= sequence_start.min_n_rows
    n_missing = best_n_rows - n_before
    n_surplus = n_accepted[index] - best_n_rows
    if has_enough_rows and n_missing < n_surplus:
        return index - 1
    return index


def _first_not_rejected(
    n_wrong: Ints, n_accepted: Ints, max_risk: float, level: float, start: int, end: int
) -> int:
    """Return the first index from ``start`` on that is not rejected, or ``end`` if there is none.

    A sequence stops at this index even if later hypotheses could be rejected. If the hypothesis at
    this index is true, the test has used up the level.
    """
    for block_start in range(start, end, BLOCK_SIZE):
        block = slice(block_start, min(block_start + BLOCK_SIZE, end))
        tail = binomial_tail(n_wrong[block], n_accepted[block], max_risk)
        positions_not_rejected = np.flatnonzero(tail > level)
        if len(positions_not_rejected):
            return block_start + int(positions_not_rejected[0])
    return end


class SequenceStart(NamedTuple):
    """Number of accepted rows for the first threshold in a fixed sequence, and the level."""

    min_n_rows: int  # smallest number of rows for a possible rejection
    best_n_rows: int  # number of rows where one more wrong answer has just become admissible
    level: float  # level for all tests in the sequence


@lru_cache
def sequence_starts(
    n: int, start_shares: StartShares, share_at_all_rows: float, max_risk: float, delta: float
) -> tuple[SequenceStart, ...]:
    """Return the starts of the sequences in n rows: first the start at all rows.

    The sequence at all rows gets at most the share ``share_at_all_rows`` of the level ``delta``.
    The other sequences share the rest as in ``start_shares``. Sequences without any possible
    rejection are left out.
    """
    sequences: list[SequenceStart] = []
    level_left = delta
    start_at_all_rows = _start_at_all_rows(n, max_risk, share_at_all_rows * delta)
    if start_at_all_rows is not None:
        sequences.append(start_at_all_rows)
        level_left = delta - start_at_all_rows.level
    carried_level = 0.0
    no_start = (0.0, 0.0)  # follows the last start
    for start, next_start in pairwise([*start_shares, no_start]):
        row_share, level_share = start
        next_row_share, next_level_share = next_start
        level = carried_level + level_left * level_share
        # A start's last row is no random draw. So a start has one row more than the first test has
        # trials.
        n_trials_planned = math.ceil(n * row_share) - 1
        n_trials_needed = n_right_needed(max_risk, level)
        merged_level = level + level_left * next_level_share
        n_trials_needed_next = n_right_needed(max_risk, merged_level)
        n_rows_of_next = max(math.ceil(n * next_row_share), n_trials_needed_next + 1)
        has_next = next_start != no_start
        has_too_few_trials = n_trials_planned < n_trials_needed
        is_near_next = n_trials_needed + 1 > LARGEST_START_QUOTIENT * n_rows_of_next
        if has_next and has_too_few_trials and is_near_next:
            # A merged sequence with both levels certifies more than two sequences with close
            # starts.
            carried_level = level
            continue
        carried_level = 0.0
        n_trials = max(n_trials_planned, n_trials_needed)
        if n_trials < n:
            sequences.append(_exact_start(n, n_trials, max_risk, level))
    return tuple(sequences)


def _start_at_all_rows(n: int, max_risk: float, largest_level: float) -> SequenceStart | None:
    """Return the start for the sequence at all n rows, or None if no wrong answer is admissible."""
    # The row at the start is no random draw, so n - 1 trials are left.
    n_wrong = n_admissible_wrong(n - 1, max_risk, largest_level)
    if n_wrong <= 0:
        return None
    # The tail has steps. A level above the step at ``n_wrong`` would not reject more. So the step
    # is the level, and the rest of ``largest_level`` stays for the remaining sequences.
    level = float(binomial_tail(np.asarray(n_wrong), np.asarray(n - 1), max_risk))
    return SequenceStart(min_n_rows=n, best_n_rows=n, level=level)


def _exact_start(n: int, n_trials: int, max_risk: float, level: float) -> SequenceStart:
    """Return a sequence's start in n rows. The first test has at least ``n_trials`` trials."""
    # Where one more wrong answer has just become admissible, the test uses nearly all of the level.
    # With fewer trials the level between two tail steps would be unused.
    one_more_wrong = n_admissible_wrong(n_trials - 1, max_risk, level) + 1
    best_n_trials = n_accepted_needed(one_more_wrong, max_risk, level) or n_trials
    best_n_rows = min(best_n_trials + 1, n)
    return SequenceStart(min_n_rows=n_trials + 1, best_n_rows=best_n_rows, level=level)


def n_admissible_wrong(n: int, max_risk: float, level: float) -> int:
    """Return the largest k with P[Bin(n, max_risk) <= k] <= level, or -1 if there is no such k.

    k is a number of wrong answers.

    Examples:
        >>> from vilu.calibration.thresholds import n_admissible_wrong
        >>> n_admissible_wrong(3, max_risk=0.5, level=0.4)  # the tails are 1/8, 4/8 and 7/8
        0
    """

    def tail_of(n_wrong: int) -> float:
        return float(binomial_tail(np.asarray(n_wrong), np.asarray(n), max_risk))

    # The tail rises with k, from k = 0. So the number of tails up to the level, minus 1, is the
    # largest such k.
    return bisect_right(range(n), level, key=tail_of) - 1


def conformal_risk_control(
    counts: TieCounts,
    max_risk: float,
    delta: float,  # noqa: ARG001 - unused: all procedures have the same parameters
) -> Threshold | None:
    """Return the laxest threshold that bounds a mean risk, or None if there is none.

    Of n calibration rows, k_t are wrong with a score up to t. The laxest t is returned with
    (k_t + 1) / (n + 1) <= max_risk. The guarantee is

        E[share of accepted wrong answers among all answers] <= max_risk.

    Conformal risk control needs a risk that is monotone in t. This share is monotone, but the error
    rate among accepted answers is not. The mean is over draws of calibration rows, so there is no
    delta.

    Source: Angelopoulos et al., Conformal Risk Control (2022), Eq. 4, with a loss of 0 or 1.

    Examples:
        >>> from vilu.calibration.thresholds import conformal_risk_control
        >>> from vilu.metrics.counts import tie_counts
        >>> counts = tie_counts([1, 2, 3, 4, 5, 6, 7, 8, 9], [0, 0, 1, 0, 0, 1, 0, 0, 1])
        >>> # up to the score 5, (1 + 1) / (9 + 1) = 0.2. From 6 on, (2 + 1) / (9 + 1) = 0.3
        >>> conformal_risk_control(counts, max_risk=0.2, delta=0.05).threshold
        5.0
    """
    # The new row is counted as accepted and wrong. With k / n, without the new row, the mean over
    # draws could exceed max_risk by up to 1 / (n + 1).
    joint_risk = (counts.accepted_wrong + 1) / (counts.n + 1)
    # The joint risk never falls as t grows. So the scores with a small enough risk come first.
    n_valid = int(np.count_nonzero(joint_risk <= max_risk))
    if n_valid == 0:
        return None
    return Threshold.at(counts, n_valid - 1, max_risk)


def coverage_first(counts: TieCounts, min_coverage: float, delta: float) -> Threshold | None:
    """Return the strictest threshold t with a coverage of at least ``min_coverage``, or None.

    t is the smallest score where the lower Clopper-Pearson bound on the acceptance rate reaches
    ``min_coverage``. The result also bounds R(t), the error rate among answers with a score up to
    t. Coverage and bound hold together with probability >= 1 - delta, at a level of delta / 2 each.
    Without ties the rank of t depends on n only and not on wrong answers. So R(t) is bounded by a
    test on a single threshold. Given t, the row at t is not random, and so is no trial. But all
    wrong answers up to t are counted.

    With ties there is no proof. Which score is t then depends on how many rows have each score, and
    so does the number of wrong answers. In a simulated world with four scores, coverage or bound
    was broken in 6.4 % of the draws at delta = 5 %, the bound alone in about 4 %.

    Examples:
        >>> from vilu.calibration.thresholds import coverage_first
        >>> from vilu.metrics.counts import tie_counts
        >>> counts = tie_counts([1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [0] * 10)
        >>> # The lower bounds for 8 and 9 of 10 rows are 0.49 and 0.61.
        >>> threshold = coverage_first(counts, min_coverage=0.5, delta=0.1)
        >>> threshold.threshold, round(threshold.risk_bound, 4)  # 8 trials: 1 - 0.05^(1/8)
        (9.0, 0.3123)
    """
    n = int(counts.n)

    def coverage_bound(n_accepted: Ints) -> float:
        return lower_bound(int(n_accepted), n, delta / 2)

    index = bisect_left(counts.accepted, min_coverage, key=coverage_bound)
    if index == len(counts.accepted):
        return None
    n_wrong = int(counts.accepted_wrong[index])
    # The row at t was chosen by rank. Counted as a trial, this row would make the bound too small.
    n_trials = int(counts.accepted[index]) - 1
    n_wrong_trials = min(n_wrong, n_trials)  # all trials and the row at t may be wrong
    # Coverage and risk take half of delta each. If each bound had all of delta, the probability of
    # a false bound could exceed delta (union bound).
    risk_bound = upper_bound(n_wrong_trials, n_trials, delta / 2)
    return Threshold.at(counts, index, risk_bound)


PROCEDURES: dict[str, Callable[[TieCounts, float, float], Threshold | None]] = {
    "ltt": learn_then_test,
    "crc": conformal_risk_control,
}
"""Procedures for finding a threshold for a maximal risk, by method name."""


def n_rows_for_mean_risk(max_risk: float) -> int:
    """Return the smallest number n of rows with 1 / (n + 1) <= max_risk."""
    # Rounded to nine decimals first: in float64 a whole number may come out a little larger.
    return math.ceil(round(1 / max_risk, 9)) - 1


def n_rows_for_coverage(min_coverage: float, delta: float) -> int:
    """Return the smallest number n of rows with min_coverage^n <= delta / 2.

    If all n rows are accepted, the coverage is at least ``min_coverage`` with confidence
    1 - delta / 2.
    """
    quotient = math.log(delta / 2) / math.log(min_coverage)
    return math.ceil(quotient - 1e-9)  # with the tolerance of ``n_right_needed``
