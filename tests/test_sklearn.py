"""Test the scikit-learn classifier: its conventions, and what it accepts."""

from __future__ import annotations

import subprocess
import sys
import warnings

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.ensemble import RandomForestClassifier
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from sklearn.utils.estimator_checks import check_estimator

from vilu.errors import UsageError
from vilu.sklearn import REVIEW, SelectiveClassifier


def rows(n: int, seed: int) -> tuple[NDArray[np.float64], NDArray[np.str_]]:
    """Return rows from two classes that overlap, so that one answer in six is wrong."""
    rng = np.random.default_rng(seed)
    label = rng.integers(2, size=n)
    return rng.normal(size=(n, 3)) + 2 * label[:, None] * [1, 0, 0], np.array(["no", "yes"])[label]


def test_it_keeps_every_convention_of_scikit_learn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on few rows nothing is accepted
        check_estimator(SelectiveClassifier(LogisticRegression(), random_state=0))


@pytest.mark.parametrize(
    "estimator", [LogisticRegression(), RandomForestClassifier(min_samples_leaf=50, random_state=0)]
)
def test_the_accepted_answers_keep_the_risk(estimator: object) -> None:
    model = SelectiveClassifier(estimator, max_risk=0.08, random_state=0).fit(*rows(6_000, 1))
    image, label = rows(20_000, 2)
    wrong = model.predict(image) != label
    accepted = model.accept(image)
    assert wrong.mean() > 0.12
    assert accepted.mean() > 0.3
    # the guarantee, plus four standard errors of the share on these rows
    assert wrong[accepted].mean() < 0.08 + 4 * np.sqrt(0.08 * 0.92 / accepted.sum())
    answers = model.predict_or_review(image)
    assert np.array_equal(answers == np.array(REVIEW), ~accepted)
    assert np.array_equal(answers[accepted], model.predict(image)[accepted])
    assert model.score(image, label) == pytest.approx(1 - wrong.mean())


@pytest.mark.filterwarnings("ignore:nothing is accepted")
def test_broken_guarantees_are_rarer_than_stated() -> None:
    n_broken = 0
    image, label = rows(20_000, 3)
    for seed in range(60):
        model = SelectiveClassifier(
            LogisticRegression(), max_risk=0.1, confidence=0.9, random_state=seed
        )
        accepted = model.fit(*rows(1_000, 100 + seed)).accept(image)
        wrong = model.predict(image)[accepted] != label[accepted]
        n_broken += bool(len(wrong) and wrong.mean() > 0.1)
    assert n_broken <= 60 * 0.1 + 3 * np.sqrt(60 * 0.1 * 0.9)


def test_nothing_is_accepted_where_nothing_can_be_certified() -> None:
    image, label = rows(40, 1)
    model = SelectiveClassifier(LogisticRegression(), max_risk=0.01, random_state=0)
    with pytest.warns(UserWarning, match="nothing is accepted: a risk of 1.00% needs"):
        model.fit(image, label)
    assert not model.accept(image).any()
    assert set(model.predict(image)) == {"no", "yes"}  # the model still answers
    with pytest.warns(UserWarning, match="no row is left for calibration"):
        model.fit(*(part[:2] for part in (np.array([[0.0], [1.0]]), np.array([0, 1]))))
    assert not model.accept([[0.0]]).any()


def test_a_fitted_estimator_is_calibrated_as_it_is() -> None:
    fitted = LogisticRegression().fit(*rows(1_000, 1))
    model = SelectiveClassifier(fitted, prefit=True).fit(*rows(1_000, 2))
    assert model.estimator_ is fitted
    assert model.rule_.n == 1_000
    other = SelectiveClassifier(FrozenEstimator(fitted), prefit=True)
    scores = cross_val_score(other, *rows(900, 3), cv=3)
    assert scores.min() > 0.75


@pytest.mark.filterwarnings("ignore:nothing is accepted")
def test_it_is_a_part_of_pipelines_and_searches() -> None:
    model = make_pipeline(
        StandardScaler(), SelectiveClassifier(LogisticRegression(), random_state=0)
    )
    assert cross_val_score(model, *rows(1_500, 1), cv=3).min() > 0.75
    inner = SelectiveClassifier(make_pipeline(StandardScaler(), LogisticRegression()))
    inner.set_params(estimator__logisticregression__C=0.5, random_state=1)
    again = clone(inner)
    assert again.get_params()["estimator__logisticregression__C"] == 0.5
    first, second = (m.fit(*rows(900, 1)).accept(rows(50, 2)[0]) for m in (inner, again))
    assert np.array_equal(first, second)


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(UsageError, match="LinearSVC has no predict_proba"):
        SelectiveClassifier(LinearSVC()).fit(*rows(50, 1))
    with pytest.raises(UsageError, match="max_risk must be in"):
        SelectiveClassifier(LogisticRegression(), max_risk=5).fit(*rows(50, 1))


def test_importing_vilu_does_not_import_it() -> None:
    code = "import sys, vilu; print('vilu.sklearn' in sys.modules, 'sklearn' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
