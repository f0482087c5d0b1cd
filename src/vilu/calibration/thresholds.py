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

from vilu.artifacts.documents import Model
from vilu.metrics.counts import Floats, Ints, TieCounts

MAX_ROWS = 2**40

Starts = tuple[tuple[float, float], ...]


def tail(wrong: Ints, accepted: Ints, risk: float) -> Floats:
    """(...) P[Bin(m, risk) <= k]: the p-value of "the error rate is above ``risk``".

    1 where nothing is accepted.
    """
    from scipy import special  # half a second to import, which those who only score are spared

    # the regularised incomplete beta function is the tail, and takes whole arrays
    has_right = wrong < accepted
    # Exact, not normal: with few errors, where guarantees are made, the normal tail is too small.
    # Its arguments must be above 0: where no answer is right 1 stands in, and the tail is 1.
    right = np.where(has_right, accepted - wrong, 1)
    not_right = np.where(has_right, wrong + 1, 1)
    p = special.betainc(right, not_right, 1 - risk)
    return np.where(has_right, p, 1.0)


def upper_bound(wrong: float, accepted: float, delta: float) -> float:
    """Clopper-Pearson bound b, P[Bin(m, b) <= k] = delta.

    The error rate is below it with confidence 1 - delta.
    """
    from scipy import special

    if wrong >= accepted:
        return 1.0
    # Exact at every m, as the normal approximation is not: with no error among m that bound is 0.
    return float(special.betaincinv(wrong + 1, accepted - wrong, 1 - delta))


def lower_bound(hits: float, n: float, delta: float) -> float:
    """Clopper-Pearson bound from below, P[Bin(n, b) >= k] = delta."""
    from scipy import special

    if not hits:
        return 0.0
    return float(special.betaincinv(hits, n - hits + 1, delta))


def percent(share: float, decimals: int = 2, rounded: Callable[[float], int] = math.ceil) -> str:
    """A bound in per cent, never rounded to the side that would guarantee more.

    A small one has more decimals.
    """
    if share > 0:
        decimals_shown = 1 - math.floor(math.log10(100 * share))
        decimals = max(decimals, decimals_shown)
    unit = 10 ** (decimals + 2)
    # to six digits first: 0.07 * 10,000 is a little more than 700, and would be 7.01 %
    return f"{rounded(round(share * unit, 6)) / unit:.{decimals}%}"


def exactly(confidence: float) -> str:
    """A confidence in per cent: 99.9 % is not 100 %."""
    return f"{100 * confidence:.10g}%"


def rows_without_error(risk: float, delta: float) -> int:
    """Smallest m with (1 - risk)^m <= delta: so many answers, all right, certify the risk."""
    if risk >= 1:
        return 1
    # the tolerance: log(0.1) / log(0.9 ** k) must not be rounded past a whole number
    return max(math.ceil(math.log(delta) / math.log1p(-risk) - 1e-9), 1)


def accepted_needed(wrong: int, risk: float, delta: float) -> int | None:
    """Smallest m with P[Bin(m, risk) <= wrong] <= delta: of m answers ``wrong`` may be wrong."""

    def is_enough(m: int) -> bool:
        return bool(tail(np.asarray(wrong), np.asarray(m), risk) <= delta)

    # with ``wrong`` fixed the tail falls as m grows, so one bisection finds the first m
    return first_enough(is_enough, max(rows_without_error(risk, delta), wrong + 1))


def first_enough(is_enough: Callable[[int], bool], high: int) -> int | None:
    """By doubling ``high`` and bisection an m that is enough while m - 1 is not.

    None where it is above 2^40.
    """
    while not is_enough(high):
        high *= 2
        if high > MAX_ROWS:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        if is_enough(middle):
            high = middle
        else:
            low = middle
    return high


STARTS = ((1 / 16, 0.3), (1 / 4, 0.7))
"""Where fixed sequences begin, as shares of the rows, and their shares of the level.

That is of the level that ``WHOLE`` leaves.
"""

WHOLE = 1 / 4
"""At most this share of the level is for all rows at once."""

NEAR = 2 / 3
"""A sequence that cannot begin before this share of the next one's rows begins with the next."""

FLOORS = (1 / 32, 1 / 16, 1 / 8, 1 / 4)
"""Shares of the most trusted rows that may be left for review.

That is done where because of them no answer could be accepted.
"""

FLOOR_SHARE = 0.01
"""Share of delta of each floor."""

FLOOR_STARTS = ((1 / 4, 0.5), (1 / 2, 0.5))
"""As ``STARTS``, of the rows above a floor."""

FLOOR_ROWS = 500
"""Fewer rows have no floors: a mistake or two on top may be bad luck, and delta is scarce."""

BLOCK = 2**14
"""P-values that are computed together."""


class Threshold(Model):
    """What is accepted, uncertainties above a floor up to a threshold, and the evidence for it.

    Attributes:
        threshold: Accept where the uncertainty is at most this; None: accept nothing.
        n: Calibration rows.
        n_accepted: How many of them are accepted.
        n_wrong: How many of those are wrong.
        risk_bound: The bound that is guaranteed; None where nothing is accepted.
        why: Why nothing is accepted.
        n_needed: So many calibration rows are needed at least, where there are fewer; else None.
            How many would be enough depends on how many of them are accepted and right.
        floor: Review where the uncertainty is at most this, too: too many of the most trusted
            answers are wrong. None: no answer is too trusted.
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
    def at(cls, counts: TieCounts, index: int, risk_bound: float, floor: int = -1) -> Self:
        """Accept the scores after position ``floor`` up to ``index``, of the distinct ones."""
        inside = slice(floor + 1, index + 1)
        above = float(counts.value[floor]) if floor >= 0 else None
        return cls(
            threshold=float(counts.value[index]),
            n=int(counts.n),
            n_accepted=int(counts.size[inside].sum()),
            n_wrong=int(counts.wrong[inside].sum()),
            risk_bound=risk_bound,
            floor=above,
        )

    @classmethod
    def nothing(cls, n: int, why: str, n_needed: int | None = None) -> Self:
        """Accept none of n rows."""
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
        """Share of the calibration rows that is accepted."""
        if not self.n:
            return 0.0
        return self.n_accepted / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """Accepted are uncertainties above the first number up to the second.

        Both -inf where nothing is.
        """
        if self.threshold is None:
            return -math.inf, -math.inf
        if self.floor is None:
            return -math.inf, self.threshold
        return self.floor, self.threshold

    def __str__(self) -> str:
        if self.threshold is None:
            return f"accepts nothing: {self.why}"
        counted = f"{self.n_wrong} wrong of {self.n_accepted} accepted, of {self.n}"
        floor = "" if self.floor is None else f"{self.floor:.6g} < "
        accepts = f"{floor}uncertainty <= {self.threshold:.6g} accepts {self.coverage:.1%}"
        return f"{accepts} ({counted})"


def learn_then_test(counts: TieCounts, max_risk: float, delta: float) -> Threshold | None:
    """The certified interval of scores that accepts most: P[its risk <= max_risk] >= 1 - delta.

    H_t: R(t) > max_risk is rejected at level a where P[Bin(m_t, max_risk) <= k_t] <= a. From strict
    to lax every t is tested at the same level until one is not rejected; R need not be monotone. A
    sequence has to begin where enough is accepted for a rejection to be possible, and one unlucky
    wrong answer near the beginning ends it; so there are three beginnings, near 1/16 and 1/4 of the
    rows and at all of them, and a sequence that reaches the next one's beginning hands its level on
    (the fallback procedure). Binomial tails have steps, and no level is left between two: a
    sequence begins where one more wrong answer has just become admissible, and all rows take the
    largest level below 1/4 that their tail has, with a wrong answer at least. Few rows have one
    sequence, with all of delta.

    All of them fail where the most trusted answers hold many wrong ones. So from 500 rows on the
    same is done with what lies above a floor l (the error rate of l < u <= t is above max_risk), at
    1/32, 1/16, 1/8 and 1/4 of the rows, with 0.01 of delta each, where the rows above it are enough
    to begin.

    Why it holds, for scores without ties: places are ranks, so the scores alone decide on them. The
    ranges of t where R(t) > max_risk begin and end at R(t) = max_risk; so given how many rows lie
    in each, Bin(m, max_risk) of the m rows before a range are wrong, and these numbers say in which
    range a sequence meets its first true H_t, and its level there, which bounds the probability to
    reject the last H_t before the range, as the sequence must. Where it begins in a range, the row
    at t is no random one: of the m - 1 others, given t, Bin(m - 1, max_risk) are wrong, or more. So
    there these alone are tested, and to go on all m as well; what they show by themselves ends
    before t, for t may be a score that many rows have, all of them wrong. A level that was handed
    on has met none, so the levels that meet one add up to delta at most. Given a floor, the rows
    above it are independent draws; floors share delta. Scores with ties are simulated in the tests.
    Other places were tried: ``benchmarks/thresholds.py``.

    Source: Angelopoulos et al., Learn then Test (2021), Sec. 2; Wiens, A fixed sequence Bonferroni
    procedure (2003).
    """
    floors = _floors(counts.accepted, max_risk, delta)
    # The one that accepts most is picked after all were tested, so they share delta (union bound):
    # with all of delta for each, the pick would break its guarantee too often.
    main_level = delta * (1 - FLOOR_SHARE * len(floors))
    best = _fallback(counts, -1, STARTS, WHOLE, max_risk, main_level)
    for floor in floors:
        above = _fallback(counts, floor, FLOOR_STARTS, 0.0, max_risk, delta * FLOOR_SHARE)
        if above is None:
            continue
        if best is None or above.n_accepted > best.n_accepted:
            best = above
    return best


def _floors(accepted: Ints, max_risk: float, delta: float) -> list[int]:
    """Positions of the floors above which a sequence can begin where it is to."""
    n = int(accepted[-1])
    if n < FLOOR_ROWS:
        return []
    at, share = FLOOR_STARTS[0]
    rows = rows_without_error(max_risk, delta * FLOOR_SHARE * share) + 1
    floors = []
    # Places are ranks of scores. A floor that failures had chosen would take the wrong answers
    # below it away by choice, and the rows above it would be no independent draws.
    for floor_share in FLOORS:
        rank = math.ceil(n * floor_share)
        if (n - rank) * at >= rows:
            floors.append(int(np.searchsorted(accepted, rank)))
    return floors


def _above(cumulated: Ints, floor: int) -> Ints:
    """Sums up to each score above a floor."""
    if floor < 0:
        return cumulated
    above: Ints = cumulated[floor + 1 :] - cumulated[floor]
    return above


def _fallback(
    counts: TieCounts, floor: int, starts: Starts, whole: float, max_risk: float, delta: float
) -> Threshold | None:
    """The laxest t above a floor that the sequences certify."""
    accepted = _above(counts.accepted, floor)
    wrong = _above(counts.accepted_wrong, floor)
    is_all_wrong = counts.size == counts.wrong
    levels = _levels(accepted, starts, whole, max_risk, delta)
    carried = 0.0
    laxest = None
    for begin, end in pairwise([*sorted(levels), len(accepted)]):
        level = carried + levels[begin]
        # The row at the first t sets its place, so it is no random draw: with it as a trial the
        # binomial law would not hold. It is wrong if all rows of its score are.
        wrong_of_others = wrong[begin] - is_all_wrong[floor + 1 + begin]
        first_kept = begin
        if tail(wrong_of_others, accepted[begin] - 1, max_risk) <= level:
            first_kept = _first_kept(wrong, accepted, max_risk, level, begin, end)
            # Where all m rows do not reject H_t, what the others show ends before t: that score may
            # be one of many rows, all of them wrong.
            laxest = first_kept - 1
        # The next one gets the level only if no hypothesis was kept: a kept one may be true, and
        # then the level was at risk already (Wiens 2003).
        carried = level if first_kept == end else 0.0
    if laxest is None:
        return None
    return Threshold.at(counts, floor + 1 + laxest, max_risk, floor)


def _levels(
    accepted: Ints, starts: Starts, whole: float, max_risk: float, delta: float
) -> dict[int, float]:
    """Position at which each sequence begins, and its level; with ties the nearest one."""
    n = int(accepted[-1]) if len(accepted) else 0
    levels: dict[int, float] = {}
    for beginning in beginnings(n, starts, whole, max_risk, delta):
        # By numbers of rows, never by failures: a beginning where the answers happen to be right
        # would be a choice among many tests, and its own test allows for one.
        index = int(np.searchsorted(accepted, beginning.best))
        if index:
            n_before = accepted[index - 1]
            is_enough = beginning.fewest <= n_before
            is_nearer = beginning.best - n_before < accepted[index] - beginning.best
            if is_enough and is_nearer:
                index -= 1
        levels[index] = levels.get(index, 0.0) + beginning.level
    return levels


def _first_kept(
    wrong: Ints, accepted: Ints, max_risk: float, level: float, begin: int, end: int
) -> int:
    """First position from ``begin`` on whose hypothesis is not rejected; ``end`` where all are."""
    # The sequence ends there, even if later ones would be rejected: to jump over a true H_t
    # would test the next one with a level that is spent.
    for start in range(begin, end, BLOCK):
        block = slice(start, min(start + BLOCK, end))
        not_rejected = np.flatnonzero(tail(wrong[block], accepted[block], max_risk) > level)
        if len(not_rejected):
            return start + int(not_rejected[0])
    return end


class Beginning(NamedTuple):
    """Where a fixed sequence begins."""

    fewest: int  # rows accepted there, at least
    best: int  # rows where one more wrong answer has just become admissible; without ties so many
    level: float


@lru_cache
def beginnings(
    n: int, starts: Starts, whole: float, max_risk: float, delta: float
) -> tuple[Beginning, ...]:
    """Where the sequences of n rows begin, those of ``starts`` after the one of all rows.

    None where no rejection is possible. Each has one row more than its test, since the last row is
    not a random one.
    """
    sequences: list[Beginning] = []
    left = delta
    wrong = admissible(n - 1, max_risk, whole * delta)
    if wrong > 0:
        # Tails have steps: level between two of them would reject nothing, and is left to the rest.
        level = float(tail(np.asarray(wrong), np.asarray(n - 1), max_risk))
        sequences.append(Beginning(n, n, level))
        left = delta - level
    carried = 0.0
    for (at, share), (next_at, next_share) in pairwise([*starts, (0.0, 0.0)]):
        level = carried + left * share
        place = math.ceil(n * at) - 1
        fewest = rows_without_error(max_risk, level)
        fewest_next = rows_without_error(max_risk, level + left * next_share)
        next_rows = max(math.ceil(n * next_at), fewest_next + 1)
        is_late = place < fewest and fewest + 1 > NEAR * next_rows
        if next_at > 0 and is_late:
            # One sequence with both levels certifies more than two that begin at nearly one place.
            carried = level
            continue
        least = max(place, fewest)
        # Where one more wrong answer has just become admissible, the test uses nearly all of its
        # level. With fewer rows it would lose what lies between two steps of the tail.
        best = accepted_needed(admissible(least - 1, max_risk, level) + 1, max_risk, level)
        carried = 0.0
        if least < n:
            sequences.append(Beginning(least + 1, min((best or least) + 1, n), level))
    return tuple(sequences)


def admissible(rows: int, max_risk: float, level: float) -> int:
    """Largest k with P[Bin(rows, max_risk) <= k] <= level; -1 where there is none."""

    def tail_of(wrong: int) -> float:
        return float(tail(np.asarray(wrong), np.asarray(rows), max_risk))

    return bisect_right(range(rows), level, key=tail_of) - 1


def conformal_risk_control(
    counts: TieCounts,
    max_risk: float,
    delta: float,  # noqa: ARG001 - as of the other procedures
) -> Threshold | None:
    """The loosest t with (k_t + 1) / (n + 1) <= max_risk, a bound on a mean.

    E[share of all answers that is accepted and wrong] <= max_risk. The joint risk is monotone in t,
    as conformal risk control needs; the selective risk is not. The guarantee is about the mean over
    calibration draws: there is no delta.

    Source: Angelopoulos et al., Conformal Risk Control (2022), Eq. 4, with a loss of 0 or 1.
    """
    # The new row counts as one more, accepted and wrong: with k / n, in which it has no part, the
    # mean over draws would exceed max_risk by up to 1 / (n + 1).
    joint = (counts.accepted_wrong + 1) / (counts.n + 1)
    inside = int(np.count_nonzero(joint <= max_risk))
    if not inside:
        return None
    return Threshold.at(counts, inside - 1, max_risk)


def coverage_first(counts: TieCounts, min_coverage: float, delta: float) -> Threshold | None:
    """The strictest t that accepts at least ``min_coverage`` of all answers, with a bound on R(t).

    Both hold together with probability >= 1 - delta, each with half of it. t is the first score
    below which so many rows lie that the Clopper-Pearson bound of the acceptance rate from below
    reaches the target. How many that is depends on n alone, so no wrong answer has a say in the
    choice, and the bound of the risk at t is that of a single threshold (of scores without ties;
    those are simulated in the tests). It counts the row at t as wrong if any is, but not as a
    trial: given t, only the others are random.
    """
    n = int(counts.n)

    def coverage_bound(n_accepted: Ints) -> float:
        return lower_bound(int(n_accepted), n, delta / 2)

    index = bisect_left(counts.accepted, min_coverage, key=coverage_bound)
    if index == len(counts.accepted):
        return None
    wrong = int(counts.accepted_wrong[index])
    # The row at t was chosen by its rank: as a trial it would make the bound too sharp.
    trials = int(counts.accepted[index]) - 1
    # Two statements, each with half of delta: with all of it each, one of them would be false too
    # often (union bound).
    return Threshold.at(counts, index, upper_bound(min(wrong, trials), trials, delta / 2))


PROCEDURES: dict[str, Callable[[TieCounts, float, float], Threshold | None]] = {
    "ltt": learn_then_test,
    "crc": conformal_risk_control,
}
"""Thresholds for a maximal risk, by name."""


def rows_for_mean(max_risk: float) -> int:
    """Fewest n with 1 / (n + 1) <= max_risk."""
    return math.ceil(round(1 / max_risk, 9)) - 1


def rows_for_coverage(min_coverage: float, delta: float) -> int:
    """Fewest rows n with min_coverage^n <= delta / 2.

    With all of them accepted, so large a share of all answers is.
    """
    return math.ceil(math.log(delta / 2) / math.log(min_coverage) - 1e-9)
