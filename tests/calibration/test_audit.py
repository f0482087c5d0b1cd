"""Test bounds that hold at all times, against numerical integration, brute force and simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import integrate, stats

from vilu.calibration.monitor.audit import Audit, anytime_lower_bound, log_wealth

PRIOR = (1.0, 19.0)


def brute_wealth(wrong: int, n: int, rate: float) -> float:
    """Return the mixture's wealth from its definition."""
    prior = stats.beta(*PRIOR)

    def integrand(theta: float) -> float:
        return (
            prior.pdf(theta) * (theta / rate) ** wrong * ((1 - theta) / (1 - rate)) ** (n - wrong)
        )

    return (
        prior.cdf(rate)
        + integrate.quad(integrand, rate, 1, epsabs=1e-13, epsrel=1e-11, limit=200)[0]
    )


@pytest.mark.parametrize(("wrong", "n"), [(0, 0), (0, 5), (1, 1), (3, 20), (30, 200), (7, 7)])
def test_wealth_is_the_integral(wrong: int, n: int) -> None:
    for rate in (0.01, 0.05, 0.3, 0.9):
        found = log_wealth(np.asarray(wrong), np.asarray(n), rate, PRIOR)
        assert float(np.exp(found)) == pytest.approx(brute_wealth(wrong, n, rate), rel=1e-7)


def test_the_wealth_is_a_martingale_at_the_rate_and_shrinks_below_it() -> None:
    """After any past, the expected wealth after the next answer must be exactly the wealth now.

    This holds if answers are wrong at the rate r. At a smaller rate the wealth must shrink.
    """
    for wrong, n in ((0, 0), (2, 30), (9, 40)):
        now, after_right, after_wrong = (
            float(np.exp(log_wealth(np.asarray(k), np.asarray(m), 0.05, PRIOR)))
            for k, m in ((wrong, n), (wrong, n + 1), (wrong + 1, n + 1))
        )
        assert 0.05 * after_wrong + 0.95 * after_right == pytest.approx(now, rel=1e-10)
        assert 0.02 * after_wrong + 0.98 * after_right <= now


@pytest.mark.parametrize(("wrong", "n"), [(1, 3), (5, 40), (40, 400), (20, 20)])
def test_the_lower_bound_is_where_the_wealth_falls_below_its_limit(wrong: int, n: int) -> None:
    rates = np.linspace(1e-6, 1 - 1e-6, 20_001)
    wealth = np.array(
        [float(log_wealth(np.asarray(wrong), np.asarray(n), rate, PRIOR)) for rate in rates]
    )
    below = wealth < np.log(1 / 0.01)
    assert np.array_equal(below, np.arange(len(rates)) >= np.argmax(below))  # one crossing
    assert anytime_lower_bound(wrong, n, 0.01, PRIOR) == pytest.approx(
        rates[np.argmax(below)], abs=1e-4
    )


def test_bounds_hold_at_all_times_together() -> None:
    """Each bound may miss in at most delta + 3 sigma of 4,000 streams.

    A stream has 1,000 answers. It misses if the bound is wrong after any answer.
    """
    delta, rate, n, streams = 0.1, 0.05, 1000, 4000
    rng = np.random.default_rng(0)
    wrong = (rng.random((streams, n)) < rate).cumsum(axis=1)
    count = np.arange(1, n + 1)
    allowed = delta + 3 * np.sqrt(delta * (1 - delta) / streams)
    k, m = np.meshgrid(np.arange(wrong.max() + 1), np.arange(n + 1), indexing="ij")
    k = np.minimum(k, m)
    against_at_most, against_at_least = (
        log_wealth(k, m, rate, PRIOR),
        log_wealth(m - k, m, 1 - rate, PRIOR[::-1]),
    )
    above = against_at_most[wrong, count].max(axis=1) >= np.log(1 / delta)
    below = against_at_least[wrong, count].max(axis=1) >= np.log(1 / delta)
    assert 0.01 < above.mean() <= allowed
    assert 0.01 < below.mean() <= allowed


def test_the_verdict_follows_the_bounds_and_the_path() -> None:
    rng = np.random.default_rng(1)
    for rate, expected in ((0.01, "holds so far"), (0.15, "broken")):
        failure = (rng.random(600) < rate).astype(np.int64)
        audit = Audit(0.05, 0.01)
        assert audit.verdict == "not enough audited answers"
        path = audit.log_wealth_after(failure)
        for row in range(600):
            audit = audit.with_answers(failure[row : row + 1])
            by_bounds = (
                "broken" if audit.lower > 0.05 else "holds so far" if audit.upper < 0.05 else None
            )
            assert audit.verdict == (by_bounds or "not enough audited answers")
            assert (audit.verdict == "broken") == (path[row] >= np.log(100))
        assert audit.verdict == expected


@pytest.mark.parametrize("limit", [0.001, 0.005])
def test_nearly_all_answers_wrong_against_a_small_limit_have_bounds(limit: float) -> None:
    # The lower bound on the rate of right answers is below the smallest rate that is searched.
    audit = Audit(limit, delta=0.01, n_audited=3_000, n_wrong=2_999)
    assert audit.verdict == "broken"
    assert limit < audit.lower < 2_999 / 3_000
    assert audit.upper == 1
    # A few more right answers, and the bound can be found.
    assert 0.99 < Audit(limit, delta=0.01, n_audited=3_000, n_wrong=2_990).upper < 1


def test_bounds_of_the_audit_are_ordered_and_tell_how_many_more() -> None:
    audit = Audit(0.05, 0.01, 200, 2)
    assert 0 < audit.lower < 0.01 < audit.upper < 1
    more = audit.n_more_needed()
    assert more is not None
    assert (
        Audit(0.05, 0.01, 200 + more, round(np.ceil(0.01 * (200 + more)))).verdict == "holds so far"
    )
    unseen = Audit(0.05, 0.01).n_more_needed()
    assert unseen is not None
    assert Audit(0.05, 0.01, unseen, 0).verdict == "holds so far"
    assert Audit(0.05, 0.01, unseen - 1, 0).verdict == "not enough audited answers"
    # At the guaranteed rate, more answers would not decide.
    assert Audit(0.05, 0.01, 40, 2).n_more_needed() is None
    assert Audit(0.05, 0.01, 1000, 200).n_more_needed() == 0
    assert (Audit(0.05, 0.01).lower, Audit(0.05, 0.01).upper) == (0, 1)
