"""Test the monitor for a guarantee at stated shares: false alarms, power, and saved state."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import vilu
from tests.calibration.test_shares import rows_of
from vilu.calibration.thresholds import upper_bound
from vilu.outcomes.outcomes import Outcomes

STATED = 0.2


def stream(rng: np.random.Generator, n: int, share: float, labelled: float = 0.0) -> Outcomes:
    """Return rows in random order, with the given share out of distribution, and some labelled."""
    n_outside = int(rng.binomial(n, share))
    rows = rows_of(rng, n - n_outside, n_outside).take(rng.permutation(n))
    known = rng.random(n) < labelled
    return Outcomes(
        rows.uncertainty, np.where(known, rows.failure, -1), outside=rows.outside & known
    )


@pytest.fixture(scope="module")
def calibration() -> Outcomes:
    return rows_of(np.random.default_rng(0), 1500, 500)


@pytest.fixture(scope="module")
def rule(calibration: Outcomes) -> vilu.Rule:
    return vilu.certify(calibration, max_risk=0.05, outside_share=STATED)


@pytest.mark.parametrize("share", [0.0, 0.1, STATED])
def test_up_to_the_stated_share_there_is_no_alarm(share: float) -> None:
    """Up to the stated share, the monitor must raise an alarm no more often than its level.

    Each of 120 streams has its own calibration. In each calibration, 300 among 1,200 rows
    are out of distribution.
    """
    raised, streams, level = 0, 120, 0.2
    for seed in range(streams):
        rng = np.random.default_rng([seed, int(100 * share)])
        rows = rows_of(rng, 900, 300)
        rule = vilu.certify(rows, max_risk=0.05, outside_share=STATED)
        monitor = vilu.Monitor(rows, rule, false_alarm=level)
        assert {test.name for test in monitor.status.tests} == {"audit", "outside", "review"}
        raised += monitor.update(stream(rng, 600, share, labelled=0.3)).alarm
    assert raised / streams <= level + 3 * np.sqrt(level * (1 - level) / streams)


def test_more_ood_images_void_the_guarantee(calibration: Outcomes, rule: vilu.Rule) -> None:
    labelled = vilu.Monitor(calibration, rule).update(
        stream(np.random.default_rng(1), 1500, 0.4, labelled=0.3)
    )
    assert labelled.verdict == "shifted: guarantee void"
    assert {t.name for t in labelled.tests if t.raised_at is not None} >= {"outside"}
    assert "none of the classes than the guarantee was stated for" in labelled.reason
    assert labelled.present is not None
    assert "stated: at most 20.00%" in str(labelled)
    silent = vilu.Monitor(calibration, rule).update(stream(np.random.default_rng(2), 2500, 0.5))
    assert [t.name for t in silent.tests if t.raised_at is not None] == ["review"]


def test_the_rate_of_reviews_is_bounded_stratum_by_stratum(
    calibration: Outcomes, rule: vilu.Rule
) -> None:
    monitor = vilu.Monitor(calibration, rule, false_alarm=0.06)
    to_review = ~rule.accept(calibration.uncertainty)
    within, ood = (
        upper_bound(int(to_review[rows].sum()), int(rows.sum()), 0.06 / 3 / 2 / 2)
        for rows in (~calibration.outside, calibration.outside)
    )
    assert monitor.rate_audits["review"].limit == pytest.approx(0.8 * within + 0.2 * ood)
    assert monitor.rate_audits["review"].delta == pytest.approx(0.06 / 3 / 2)
    assert monitor.rate_audits["outside"].limit == STATED


def test_a_stated_share_of_none_is_watched_too() -> None:
    rows = rows_of(np.random.default_rng(3), 800, 0)
    rule = vilu.certify(rows, max_risk=0.05, outside_share=0.0)
    monitor = vilu.Monitor(rows, rule)
    assert monitor.rate_audits["outside"].limit == 1e-3
    assert monitor.update(stream(np.random.default_rng(4), 500, 0.1, labelled=0.5)).alarm


def test_counts_go_on_from_a_state(calibration: Outcomes, rule: vilu.Rule, tmp_path: Path) -> None:
    first, second = (
        stream(np.random.default_rng(seed), 400, 0.25, labelled=0.5) for seed in (5, 6)
    )
    whole = vilu.Monitor(calibration, rule)
    whole.update(first)
    whole.save(tmp_path / "state.parquet")
    gone_on = vilu.Monitor(calibration, rule).resume(tmp_path / "state.parquet")
    assert gone_on.status == whole.status
    assert gone_on.update(second) == whole.update(second)
    assert gone_on.rate_audits["outside"].n_audited == sum(
        (rows.failure >= 0).sum() for rows in (first, second)
    )


def test_other_rules_are_watched_as_they_always_were(calibration: Outcomes) -> None:
    plain = vilu.certify(calibration.take(~calibration.outside), max_risk=0.05)
    monitor = vilu.Monitor(calibration, plain)
    assert [test.name for test in monitor.status.tests] == ["scores", "acceptance", "audit"]
    assert monitor.state().counted == {}
    assert monitor.status.present is None
