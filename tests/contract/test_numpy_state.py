"""Test vilu while numpy raises an error for every rounding to zero.

The caller may set numpy so. vilu must still work.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import vilu
from tests.conftest import toy_embeddings
from vilu.calibration.anytime import log_evidence
from vilu.calibration.monitor.audit import Audit
from vilu.predictors.contract.probability import fit_calibrator


@pytest.fixture(autouse=True)
def raising() -> Iterator[None]:
    with np.errstate(all="raise"):
        yield


def outcomes(seed: int, n: int = 3000) -> vilu.Outcomes:
    data = toy_embeddings(n, seed=seed, ids_from=None)
    return vilu.score(vilu.PREDICTORS["mcm_ts"]().fit(toy_embeddings()), data)


def test_scores_rules_and_monitors_round_to_zero_in_silence(tmp_path: Path) -> None:
    calibration, later = outcomes(seed=1), outcomes(seed=2)
    table = vilu.evaluate([later, later], n_resamples=50)
    assert table.rows[0].n == 3000
    assert vilu.compare(later, later, n_resamples=50).difference == 0
    rule = vilu.certify(calibration, max_risk=0.3)
    monitor = vilu.Monitor(calibration, rule)
    for start in range(0, 3000, 500):
        monitor.update(later.take(range(start, start + 500)))
    monitor.audit(later)
    assert str(monitor.status)
    data = toy_embeddings(200, seed=3, ids_from=None)
    parts = vilu.score_parts(vilu.MCM(), data, tmp_path / "scores", rows_per_part=100)
    assert parts.counts.n_scored == 200


def test_fits_round_to_zero_in_silence() -> None:
    predictor = vilu.PREDICTORS["vilu_plus"]().fit(toy_embeddings(200))
    predictor.calibrate_probability(toy_embeddings(200, seed=4, ids_from=None))
    assert predictor.calibrator_ is not None


def test_many_answers_round_to_zero_in_silence() -> None:
    audit = Audit(limit=0.05, delta=0.05, n_audited=200_000, n_wrong=10)
    assert audit.verdict == "holds so far"
    assert 0 < audit.lower < audit.upper < 0.05
    assert np.isfinite(audit.log_wealth_after(np.zeros(1000, np.int64))).all()
    assert log_evidence(0, 200_000, 0.05) > 1000


@pytest.mark.parametrize("is_log_odds", [True, False])
def test_extreme_scores_round_to_zero_in_silence(is_log_odds: bool) -> None:
    failure = (np.arange(2000) % 4 == 0).astype(np.int64)
    score = np.where(failure == 1, 900.0, -900.0) * np.linspace(0, 1, 2000)
    score[::7] *= -1
    calibrator = fit_calibrator(score, failure, is_log_odds=is_log_odds)
    probability = calibrator(np.array([-2000.0, 0.0, 2000.0]))
    assert ((probability >= 0) & (probability <= 1)).all()
