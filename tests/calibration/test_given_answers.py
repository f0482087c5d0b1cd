"""Test the warning if given answers are better on fit rows than on calibration rows."""

from __future__ import annotations

import logging
import warnings

import numpy as np
import pytest

import vilu
from vilu import PREDICTORS


def rows(n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return images in five classes that overlap, and the classes."""
    target = rng.integers(5, size=n)
    image = np.eye(5, 20)[target] + 0.45 * rng.normal(size=(n, 20))
    return image / np.linalg.norm(image, axis=1, keepdims=True), target


def embeddings(image: np.ndarray, target: np.ndarray, answer: np.ndarray) -> vilu.Embeddings:
    return vilu.Embeddings(image, np.eye(5, 20), target=target, columns={"answer": answer})


def calibrated(fit: vilu.Embeddings, calibration: vilu.Embeddings) -> vilu.Selective:
    probe = PREDICTORS["linear_probe"](answer="given")
    return vilu.Selective(probe).fit(fit).calibrate(calibration, max_risk=0.4)


def test_in_sample_answers_warn_and_out_of_fold_ones_do_not() -> None:
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.model_selection import cross_val_predict

    rng = np.random.default_rng(0)
    image, target = rows(400, rng)
    new_image, new_target = rows(400, rng)
    forest = RandomForestClassifier(20, random_state=0).fit(image, target)
    calibration = embeddings(new_image, new_target, forest.predict(new_image))
    message = r"right for 99.8% of 400 fit rows and for 8.*standard error.*cross_val_predict"
    with pytest.warns(UserWarning, match=message):
        calibrated(embeddings(image, target, forest.predict(image)), calibration)
    out_of_fold = cross_val_predict(forest, image, target, cv=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = calibrated(embeddings(image, target, out_of_fold), calibration)
    assert model.predictor.notes_["given_answers"] == {
        "n": 400,
        "n_right": int((out_of_fold == target).sum()),
    }


def test_few_warnings_are_false() -> None:
    from vilu.calibration.given_answers import warn_of_in_sample_answers

    rng = np.random.default_rng(0)
    n_warned = 0
    n_runs = 4_000
    for _ in range(n_runs):
        accuracy = rng.uniform(0.6, 0.98)
        n_fit, n = rng.integers(50, 500, size=2).tolist()
        failure = (rng.random(n) > accuracy).astype(np.int64)
        outcomes = vilu.Outcomes(uncertainty=np.zeros(n), failure=failure)
        fitted = {"n": n_fit, "n_right": int(rng.binomial(n_fit, accuracy))}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warn_of_in_sample_answers(fitted, outcomes)
        n_warned += len(caught)
    # In a normal distribution, 0.13 % lie more than three standard errors above the mean. Three
    # standard errors of the count are 7 for 4,000 runs.
    assert n_warned <= 0.0013 * n_runs + 7


@pytest.mark.parametrize("name", ["pvu", "knn_distance", "entropy"])
def test_a_score_that_knows_no_answer_says_so(name: str, caplog: pytest.LogCaptureFixture) -> None:
    image, target = rows(100, np.random.default_rng(1))
    data = embeddings(image, target, np.roll(target, 1) % 5)
    quick = {"epochs": 1} if name == "pvu" else {}
    with caplog.at_level(logging.WARNING):
        PREDICTORS[name](answer="given", **quick).fit(data)
    assert f"{name} knows no answer" in caplog.text
