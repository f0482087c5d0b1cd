"""Test evidence that is valid at any time.

The expected values come from hand-worked cases and brute force. Simulated calibrations are looked
at repeatedly.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import few
from vilu.calibration.anytime import (
    BETS_WITH_SHARES,
    N_THRESHOLDS_UP_TO_LIMIT,
    SEQUENCE_STARTS,
    ThresholdTests,
    level_of,
    log_evidence,
    n_labels_needed,
    threshold_grid,
)
from vilu.calibration.rules import make_anytime_rule
from vilu.errors import DataError, UsageError
from vilu.outcomes.outcomes import Outcomes

RISK, DELTA = 0.05, 0.05


@given(st.lists(st.booleans(), max_size=60), st.floats(0.01, 0.5))
def test_evidence_is_the_mean_of_products_of_bets(outcomes: list[bool], risk: float) -> None:
    wealth = np.array([share for _, share in BETS_WITH_SHARES])
    for wrong in outcomes:
        wealth = wealth * [1 - bet * (wrong - risk) / (1 - risk) for bet, _ in BETS_WITH_SHARES]
    found = math.exp(log_evidence(sum(outcomes), len(outcomes), risk))
    assert found == pytest.approx(wealth.sum(), rel=1e-10)


@pytest.mark.parametrize("rate", [0.05, 0.08, 0.3])
def test_the_mean_evidence_is_at_most_one_where_the_risk_is_above(rate: float) -> None:
    n, k = 40, np.arange(41)
    log_p = [
        math.log(math.comb(n, i)) + i * math.log(rate) + (n - i) * math.log1p(-rate) for i in k
    ]
    mean = float(np.exp(np.array(log_p) + log_evidence(k, n, RISK)).sum())
    assert mean <= 1 + 1e-12
    assert (mean == pytest.approx(1, abs=1e-12)) == (rate == RISK)


def test_levels_and_starts_share_the_whole() -> None:
    assert sum(level_of(k, DELTA) for k in range(1, 60)) == pytest.approx(DELTA, rel=1e-12)
    assert sum(share for _, share in SEQUENCE_STARTS) == pytest.approx(1)
    assert sum(share for _, share in BETS_WITH_SHARES) == pytest.approx(1)
    assert SEQUENCE_STARTS[-1][0] == N_THRESHOLDS_UP_TO_LIMIT


def test_a_grid_comes_from_scores_alone_and_ends_with_all() -> None:
    u = np.random.default_rng(0).permutation(np.arange(1, 1001) / 1000)
    grid = threshold_grid(u, 0.32)
    assert grid[N_THRESHOLDS_UP_TO_LIMIT - 1] == 0.32
    assert grid[N_THRESHOLDS_UP_TO_LIMIT // 2 - 1] == 0.16
    assert grid[-1] == 1.0
    assert (np.diff(grid) > 0).all()
    with pytest.raises(DataError, match=r"no score is at most 1e-05"):
        threshold_grid(u, 1e-5)


def test_ties_share_a_threshold() -> None:
    grid = threshold_grid(np.repeat([0.1, 0.5], 50), 0.1)
    assert set(grid.tolist()) == {0.1, 0.5}
    looks = ThresholdTests(grid, RISK, DELTA, limit=0.1)
    assert looks.last_tested_index == int((grid == 0.1).sum()) - 1
    assert (
        looks.index_of_laxest_certified_threshold(np.full(150, 0.1), np.zeros(150, np.int64))
        == looks.last_tested_index
    )


def test_nothing_beyond_the_limit_is_tested() -> None:
    u = np.linspace(0, 1, 400)
    grid = threshold_grid(u, 0.5)
    wrong = np.zeros(400, np.int64)
    at = ThresholdTests(grid, RISK, DELTA, limit=0.5).index_of_laxest_certified_threshold(u, wrong)
    assert at is not None
    assert grid[at] <= 0.5
    everything = ThresholdTests(grid, RISK, DELTA).index_of_laxest_certified_threshold(u, wrong)
    assert everything == len(grid) - 1


def test_what_more_would_do_does() -> None:
    grid = threshold_grid(np.linspace(0, 1, 200), 1.0)
    looks, u = ThresholdTests(grid, RISK, DELTA), np.linspace(0, 1, 30)
    more = looks.n_more_labels_needed(u, np.zeros(30, np.int64))
    assert more is not None
    # Shares are rounded down to whole labels, so each threshold may need one label more.
    longer = np.linspace(0, 1, 30 + more + N_THRESHOLDS_UP_TO_LIMIT)
    assert (
        looks.index_of_laxest_certified_threshold(longer, np.zeros(len(longer), np.int64))
        is not None
    )
    assert looks.index_of_laxest_certified_threshold(u, np.zeros(30, np.int64)) is None
    assert not looks.can_certify(u)
    assert looks.can_certify(longer)
    assert looks.n_more_labels_needed(np.linspace(0, 1, 60), np.arange(60) % 3 == 0) is None


def test_a_rule_without_any_label_accepts_no_share() -> None:
    tests = ThresholdTests(threshold_grid(np.linspace(0, 1, 200), 1.0), RISK, DELTA)
    no_rows = Outcomes(np.zeros(0), np.zeros(0, np.int64))
    rule = make_anytime_rule({"": (tests, no_rows)}, RISK, 1 - DELTA)
    assert (rule.n, rule.coverage, rule.feasible) == (0, 0.0, False)
    assert rule.thresholds[""].why is not None


def test_more_labels_go_to_thresholds_by_the_rows_they_accept() -> None:
    # The limit has moved by 16 thresholds. Each threshold accepts 2 % more rows than the one
    # before. So the first limit accepts 1 / 1.02^16 = 73 % of all rows up to the new limit.
    scores = np.linspace(0.001, 1, 10_000)
    grid = threshold_grid(scores, 0.5)
    looks = ThresholdTests(
        grid, max_risk=0.05, delta=0.05, limit=float(grid[N_THRESHOLDS_UP_TO_LIMIT - 1 + 16])
    )
    none = np.zeros(0)
    # If no answer is wrong, the first limit is certified once it accepts as many labels as
    # ``n_labels_needed`` says.
    needed = n_labels_needed(0, 0.05, 0.7 * 0.05)
    share = 0.5 / grid[looks.last_tested_index]
    more = looks.n_more_labels_needed(none, none.astype(np.int64))
    assert more == pytest.approx(needed / share, abs=2)


@pytest.mark.parametrize("bad", [{"max_risk": 0.0}, {"delta": 1.0}])
def test_settings_that_cannot_be(bad: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(bad))):
        ThresholdTests(
            np.linspace(0, 1, N_THRESHOLDS_UP_TO_LIMIT), **{"max_risk": RISK, "delta": DELTA, **bad}
        )
    with pytest.raises(DataError, match="ascending"):
        ThresholdTests(np.linspace(1, 0, N_THRESHOLDS_UP_TO_LIMIT), RISK, DELTA)


RATES = {
    "just above": lambda u: np.full_like(u, 0.052),
    "rising": lambda u: 0.02 + 0.07 * u,
    "wrong at the top": lambda u: np.where(u < 0.03, 0.4, 0.045),
}
"""Failure rate at the quantile u. Each rate has thresholds whose error rate is above the guarantee.
"""


@pytest.mark.parametrize("name", few(RATES, 1))
def test_the_guarantee_holds_however_often_one_looks(name: str) -> None:
    """The user looks after every 34 labels and stops at the first certificate.

    No other way to stop breaks the guarantee more often.
    """
    rate, rng, calibrations, broken = RATES[name], np.random.default_rng(5), 2_000, 0
    dense = np.linspace(0, 1, 20_001)
    risk_up_to = np.cumsum(rate(dense)) / np.arange(1, len(dense) + 1)
    for _ in range(calibrations):
        looks = ThresholdTests(threshold_grid(rng.random(400), 0.5), RISK, DELTA)
        u = rng.random(400)
        wrong = (rng.random(400) < rate(u)).astype(np.int64)
        for n in range(60, 401, 34):
            at = looks.index_of_laxest_certified_threshold(u[:n], wrong[:n])
            if at is not None:
                broken += risk_up_to[int(looks.grid[at] * 20_000)] > RISK
                break
    assert broken / calibrations <= DELTA + 3 * math.sqrt(DELTA * (1 - DELTA) / calibrations)


def test_an_exact_test_repeated_at_every_look_breaks_it() -> None:
    """If the exact binomial test is used at the full level at every look, it certifies far too
    often.

    So repeated looks need evidence that is valid at any time.
    """
    from vilu.calibration.thresholds import binomial_tail

    rng, broken = np.random.default_rng(7), 0
    for _ in range(500):
        wrong = np.cumsum(rng.random(2_000) < 0.052)
        n = np.arange(60, 2_001, 10)
        broken += bool((binomial_tail(wrong[n - 1], n, RISK) <= DELTA).any())
    assert broken / 500 > 2 * DELTA
