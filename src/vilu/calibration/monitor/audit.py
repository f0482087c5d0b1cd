"""Anytime-valid bounds on the error rate among labelled accepted answers.

Let k of m answers be wrong, and let theta be an error rate drawn from the distribution Beta(a, b).
The wealth of bets against "the error rate is at most r" is

    M(r) = P[theta <= r] + integral over theta > r of (theta/r)^k ((1 - theta)/(1 - r))^(m - k),

where the integral is taken over the distribution of theta. This is a mixture of bets on all rates
theta above r. The part P[theta <= r] of the wealth is not bet. Suppose that every answer, given the
answers before it, is wrong with a probability of at most r. Then the probability that M(r) ever
reaches 1/delta is at most delta (Ville 1939). So the bounds may be looked at after every label.

As r rises from 0 to k/m, M(r) decreases. For all r above k/m, M(r) is at most 1. So M(r) falls
below 1/delta at a single rate. This rate is the lower bound on the error rate. The upper bound
comes from the lower bound on the rate of right answers. (Method of mixtures: Robbins 1970.
Confidence sequences: Howard et al., Annals of Statistics 2021.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy import optimize, special

from vilu.calibration.thresholds import find_sufficient_number
from vilu.metrics.counts import Floats, Ints

TestName = Literal["scores", "acceptance", "answers", "audit", "outside", "review"]
"""Names for a monitor's tests (``vilu.calibration.monitor.status.ALARM_MEANING``)."""

AuditVerdict = Literal["holds so far", "not enough audited answers", "broken"]
"""Verdicts that an audit reaches about a guarantee."""

Prior = tuple[float, float]
"""Parameters a and b for the Beta distribution of theta."""


def log_wealth(n_wrong: Ints, n: Ints, rate: float, prior: Prior) -> Floats:
    """Return the log wealth (...), log M(rate), after ``n`` answers with ``n_wrong`` wrong answers.

    ``rate`` is in (0, 1). ``prior`` holds the parameters a and b for the Beta distribution of
    theta.

    Examples:
        >>> import numpy as np
        >>> from vilu.calibration.monitor.audit import log_wealth
        >>> # With the rate 1/2 and the prior Beta(1, 1), half of the wealth is not bet. After one
        >>> # wrong answer, the integral of 2 theta over theta > 1/2 is 3/4. After one right answer,
        >>> # the integral of 2 (1 - theta) is 1/4.
        >>> log_m = log_wealth(np.array([1, 0]), np.array([1, 1]), rate=0.5, prior=(1.0, 1.0))
        >>> np.exp(log_m).round(6).tolist()  # 1/2 + 3/4, and 1/2 + 1/4: the mean is 1
        [1.25, 0.75]
    """
    a, b = prior
    n_right = n - n_wrong
    # Only rates theta above ``rate`` are bet on. A bet on a smaller rate would gain on average if
    # the true rate is small, and M would reject the true statement "at most ``rate``".
    #
    # Either term of M may be 0. The logarithm is then -inf, and this is no error.
    with np.errstate(divide="ignore", under="ignore"):
        share_not_bet = special.betainc(a, b, rate)
        log_not_bet = np.log(share_not_bet)
        # The integral over all theta is a quotient of two beta functions. The factor ``betaincc``
        # is the share of the integral above ``rate``.
        share_above = special.betaincc(a + n_wrong, b + n_right, rate)
        log_share_above = np.log(share_above)
        log_integral = (
            special.betaln(a + n_wrong, b + n_right) - special.betaln(a, b) + log_share_above
        )
        log_bet = log_integral - n_wrong * math.log(rate) - n_right * math.log1p(-rate)
        wealth: Floats = np.logaddexp(log_bet, log_not_bet)
    return wealth


def anytime_lower_bound(n_wrong: int, n: int, delta: float, prior: Prior) -> float:
    """Return a lower bound on an error rate, after ``n`` answers with ``n_wrong`` wrong answers.

    With confidence 1 - delta, no bound after 1, 2, 3, ... answers is above the true rate.

    Examples:
        >>> from vilu.calibration.monitor.audit import anytime_lower_bound
        >>> # After one wrong answer, M(r) = r + (1 - r^2) / (2 r). M(r) is 2 at r = 2 - sqrt(3).
        >>> round(anytime_lower_bound(n_wrong=1, n=1, delta=0.5, prior=(1.0, 1.0)), 4)
        0.2679
    """
    if not n_wrong:
        return 0.0

    def excess_log_wealth(rate: float) -> float:
        """Return the logarithm of M(rate) / (1 / delta): above 0 if M is larger than 1 / delta."""
        return float(log_wealth(np.asarray(n_wrong), np.asarray(n), rate, prior)) + math.log(delta)

    # M decreases as the rate rises to k / n, and is at most 1 from there on. So M crosses 1 / delta
    # once, below k / n. The ends for the search must be above 0 and below 1. The largest float64
    # below 1 is 1 - 2^-53.
    smallest_rate = 1e-300
    largest_rate = min(n_wrong / n, 1 - 2**-53)
    # M may reach 1 / delta only below the smallest rate, if the prior strongly expects another
    # error rate. The bound is then practically 0.
    if excess_log_wealth(smallest_rate) <= 0:
        return 0.0
    return float(optimize.brentq(excess_log_wealth, smallest_rate, largest_rate, xtol=1e-14))


@dataclass(frozen=True)
class Audit:
    """Compares the error rate of audited answers with the guaranteed largest error rate."""

    limit: float  # guaranteed largest error rate, in (0, 1)
    delta: float  # 1 - confidence for each bound
    n_audited: int = 0  # number of audited answers
    n_wrong: int = 0  # number of wrong audited answers

    @property
    def prior(self) -> Prior:
        """Prior Beta(1, 1/limit - 1). The mean is the limit, so most bets are near the limit."""
        return 1.0, 1 / self.limit - 1

    @property
    def prior_of_right(self) -> Prior:
        """Prior for the rate of right answers, 1 - theta: ``prior`` with a and b swapped."""
        a, b = self.prior
        return b, a

    @property
    def lower(self) -> float:
        """Lower bound on the error rate."""
        return anytime_lower_bound(self.n_wrong, self.n_audited, self.delta, self.prior)

    @property
    def upper(self) -> float:
        """Upper bound on the error rate."""
        n_right = self.n_audited - self.n_wrong
        return 1 - anytime_lower_bound(n_right, self.n_audited, self.delta, self.prior_of_right)

    @property
    def verdict(self) -> AuditVerdict:
        """Verdict from the answers so far."""
        # The wealth at the limit shows whether a bound has reached the limit. This is faster than a
        # search for the bounds.
        needed_log_wealth = -math.log(self.delta)
        n_wrong = np.asarray(self.n_wrong)
        n = np.asarray(self.n_audited)
        if log_wealth(n_wrong, n, self.limit, self.prior) >= needed_log_wealth:
            return "broken"
        if log_wealth(n - n_wrong, n, 1 - self.limit, self.prior_of_right) >= needed_log_wealth:
            return "holds so far"
        return "not enough audited answers"

    def log_wealth_after(self, failure: Ints) -> Floats:
        """Return the log wealth (B,), log M(limit), after each of the next B audited answers.

        ``failure`` (B,) is 1 where the answer is wrong. If the log wealth reaches log(1/delta), the
        lower bound reaches the limit, and the guarantee is broken.
        """
        n = self.n_audited + np.arange(1, len(failure) + 1)
        n_wrong = self.n_wrong + np.cumsum(failure)
        return log_wealth(n_wrong, n, self.limit, self.prior)

    def with_answers(self, failure: Ints) -> Audit:
        """Return the audit with B more answers. ``failure`` (B,) is 1 where an answer is wrong."""
        n_audited = self.n_audited + len(failure)
        n_wrong = self.n_wrong + int(failure.sum())
        return replace(self, n_audited=n_audited, n_wrong=n_wrong)

    def n_more_needed(self) -> int | None:
        """Estimate how many more audited answers lead to a verdict, at the same error rate.

        If no answer was audited yet, all answers are assumed to be right. None if no number of
        answers is enough.
        """
        error_rate = self.n_wrong / self.n_audited if self.n_audited else 0.0
        if error_rate == self.limit:
            return None
        # The number of wrong answers is rounded towards the limit, so that the estimate is not too
        # small.
        is_below_limit = error_rate < self.limit
        round_to_limit: Callable[[float], int] = math.ceil if is_below_limit else math.floor

        def is_enough(n: int) -> bool:
            n_wrong = round_to_limit(error_rate * n)
            later_audit = replace(self, n_audited=n, n_wrong=n_wrong)
            return later_audit.verdict != "not enough audited answers"

        if is_enough(self.n_audited):
            return 0
        n_enough = find_sufficient_number(is_enough, first_tried=max(self.n_audited, 1))
        if n_enough is None:
            return None
        return n_enough - self.n_audited
