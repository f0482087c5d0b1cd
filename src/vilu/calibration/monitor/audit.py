"""The error rate of accepted answers whose labels have arrived, with bounds that hold at every moment together.

Wealth against "the error rate is at most r", whatever came before each answer:

    M(r) = P[theta <= r] + integral over theta > r of (theta/r)^k ((1 - theta)/(1 - r))^(m - k),
    theta ~ Beta(a, b)

of k wrong answers among m: a mixture of bets on larger rates; what lies below r is not bet. P(M
ever reaches 1/delta) is at most delta (Ville 1939), so one may look after every label. M falls in r
below k/m and is at most 1 above, so the rates with M(r) < 1/delta are those above one number: the
lower bound. Upper bounds are lower bounds of the rate of right answers (method of mixtures: Robbins
1970; confidence sequences: Howard et al., Annals of Statistics 2021).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy import optimize, special

from vilu.calibration.thresholds import first_enough
from vilu.metrics.counts import Floats, Ints

TestName = Literal["scores", "acceptance", "answers", "audit", "outside", "abstained"]
AuditVerdict = Literal["holds so far", "not enough audited answers", "broken"]
Prior = tuple[float, float]


def log_wealth(wrong: Ints, n: Ints, rate: float, prior: Prior) -> Floats:
    """(...) log M(rate) after ``wrong`` of ``n`` audited answers were wrong; ``rate`` in (0, 1)."""
    a, b = prior
    right = n - wrong
    # there may be no mass on one side of the rate, and what is small beside the other rounds to 0
    with np.errstate(divide="ignore", under="ignore"):
        above = np.log(special.betaincc(a + wrong, b + right, rate))
        below = np.log(special.betainc(a, b, rate))
        ratio = special.betaln(a + wrong, b + right) - special.betaln(a, b) + above
        ratio = ratio - wrong * math.log(rate) - right * math.log1p(-rate)
        found: Floats = np.logaddexp(ratio, below)
    return found


def lower_bound(wrong: int, n: int, delta: float, prior: Prior) -> float:
    """The rate is above it, at all times together, with confidence 1 - delta."""
    if not wrong:
        return 0.0

    def excess(rate: float) -> float:
        return float(log_wealth(np.asarray(wrong), np.asarray(n), rate, prior)) + math.log(delta)

    return float(optimize.brentq(excess, 1e-300, min(wrong / n, 1 - 2**-53), xtol=1e-14))


@dataclass(frozen=True)
class Audit:
    """Audited answers, and what they say of the promised error rate."""

    promise: float  # the largest error rate that was promised, in (0, 1)
    delta: float  # of each bound
    n: int = 0  # audited answers
    wrong: int = 0  # how many of them are wrong

    @property
    def prior(self) -> Prior:
        """Beta(1, 1/promise - 1): its mean is the promise, and rates of that order get most of the bets."""
        return 1.0, 1 / self.promise - 1

    @property
    def lower(self) -> float:
        """Lower bound of the error rate."""
        return lower_bound(self.wrong, self.n, self.delta, self.prior)

    @property
    def upper(self) -> float:
        """Upper bound of the error rate."""
        return 1 - lower_bound(self.n - self.wrong, self.n, self.delta, self.prior[::-1])

    @property
    def verdict(self) -> AuditVerdict:
        """What the answers so far show."""
        # the wealth at the promise says on which side of it the bounds are, and costs no search
        enough = -math.log(self.delta)
        wrong = np.asarray(self.wrong)
        n = np.asarray(self.n)
        if log_wealth(wrong, n, self.promise, self.prior) >= enough:
            return "broken"
        kept = log_wealth(n - wrong, n, 1 - self.promise, self.prior[::-1]) >= enough
        return "holds so far" if kept else "not enough audited answers"

    def path(self, failure: Ints) -> Floats:
        """(B,) log M(promise) after each of the next audited answers, 1 = wrong.

        The promise is broken where it reaches log(1/delta), which is where the lower bound passes
        the promise.
        """
        n = self.n + np.arange(1, len(failure) + 1)
        return log_wealth(self.wrong + np.cumsum(failure), n, self.promise, self.prior)

    def more(self, failure: Ints) -> Audit:
        """With further audited answers (B,), 1 = wrong."""
        return replace(self, n=self.n + len(failure), wrong=self.wrong + int(failure.sum()))

    def n_needed(self) -> int | None:
        """About how many more audited answers would tell, if errors go on at the rate so far; None where none would.

        Before the first one: if none is wrong.
        """
        rate = self.wrong / self.n if self.n else 0.0
        if rate == self.promise:
            return None
        rounded: Callable[[float], int] = math.ceil if rate < self.promise else math.floor

        def tells(n: int) -> bool:
            return (
                Audit(self.promise, self.delta, n, rounded(rate * n)).verdict
                != "not enough audited answers"
            )

        if tells(self.n):
            return 0
        n = first_enough(tells, max(self.n, 1))
        return None if n is None else n - self.n
