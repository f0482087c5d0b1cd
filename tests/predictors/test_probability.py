"""Test failure probabilities: every form against scikit-learn or a known truth, and the choice."""

from __future__ import annotations

import json

import numpy as np
import pytest
import sklearn
import torch
from scipy import special
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

import vilu
from tests.conftest import toy_embeddings
from vilu.artifacts.documents import write_json
from vilu.embeddings.memory import Embeddings
from vilu.errors import DataError, UsageError
from vilu.metrics import brier, ece
from vilu.predictors.contract import probability
from vilu.predictors.contract.probability import (
    Isotonic,
    Logistic,
    _fit,
    fit_calibrator,
    read_calibrator,
)


def sample(n: int, truth, seed: int = 0):
    """Return scores around zero, and failures with probability ``truth(score)``."""
    rng = np.random.default_rng(seed)
    score = rng.normal(0, 2, n)
    return score, (rng.random(n) < truth(score)).astype(np.int64)


def test_platt_is_logistic_regression_on_smoothed_targets() -> None:
    score, failure = sample(20_000, lambda s: special.expit(0.7 * s - 1))
    found = _fit("platt", score, failure)
    wrong, n = failure.sum(), len(failure)
    # Each row counts on both sides, by its target.
    target = np.where(failure == 1, (wrong + 1) / (wrong + 2), 1 / (n - wrong + 2))
    plain = LogisticRegression(C=np.inf, tol=1e-10).fit(
        np.tile(score, 2)[:, None],
        np.repeat([1, 0], n),
        sample_weight=np.concatenate([target, 1 - target]),
    )
    assert (*found.weights, found.intercept) == pytest.approx(
        (plain.coef_[0, 0], plain.intercept_[0]), rel=1e-6
    )
    assert found(score[:5]) == pytest.approx(
        special.expit(found.weights[0] * score[:5] + found.intercept)
    )


@pytest.mark.skipif(
    tuple(map(int, sklearn.__version__.split(".")[:2])) < (1, 8),
    reason="scikit-learn has had a temperature since 1.8",
)
def test_temperature_is_scikit_learns() -> None:
    score, failure = sample(20_000, lambda s: special.expit(s / 2.5))

    class Given(ClassifierMixin, BaseEstimator):
        """Classify with the input as log-odds."""

        def fit(self, X, y):
            self.classes_ = np.unique(y)
            return self

        def decision_function(self, X):
            return X[:, 0]

        def predict(self, X):
            return (X[:, 0] > 0).astype(int)

    theirs = CalibratedClassifierCV(
        FrozenEstimator(Given().fit(score[:, None], failure)), method="temperature", ensemble=False
    )
    expected = theirs.fit(score[:, None], failure).predict_proba(score[:50, None])[:, 1]
    found = _fit("temperature", score, failure)
    assert found.intercept == 0
    assert 1 / found.weights[0] == pytest.approx(2.5, rel=0.05)
    assert found(score[:50]) == pytest.approx(expected, abs=2e-3)


def test_beta_recovers_its_own_form() -> None:
    a, b, c = 0.5, 2.0, 0.3
    logs = lambda s: a * special.log_expit(s) - b * special.log_expit(-s) + c  # noqa: E731
    score, failure = sample(100_000, lambda s: special.expit(logs(s)))
    found = _fit("beta", score, failure)
    # The three standard errors are about 0.02, from the Fisher information at these values.
    assert (*found.weights, found.intercept) == pytest.approx((a, b, c), abs=0.1)


def test_beta_never_falls() -> None:
    """If the failure rate falls again at high scores, the form must not fall.

    A part with a negative weight is left out, as Kull et al. do.
    """
    score, failure = sample(20_000, lambda s: np.where(s < 2, special.expit(s), 0.1))
    found = _fit("beta", score, failure)
    assert min(found.weights) == 0
    assert (np.diff(found(np.linspace(-6, 6, 100))) >= 0).all()


@pytest.mark.parametrize(("rows", "scores"), [(1, 1), (7, 2), (40, 5), (400, 60), (3000, 3000)])
def test_isotonic_pools_ties_and_falls_as_scikit_learns(rows: int, scores: int) -> None:
    for seed in range(20):
        rng = np.random.default_rng([rows, scores, seed])
        score = rng.integers(scores, size=rows).astype(np.float64)
        failure = (rng.random(rows) < rng.random(scores)[score.astype(int)]).astype(np.int64)
        plain = IsotonicRegression(y_min=1 / (rows + 2), y_max=1 - 1 / (rows + 2)).fit(
            score, failure
        )
        assert _fit("isotonic", score, failure)(score) == pytest.approx(
            plain.predict(score), abs=1e-12
        )


def test_isotonic_is_scikit_learns_within_its_ends() -> None:
    score, failure = sample(3000, special.expit)
    found = _fit("isotonic", score, failure)
    grid = np.linspace(-9, 9, 200)
    plain = IsotonicRegression(out_of_bounds="clip").fit(score, failure)
    # The clipped ends bend the last lines.
    assert found(grid) == pytest.approx(
        plain.predict(grid).clip(1 / 3002, 1 - 1 / 3002), abs=1 / 3002
    )
    assert np.isnan(found(np.array([np.nan]))[0])


@pytest.mark.parametrize(
    ("truth", "n", "form"),
    [
        (lambda s: special.expit(0.5 * s), 3000, "temperature"),
        (lambda s: special.expit(0.5 * s - 1.5), 3000, "platt"),
        (lambda s: 0.1 + 0.35 * (s > -1) + 0.5 * (s > 1), 6000, "isotonic"),
        (lambda s: 0.1 + 0.35 * (s > -1) + 0.5 * (s > 1), 600, "platt"),  # too few rows for steps
        # Failures are so rare that there is nothing to choose by.
        (
            lambda s: special.expit(0.5 * s - 9),
            300,
            "temperature",
        ),
    ],
)
def test_the_form_follows_the_data(truth, n: int, form: str) -> None:
    found = fit_calibrator(*sample(n, truth), is_log_odds=True)
    assert found.form in ({form, "beta"} if form == "platt" else {form})
    if found.log_loss:
        best = min(found.log_loss.values())
        assert found.log_loss[found.form] < best + 0.02


def test_the_choice_is_by_held_out_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reported loss must come from rows left out.

    The expected loss comes from fits on the other nine folds, by hand.
    """
    score, failure = sample(400, special.expit)
    fits: list[np.ndarray] = []
    monkeypatch.setattr(
        probability, "_fit", lambda form, some, wrong: fits.append(some) or _fit(form, some, wrong)
    )
    found = fit_calibrator(score, failure, is_log_odds=False)
    *fits, last = fits
    assert np.array_equal(last, score)
    held_out = [~np.isin(score, fit) for fit in fits]
    assert np.array_equal(np.sum(held_out, axis=0), np.ones(400))
    for kind in (0, 1):
        assert np.ptp([(failure[out] == kind).sum() for out in held_out]) <= 1
    losses = []
    for out in held_out:
        p = _fit("platt", score[~out], failure[~out])(score[out])
        losses += (-np.log(np.where(failure[out] == 1, p, 1 - p))).tolist()
    assert found.log_loss == {"platt": pytest.approx(np.mean(losses), rel=1e-9)}


def test_separated_scores_and_one_kind_alone_stay_short_of_certainty() -> None:
    score = np.linspace(-3, 3, 100)
    apart = fit_calibrator(score, (score > 0).astype(np.int64), is_log_odds=False)
    assert 0.9 < apart(np.array([3.0]))[0] < 1
    alone = fit_calibrator(score, np.zeros(100, dtype=np.int64), is_log_odds=False)
    assert alone(score).max() < 2 / 102
    # Platt's target for a success is 1 / (N + 2). A constant fits this target exactly.
    assert alone(score) == pytest.approx(np.full(100, 1 / 102), rel=1e-2)


def test_a_calibrator_is_read_as_it_was_written() -> None:
    for made in (
        _fit("beta", *sample(200, special.expit)),
        _fit("isotonic", *sample(200, special.expit)),
    ):
        again = read_calibrator(json.loads(made.model_dump_json()))
        assert again == made
        assert type(again) in {Logistic, Isotonic}
    good = json.loads(_fit("isotonic", *sample(200, special.expit)).model_dump_json())
    bad = [
        {"form": "guess"},
        {**good, "score": good["score"][::-1]},
        {**good, "probability": good["probability"][:-1]},
        {**good, "probability": [2.0] * len(good["score"])},
        {"form": "platt", "weights": [], "intercept": 0, "n": 1, "n_failures": 0},
        [],
    ]
    for value in bad:
        with pytest.raises(DataError, match="no calibrator"):
            read_calibrator(value)


@pytest.fixture(scope="module")
def calibration() -> Embeddings:
    return toy_embeddings(n=500, seed=5, ids_from=50_000)


def test_a_calibrated_predictor_is_better_calibrated(
    train: Embeddings, test: Embeddings, calibration: Embeddings
) -> None:
    predictor = vilu.MCM()
    failure = vilu.score(predictor, test).failure
    before = predictor.predict_failure_probability(test)
    after = predictor.calibrate_probability(calibration).predict_failure_probability(test)
    assert ece(after, failure, binning="mass") < 0.7 * ece(before, failure, binning="mass")
    assert brier(after, failure) < brier(before, failure)
    order = np.argsort(before, kind="stable")
    assert (np.diff(after[order]) >= -1e-12).all()
    assert np.array_equal(predictor.predict_uncertainty(test), vilu.MCM().predict_uncertainty(test))


def test_a_score_becomes_a_probability(
    train: Embeddings, test: Embeddings, calibration: Embeddings, tmp_path
) -> None:
    predictor = vilu.Entropy()
    with pytest.raises(UsageError, match="a score, not a probability"):
        predictor.predict_failure_probability(test)
    predictor.calibrate_probability(calibration)
    probability = predictor.predict_failure_probability(test)
    # The tolerance is 3 sigma for 500 rows.
    assert probability.mean() == pytest.approx(vilu.score(predictor, test).failure.mean(), abs=0.06)
    fingerprint = predictor.save(tmp_path)
    assert np.array_equal(vilu.load(tmp_path).predict_failure_probability(test), probability)
    assert vilu.Entropy().fit(train).save(tmp_path) != fingerprint
    assert predictor.fit(train).calibrator_ is None


def test_the_bias_of_a_weighted_loss_is_removed(train: Embeddings, test: Embeddings) -> None:
    quick = {
        "hidden": (16, 8),
        "epochs": 12,
        "batch_size": 64,
        "weighting": "static",
        "static_weight": 5.0,
    }
    predictor = vilu.ViLU(**quick).fit(train)
    u = predictor.predict_uncertainty(test)
    odds = special.logit(predictor.predict_failure_probability(test))
    assert odds == pytest.approx(special.logit(u.clip(1e-15, 1 - 1e-15)) - np.log(5), abs=1e-9)
    failure = vilu.score(predictor, test).failure
    assert abs(special.expit(odds).mean() - failure.mean()) < abs(u.mean() - failure.mean())
    regression = vilu.LVU(loss="mse", **quick).fit(train)
    assert regression.predict_failure_probability(test) == pytest.approx(
        regression.predict_uncertainty(test), abs=1e-12
    )
    # As published, the weight is -log e for each batch. On average e is the training set's failure
    # rate.
    published = vilu.ViLU(**{**quick, "weighting": "batch"}).fit(train)
    e = published.notes_["n_failures"] / published.notes_["n_train"]
    shift = special.logit(published.predict_uncertainty(test)) - special.logit(
        published.predict_failure_probability(test)
    )
    assert shift == pytest.approx(np.full(len(test), np.log(-np.log(e))), abs=1e-6)


def test_rows_that_were_fitted_on_are_refused(train: Embeddings, calibration: Embeddings) -> None:
    validation = toy_embeddings(n=100, seed=8, ids_from=70_000)
    predictor = vilu.ViLU(hidden=(8,), epochs=2).fit(train, validation)
    for used in (train, validation):
        with pytest.raises(
            DataError, match=f"{len(used)} of {len(used)} calibration rows were used to fit"
        ):
            predictor.calibrate_probability(used)
    assert predictor.calibrate_probability(calibration).calibrator_ is not None
    unlabelled = Embeddings(calibration.image, calibration.text, logit_scale=20.0)
    with pytest.raises(DataError, match="none of the 500 calibration rows"):
        predictor.calibrate_probability(unlabelled)


def test_a_damaged_calibrator_is_refused(calibration: Embeddings, tmp_path) -> None:
    vilu.MCM().calibrate_probability(calibration).save(tmp_path)
    record = json.loads((tmp_path / "predictor.json").read_text())
    record["calibrator"]["weights"] = "many"
    write_json(tmp_path / "predictor.json", record, "fingerprint")
    with pytest.raises(DataError, match="no calibrator"):
        vilu.load(tmp_path)


def test_unusable_rows_have_no_probability(calibration: Embeddings) -> None:
    image = calibration.image.clone()
    image[3] = torch.nan
    broken = Embeddings(image, calibration.text, target=calibration.target, logit_scale=20.0)
    probability = vilu.MCM().calibrate_probability(broken).predict_failure_probability(broken)
    assert np.flatnonzero(np.isnan(probability)).tolist() == [3]


# The first case passes scores in place of failures.
@pytest.mark.parametrize("failure", [[0.1, 0.3], [0.0, np.nan], [0, 2]])
def test_failures_to_calibrate_on_are_failures(failure: list[float]) -> None:
    with pytest.raises(DataError, match="failure must hold whole numbers from -1"):
        vilu.Margin().calibrate_scores([0, 1], failure)
