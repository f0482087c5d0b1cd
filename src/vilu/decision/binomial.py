"""Exact binomial tails: what some wrong answers among some accepted ones say about the error rate behind them.

m answers are accepted, k of them are wrong, r is the error rate of all answers that would be accepted. Given m, k is
binomial, so nothing here is asymptotic.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import special

from vilu.metrics.counts import Floats, Ints

MAX_ROWS = 2**40


def tail(wrong: Ints, accepted: Ints, risk: float) -> Floats:
    """(...) P[Bin(m, risk) <= k]: the p-value of "the error rate is above ``risk``"; 1 where nothing is accepted."""
    # the regularised incomplete beta function is the tail, and takes whole arrays
    inside = wrong < accepted
    found = special.betainc(np.where(inside, accepted - wrong, 1), np.where(inside, wrong + 1, 1), 1 - risk)
    return np.where(inside, found, 1.0)


def upper_bound(wrong: int, accepted: int, delta: float) -> float:
    """Clopper-Pearson bound b, P[Bin(m, b) <= k] = delta: the error rate is below it with confidence 1 - delta."""
    return float(special.betaincinv(wrong + 1, accepted - wrong, 1 - delta)) if wrong < accepted else 1.0


def lower_bound(hits: int, n: int, delta: float) -> float:
    """Clopper-Pearson bound from below, P[Bin(n, b) >= k] = delta."""
    return float(special.betaincinv(hits, n - hits + 1, delta)) if hits else 0.0


def rows_without_error(risk: float, delta: float) -> int:
    """Smallest m with (1 - risk)^m <= delta: so many accepted answers, none of them wrong, certify the risk."""
    if risk >= 1:
        return 1
    # the tolerance: log(0.1) / log(0.9 ** k) must not be rounded past a whole number
    return max(math.ceil(math.log(delta) / math.log1p(-risk) - 1e-9), 1)


def rows_for_rate(rate: float, risk: float, delta: float) -> int | None:
    """About the smallest m such that m accepted answers, of which a share ``rate`` is wrong, mostly certify ``risk``.

    Mostly: with a standard deviation more of wrong answers than expected, rounded up. None where ``rate`` is not below
    ``risk``, or it would take more than 2^40 rows. The rounding makes the tail rise at some steps of m; bisection finds
    one m that is enough while m - 1 is not.
    """

    def enough(m: int) -> bool:
        wrong = np.asarray(min(math.ceil(rate * m + math.sqrt(rate * (1 - rate) * m)), m))
        return bool(tail(wrong, np.asarray(m), risk) <= delta)

    if rate >= risk:
        return None
    high = rows_without_error(risk, delta)
    while not enough(high):
        high *= 2
        if high > MAX_ROWS:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
