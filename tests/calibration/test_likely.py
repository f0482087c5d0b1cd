"""Test which answers are likely right: the threshold by hand, and the file beside a predictor."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import vilu
from vilu.calibration.likely import MIN_WRONG_ANSWERS, LikelyRight
from vilu.errors import DataError, ProvenanceError
from vilu.predictors.contract.held_out import JudgedAnswers
from vilu.predictors.contract.probability import Logistic

AS_IT_IS = Logistic(form="temperature", weights=(1.0,), intercept=0.0, n=10, n_failures=5)
"""Calibrator that leaves a probability unchanged."""


def estimate(*, max_risk: float = 0.05, widening: float = 1.0) -> LikelyRight:
    """Return an estimate whose probabilities are the uncertainties."""
    return LikelyRight(max_risk=max_risk, widening=widening, n=10, n_wrong=5, probability=AS_IT_IS)


@pytest.mark.parametrize(
    ("uncertainty", "max_risk", "widening", "expected"),
    [
        # The means up to each row are 0.01, 0.02, 0.04 and 0.08.
        ([0.01, 0.03, 0.08, 0.2], 0.05, 1.0, 0.08),
        ([0.2, 0.08, 0.01, 0.03], 0.05, 1.0, 0.08),
        ([0.01, 0.03, 0.08, 0.2], 0.05, 1.5, 0.03),
        ([0.01, 0.03, 0.08, 0.2], 0.009, 1.0, None),
        ([0.01, 0.03, 0.08, 0.2], 0.1, 1.0, 0.2),
        # With only one of the two equal rows, the mean would be 0.045.
        ([0.01, 0.08, 0.08], 0.05, 1.0, 0.01),
        ([0.01, float("nan"), 0.2], 0.05, 1.0, 0.01),
        ([], 0.05, 1.0, None),
    ],
)
def test_the_threshold_is_where_the_mean_reaches_the_risk(
    uncertainty: list[float], max_risk: float, widening: float, expected: float | None
) -> None:
    likely_right = estimate(max_risk=max_risk, widening=widening)
    assert likely_right.threshold_among(np.array(uncertainty)) == expected


def test_rows_have_a_threshold_of_their_own_or_that_of_the_fit() -> None:
    of_fit = estimate().model_copy(update={"threshold": 0.02})
    uncertainty = np.array([0.01, 0.03, float("nan"), 0.2])
    assert of_fit.flags_by_own_threshold(uncertainty) == [True, True, False, False]
    assert of_fit.flags_of_new_rows(uncertainty) == [True, False, False, False]
    assert estimate().flags_of_new_rows(uncertainty) == [False] * 4


@pytest.mark.parametrize("n_wrong", [MIN_WRONG_ANSWERS - 1, MIN_WRONG_ANSWERS])
def test_five_wrong_answers_are_needed(n_wrong: int) -> None:
    u = np.linspace(0.01, 0.95, 100) ** 6
    failure = (np.arange(100) >= 100 - n_wrong).astype(np.int64)
    likely_right = LikelyRight.estimate(JudgedAnswers(u, failure), u, max_risk=0.05)
    assert (likely_right.n, likely_right.n_wrong) == (100, n_wrong)
    has_estimate = n_wrong >= MIN_WRONG_ANSWERS
    assert (likely_right.probability is not None) is has_estimate
    assert (likely_right.flags_of_new_rows(u)[0] is True) is has_estimate
    if not has_estimate:
        assert likely_right.flags_of_new_rows(u) == [None] * 100


def test_rows_that_cannot_be_judged_are_left_out() -> None:
    u = np.array([0.1, float("nan"), 0.3, 0.4])
    likely_right = LikelyRight.estimate(JudgedAnswers(u, np.array([0, 1, -1, 1])), u, max_risk=0.05)
    assert (likely_right.n, likely_right.n_wrong) == (2, 1)


def test_drawn_labels_correct_the_cross_fitted_ones() -> None:
    """If answers are wrong twice as often as the predictor says, drawn labels must correct the
    estimate.

    Only drawn labels show the error.
    """
    rng = np.random.default_rng(0)
    u = rng.uniform(0.001, 0.2, size=6_000)
    chosen = (rng.random(3_000) < u[:3_000]).astype(np.int64)
    drawn = (rng.random(3_000) < 2 * u[3_000:]).astype(np.int64)
    alone = LikelyRight.estimate(JudgedAnswers(u[:3_000], chosen), u, max_risk=0.05)
    both = alone.with_drawn_answers(JudgedAnswers(u[3_000:], drawn), u)
    assert (both.n, both.n_wrong) == (alone.n, alone.n_wrong) == (3_000, chosen.sum())
    assert (both.n_drawn, both.n_drawn_wrong) == (3_000, drawn.sum())
    assert both.flags_of_new_rows(u).count(True) < 0.8 * alone.flags_of_new_rows(u).count(True)
    # The labels from the last draw replace the labels from the draw before.
    nothing_drawn = JudgedAnswers(u[:0], drawn[:0])
    assert both.with_drawn_answers(nothing_drawn, u) == alone


def test_wrong_answers_of_a_draw_are_enough_and_skipped_ones_are_left_out() -> None:
    u = np.linspace(0.01, 0.95, 100) ** 6
    alone = LikelyRight.estimate(JudgedAnswers(u, np.zeros(100, np.int64)), u, max_risk=0.05)
    assert alone.probability is None
    failure = np.zeros(100, np.int64)
    failure[-MIN_WRONG_ANSWERS:] = 1
    failure[0] = -1
    both = alone.with_drawn_answers(JudgedAnswers(u, failure), u)
    assert (both.n_drawn, both.n_drawn_wrong) == (99, MIN_WRONG_ANSWERS)
    assert both.probability is not None


def test_expected_and_true_error_rate_agree_where_the_scores_are_true() -> None:
    """If failures are drawn from the scores, the expected error rate must agree with the true one.

    5,000 labels make the calibrator nearly exact. About half the 20,000 rows are likely right, so
    the standard error for their error rate is 0.2 %.
    """
    rng = np.random.default_rng(0)
    u = rng.uniform(0.001, 0.2, size=25_000)
    failure = (rng.random(25_000) < u).astype(np.int64)
    likely_right = LikelyRight.estimate(
        JudgedAnswers(u[:5000], failure[:5000]), u[5000:], max_risk=0.05
    )
    marked = np.array(likely_right.flags_of_new_rows(u[5000:]))
    expected = 0.05 / likely_right.widening
    # The tolerance is three standard errors of the rate, and 0.5 % for the calibrator.
    assert failure[5000:][marked].mean() == pytest.approx(expected, abs=0.011)


def test_it_lies_beside_its_predictor_and_no_other(tmp_path: Path) -> None:
    data = vilu.Embeddings(np.eye(2)[[0, 1] * 20], np.eye(2), target=[0, 1] * 20)
    assert LikelyRight.find(tmp_path) is None
    vilu.ViLUPlus(width=8, epochs=1).fit(data).save(tmp_path / "one")
    likely_right = estimate()
    likely_right.save(tmp_path / "one")
    assert LikelyRight.find(tmp_path / "one") == likely_right
    other = vilu.Embeddings(np.eye(2)[[0, 1] * 20], np.eye(2), target=[1, 0] * 20)
    vilu.ViLUPlus(width=8, epochs=1).fit(other).save(tmp_path / "two")
    content = (tmp_path / "one" / "likely.json").read_bytes()
    (tmp_path / "two" / "likely.json").write_bytes(content)
    with pytest.raises(ProvenanceError, match="made for another predictor"):
        LikelyRight.find(tmp_path / "two")
    (tmp_path / "one" / "likely.json").write_bytes(content.replace(b"0.05", b"0.06"))
    with pytest.raises(DataError, match="is damaged"):
        LikelyRight.find(tmp_path / "one")


def test_an_estimate_goes_with_the_answers_that_it_judges(tmp_path: Path) -> None:
    data = vilu.Embeddings(np.eye(2)[[0, 1] * 20], np.eye(2), target=[0, 1] * 20)
    predictor = vilu.ViLUPlus(width=8, epochs=1).fit(data)
    predictor.save(tmp_path)
    estimate().save(tmp_path)
    predictor.judging("adapted").save(tmp_path)
    assert not (tmp_path / "likely.json").exists()
