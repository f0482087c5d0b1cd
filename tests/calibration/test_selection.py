"""Test conformal selection.

P-values and Benjamini-Hochberg are tested by hand and against scipy. False discoveries are counted.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

import vilu
from vilu.calibration.rules import Rule
from vilu.errors import DataError, InfeasibleError, UsageError
from vilu.outcomes.outcomes import Outcomes


def select(rows: Outcomes, *, max_risk: float) -> Rule:
    return vilu.certify(rows, max_risk=max_risk, method="selection")


def test_p_values_by_hand() -> None:
    rule = select(Outcomes([0.1, 0.3, 0.3, 0.9, 0.2], [0, 1, 1, 1, 0]), max_risk=0.5)
    assert rule.p_values([0.2, 0.3, 0.8, 1.0]).tolist() == [1 / 6, 3 / 6, 3 / 6, 4 / 6]
    assert np.isnan(rule.p_values([np.nan])[0])


@pytest.mark.parametrize("seed", range(20))
def test_accepts_what_benjamini_hochberg_rejects(seed: int) -> None:
    rng = np.random.default_rng(seed)
    u = rng.beta(0.5, 1, 300)
    rule = select(Outcomes(u, (rng.random(300) < u).astype(int)), max_risk=0.2)
    batch = np.round(rng.beta(0.5, 1, 100), 2)
    adjusted = stats.false_discovery_control(rule.p_values(batch), method="bh")
    assert np.array_equal(rule.accept(batch), adjusted <= 0.2 + 1e-12)


def test_rows_without_score_are_no_part_of_the_batch() -> None:
    rule = select(
        Outcomes(np.linspace(0, 1, 200), (np.linspace(0, 1, 200) > 0.5).astype(int)), max_risk=0.1
    )
    batch = np.array([0.0, 0.1, 0.6])
    padded = np.r_[batch, np.full(50, np.nan)]
    assert np.array_equal(rule.accept(padded)[:3], rule.accept(batch))
    assert not rule.accept(padded)[3:].any()
    assert rule.reasons(batch) == [None, None, "not_selected"]
    assert rule.accept([]).tolist() == []


def test_false_discoveries_stay_below_the_level() -> None:
    rng = np.random.default_rng(0)
    shares, level, n_draws = [], 0.2, 600
    for _ in range(n_draws):
        u, batch = rng.beta(0.5, 1, (2, 150))
        rule = select(Outcomes(u, (rng.random(150) < u).astype(int)), max_risk=level)
        wrong, accepted = rng.random(150) < batch, rule.accept(batch)
        shares.append(np.sum(wrong & accepted) / max(np.sum(accepted), 1))
    error = np.std(shares) / np.sqrt(n_draws)
    assert level / 2 < np.mean(shares) <= level + 3 * error


def test_a_million_of_more_rows_are_drawn_from_all_of_them() -> None:
    """If there are more than a million rows, a million must be drawn from all of them.

    The rows are ordered by class, and the last fifth is often wrong. So the first million would be
    a biased sample.
    """
    n = 1_250_000
    rng = np.random.default_rng(0)
    failure = (rng.random(n) < np.where(np.arange(n) < 0.8 * n, 0.01, 0.3)).astype(int)
    rows = Outcomes(np.arange(n) % 1000 / 1000, failure)
    rule = select(rows, max_risk=0.1)
    assert rule.n == 10**6
    share = failure.mean()
    assert abs(len(rule.wrong) / rule.n - share) < 4 * np.sqrt(share / rule.n)


def test_too_few_rows_to_select_anything() -> None:
    rows = Outcomes(np.linspace(0, 1, 19), np.zeros(19))
    assert select(rows, max_risk=0.05).accept([0.5]).all()  # p = 1 / 20
    with pytest.raises(InfeasibleError, match="19 rows are needed"):
        select(Outcomes(np.linspace(0, 1, 18), np.zeros(18)), max_risk=0.05)


def test_refusals() -> None:
    with pytest.raises(UsageError, match="max_risk must be in"):
        select(Outcomes([0.1], [0]), max_risk=1.0)
    with pytest.raises(DataError, match="None of the 1 rows"):
        select(Outcomes([0.1], [-1]), max_risk=0.1)
