"""The error rate of accepted answers whose labels have arrived, with bounds valid at any time.

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

TestName = Literal["scores", "acceptance", "answers", "audit", "outside", "review"]
AuditVerdict = Literal["holds so far", "not enough audited answers", "broken"]
Prior = tuple[float, float]


def log_wealth(wrong: Ints, n: Ints, rate: float, prior: Prior) -> Floats:
    """(...) log M(rate) after ``wrong`` of ``n`` audited answers were wrong; ``rate`` in (0, 1)."""
    a, b = prior
    right = n - wrong
    # Only theta above the rate is bet on: a bet on a smaller one gains on average where the true
    # rate is below the rate, and M would reject "at most the rate" although it is true.
    # There may be no mass on one side of the rate, and what is small beside the other rounds to 0.
    with np.errstate(divide="ignore", under="ignore"):
        above = np.log(special.betaincc(a + wrong, b + right, rate))
        below = np.log(special.betainc(a, b, rate))
        ratio = special.betaln(a + wrong, b + right) - special.betaln(a, b) + above
        ratio = ratio - wrong * math.log(rate) - right * math.log1p(-rate)
        wealth: Floats = np.logaddexp(ratio, below)
    return wealth


def lower_bound(wrong: int, n: int, delta: float, prior: Prior) -> float:
    """The rate is above it, at all times together, with confidence 1 - delta."""
    if not wrong:
        return 0.0

    def excess(rate: float) -> float:
        return float(log_wealth(np.asarray(wrong), np.asarray(n), rate, prior)) + math.log(delta)

    # M falls in the rate below k / n and is at most 1 above it, so it crosses 1 / delta once.
    return float(optimize.brentq(excess, 1e-300, min(wrong / n, 1 - 2**-53), xtol=1e-14))


@dataclass(frozen=True)
class Audit:
    """Audited answers, and what they say of the guaranteed error rate."""

    limit: float  # the error rate that is guaranteed not to be exceeded, in (0, 1)
    delta: float  # of each bound
    n: int = 0  # audited answers
    wrong: int = 0  # how many of them are wrong

    @property
    def prior(self) -> Prior:
        """Beta(1, 1/limit - 1): its mean is the limit, so rates like it get most of the bets."""
        return 1.0, 1 / self.limit - 1

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
        # the wealth at the limit says on which side of it the bounds are, and costs no search
        enough = -math.log(self.delta)
        wrong = np.asarray(self.wrong)
        n = np.asarray(self.n)
        if log_wealth(wrong, n, self.limit, self.prior) >= enough:
            return "broken"
        if log_wealth(n - wrong, n, 1 - self.limit, self.prior[::-1]) >= enough:
            return "holds so far"
        return "not enough audited answers"

    def path(self, failure: Ints) -> Floats:
        """(B,) log M(limit) after each of the next audited answers, 1 = wrong.

        The guarantee is broken where it reaches log(1/delta), which is where the lower bound passes
        the limit.
        """
        n = self.n + np.arange(1, len(failure) + 1)
        return log_wealth(self.wrong + np.cumsum(failure), n, self.limit, self.prior)

    def more(self, failure: Ints) -> Audit:
        """With further audited answers (B,), 1 = wrong."""
        return replace(self, n=self.n + len(failure), wrong=self.wrong + int(failure.sum()))

    def n_needed(self) -> int | None:
        """About how many more audited answers would tell, if errors go on at the rate so far.

        Before the first one: if none is wrong. None where no number would tell.
        """
        rate = self.wrong / self.n if self.n else 0.0
        if rate == self.limit:
            return None
        # towards the limit, so that the number is not too small
        rounded: Callable[[float], int] = math.ceil if rate < self.limit else math.floor

        def is_enough(n: int) -> bool:
            audit = Audit(self.limit, self.delta, n, rounded(rate * n))
            return audit.verdict != "not enough audited answers"

        if is_enough(self.n):
            return 0
        n = first_enough(is_enough, max(self.n, 1))
        if n is None:
            return None
        return n - self.n
