"""Test a classifier's logits instead of text embeddings."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, logsumexp, softmax

import vilu
from vilu import PREDICTORS
from vilu.embeddings.logits import LogitEmbeddings
from vilu.errors import DataError, ProvenanceError, UsageError
from vilu.predictors.contract.given_logits import inputs_of
from vilu.predictors.persistence.onnx import export_onnx
from vilu.scoring.score import source_fingerprint

NAMES = ["ant", "bee", "cat", "dog", "elk"]
QUICK = {"hidden": (16, 8), "epochs": 2, "batch_size": 64, "width": 16}
OF_LOGITS = [name for name in PREDICTORS.names() if inputs_of(PREDICTORS[name]) == {"logits"}]
OF_VECTORS = [name for name in PREDICTORS.names() if "image" in inputs_of(PREDICTORS[name])]
NEED_TEXTS = [name for name in PREDICTORS.names() if not inputs_of(PREDICTORS[name])]


class Rows(NamedTuple):
    """The same rows as embeddings with texts, as logits with features, and as logits alone."""

    embedded: vilu.Embeddings
    featured: LogitEmbeddings
    bare: LogitEmbeddings


def rows(n: int, seed: int) -> Rows:
    """Return rows from five classes, where a fifth of the answers are wrong."""
    fixed = np.random.default_rng(9)
    text = unit(fixed.normal(size=(5, 24)))
    centre = text + 0.7 * fixed.normal(size=(5, 24)) / 24**0.5
    rng = np.random.default_rng(seed)
    target = rng.integers(5, size=n)
    image = unit(centre[target] + 1.6 * rng.normal(size=(n, 24)) / 24**0.5)
    embedded = vilu.Embeddings(
        image, text, target=target, logit_scale=20.0, logit_bias=-3.0, class_names=NAMES
    )
    logits = next(embedded.batches(n)).logits
    featured = vilu.Embeddings.from_logits(logits, image, target, NAMES)
    bare = vilu.Embeddings.from_logits(logits, None, target, NAMES)
    return Rows(embedded, featured, bare)


def unit(values: np.ndarray) -> np.ndarray:
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def train() -> Rows:
    return rows(300, seed=1)


@pytest.fixture(scope="module")
def new() -> Rows:
    return rows(200, seed=2)


def make(name: str, **more: object) -> vilu.FailurePredictor:
    method = PREDICTORS[name]
    known = method().get_params()
    quick = {key: value for key, value in QUICK.items() if key in known}
    return method(**quick, **more)


def quietly_fitted(name: str, data: vilu.EmbeddingSource) -> vilu.FailurePredictor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few epochs
        return make(name).fit(data)


@pytest.mark.parametrize("name", OF_LOGITS)
def test_scores_of_logits_are_those_of_image_and_text(name: str, train: Rows, new: Rows) -> None:
    expected = quietly_fitted(name, train.embedded).predict_uncertainty(new.embedded)
    for kind in ("featured", "bare"):
        predictor = quietly_fitted(name, getattr(train, kind))
        assert np.array_equal(predictor.predict_uncertainty(getattr(new, kind)), expected)


@pytest.mark.parametrize("name", [name for name in OF_VECTORS if name != "vilu_plus"])
def test_scores_of_vectors_need_no_texts(name: str, train: Rows, new: Rows) -> None:
    expected = quietly_fitted(name, train.embedded).predict_uncertainty(new.embedded)
    uncertainty = quietly_fitted(name, train.featured).predict_uncertainty(new.featured)
    assert np.array_equal(uncertainty, expected)


@pytest.mark.parametrize("name", OF_VECTORS)
def test_vectors_that_lack_are_named(name: str, train: Rows) -> None:
    with pytest.raises(
        DataError, match=r"needs a vector of every row.* These methods need logits alone: mcm,"
    ):
        make(name).fit(train.bare)


@pytest.mark.parametrize("name", NEED_TEXTS)
def test_texts_that_lack_are_named(name: str, train: Rows) -> None:
    message = (
        r"needs embeddings of the candidates.* These need features of the rows, too: vilu_plus"
    )
    with pytest.raises(DataError, match=message):
        make(name).fit(train.featured)


def test_scores_are_the_formulas_of_numpy(new: Rows) -> None:
    logits = np.random.default_rng(3).normal(size=(50, 7)) * 4
    data = vilu.Embeddings.from_logits(logits)
    p = softmax(logits, axis=1)
    top = np.sort(logits, axis=1)
    expected = {
        "mcm": 1 - p.max(axis=1),
        "entropy": -(p * log_softmax(logits, axis=1)).sum(axis=1) / np.log(7),
        "margin": top[:, -2] - top[:, -1],
        "max_logit": -top[:, -1],
        "energy": -logsumexp(logits, axis=1),
        "doctor": 1 / (p**2).sum(axis=1) - 1,
    }
    for name, uncertainty in expected.items():
        # float32 logits up to 16 are exact to 1e-6
        assert np.allclose(make(name).predict_uncertainty(data), uncertainty, atol=2e-5), name


def test_answers_of_scikit_learn_stay(new: Rows) -> None:
    from sklearn.linear_model import LogisticRegression

    image, target = new.embedded.image.numpy(), new.embedded.target.numpy()
    model = LogisticRegression().fit(image, target)
    data = vilu.Embeddings.from_logits(model.decision_function(image), image, target, NAMES)
    outcomes = vilu.score(vilu.MCM(), data)
    assert np.array_equal(outcomes.prediction, model.predict(image))
    assert np.allclose(outcomes.uncertainty, 1 - model.predict_proba(image).max(axis=1), atol=1e-6)


def test_rounding_to_float32_changes_no_answer() -> None:
    logits = np.full((3, 4), 20.0)
    logits[0, 2] += 1e-9  # float32 has no number between 20 and 20 + 1.9e-6
    logits[1, 3] += 1e-9
    outcomes = vilu.score(vilu.MCM(), vilu.Embeddings.from_logits(logits))
    assert outcomes.prediction.tolist() == [2, 3, 0]  # among equal logits the first wins


def test_a_bias_and_a_subset_of_classes_stay(new: Rows) -> None:
    logits = next(new.embedded.batches(200)).logits
    assert torch.equal(next(new.featured.batches(200)).logits, logits)
    taken = new.featured.take([5, 3], classes=[4, 0, 1])
    assert torch.equal(next(taken.batches(2)).logits, logits[[5, 3]][:, [4, 0, 1]])
    assert taken.class_names == ("elk", "ant", "bee")


def test_training_losses_are_those_of_image_and_text(new: Rows) -> None:
    expected = next(new.embedded.batches(200)).target_log_probability
    assert torch.allclose(next(new.bare.batches(200)).target_log_probability, expected, atol=1e-5)


def test_rows_that_are_not_finite_have_no_score() -> None:
    logits = np.zeros((3, 2))
    logits[0, 0] = np.inf
    data = vilu.Embeddings.from_logits(logits, features=[[1.0, 0.0], [0.0, 0.0], [0.0, 2.0]])
    outcomes = vilu.score(vilu.MCM(), data)
    assert outcomes.reason == ("nonfinite", "zero_norm", None)
    assert np.isnan(outcomes.uncertainty).tolist() == [True, True, False]


def test_targets_of_logits_may_be_names() -> None:
    names = ["cat", "dog"]
    target = ["dog", "cat", "", "(outside)"]
    data = vilu.Embeddings.from_logits(np.eye(2)[[0, 1, 0, 1]], None, target, names)
    assert data.target.tolist() == [1, 0, -1, -1]
    assert data.outside.tolist() == [False, False, False, True]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"logits": [1.0, 2.0]}, "logits must be a matrix"),
        ({"logits": [["a", "b"]]}, "logits must hold real numbers"),
        ({"features": [[1.0]]}, r"one row per row of logits \(2\). Got 1"),
        ({"target": [0, 3]}, "target must be a row of text, 0 to 1"),
        ({"target": ["cow", "cat"], "class_names": ["cat", "dog"]}, "'cow'"),
        ({"class_names": ["cat"]}, "one name per text row"),
        ({"class_names": ["cat", "cat"]}, "must have different names.*'cat'"),
        ({"answer": ["cow", "cat"], "class_names": ["cat", "dog"]}, "'cow'"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        vilu.Embeddings.from_logits(**{"logits": [[0.0, 1.0], [1.0, 0.0]], **arguments})


def test_vilu_plus_learns_from_logits_and_features(train: Rows, new: Rows) -> None:
    failure = vilu.score(vilu.MCM(), new.bare).failure
    plain = vilu.metrics.auroc(vilu.MCM().predict_uncertainty(new.bare), failure)
    of_logits = make("vilu_plus", seed=0).fit(train.featured)
    gained = vilu.metrics.auroc(of_logits.predict_uncertainty(new.featured), failure) - plain
    with_texts = make("vilu_plus", seed=0).fit(train.embedded)
    gained_with_texts = (
        vilu.metrics.auroc(with_texts.predict_uncertainty(new.embedded), failure) - plain
    )
    # 31 failures in 200 rows: the standard error of a difference between two AUROCs is about 3
    # points
    assert gained > 0.05
    assert gained > gained_with_texts - 0.03


def test_vilu_plus_adapts_answers_to_features(train: Rows, new: Rows) -> None:
    adapted = make("vilu_plus", answer="adapted").fit(train.featured)
    wrong = vilu.score(adapted, new.featured).failure.mean()
    assert wrong < vilu.score(vilu.MCM(), new.bare).failure.mean() - 0.03


def test_streamed_and_held_fits_agree(new: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    many = rows(2_000, seed=3).featured
    held = make("vilu_plus").fit(many).predict_uncertainty(new.featured)
    monkeypatch.setattr("vilu.predictors.nn.attention.SCORING_BATCH", 500)
    streamed = make("vilu_plus").fit(many).predict_uncertainty(new.featured)
    assert np.abs(held - streamed).max() < 0.02  # the streamed fit stops earlier


def test_a_calibrated_model_decides_and_is_saved(new: Rows, tmp_path: Path) -> None:
    parts = rows(900, seed=4).featured.split(fit=0.4, calibration=0.4, test=0.2)
    model = vilu.Selective(make("vilu_plus")).fit(parts.fit)
    model.calibrate(parts.calibration, max_risk=0.1)
    outcomes = model.predict(parts.test)
    accepted = np.array(outcomes.decision) == "accept"
    assert accepted.mean() > 0.5
    # for 160 rows, three standard errors of the share are 0.07
    assert outcomes.failure[accepted].mean() <= 0.1 + 0.07
    model.save(tmp_path / "model")
    again = vilu.Selective.load(tmp_path / "model").predict(parts.test)
    assert np.array_equal(again.uncertainty, outcomes.uncertainty)
    assert not (tmp_path / "model" / "vocabulary.safetensors").exists()


def test_a_fit_takes_no_other_classes(train: Rows, new: Rows) -> None:
    fitted = make("vilu_plus").fit(train.featured)
    turned = new.featured.take(range(200), classes=[1, 0, 2, 3, 4])
    for data in (turned, new.featured.take(range(200), classes=[0, 1])):
        with pytest.raises(ProvenanceError, match="the same classes in the same order"):
            fitted.predict_uncertainty(data)
    # A calibration for logits does not decide about embeddings with the same names, or the
    # reverse.
    for first, second in ((new.bare, new.embedded), (new.embedded, new.bare)):
        model = vilu.Selective(vilu.MCM()).calibrate(first, max_risk=0.3)
        with pytest.raises(ProvenanceError, match="not valid for them"):
            model.predict(second)


def test_equal_logits_without_features_are_no_copies() -> None:
    # a forest with ten trees has few different probabilities
    p = np.random.default_rng(0).integers(1, 10, size=400) / 10
    logits = np.log(np.stack([p, 1 - p], axis=1))
    target = (np.random.default_rng(1).random(400) > p).astype(int)
    parts = vilu.Embeddings.from_logits(logits, target=target).split(fit=0.5, calibration=0.5)
    model = vilu.Selective(make("mcm_ts")).fit(parts.fit)
    model.calibrate(parts.calibration, max_risk=0.3)
    assert model.calibration.n == len(parts.calibration)  # each row counts
    named = vilu.Embeddings.from_logits(logits, target=target, ids=list_of_ids(400))
    fitted = make("mcm_ts").fit(named.take(range(0, 400, 2)))
    assert fitted.seen(named.take(range(150))).shared.sum() == 75


def list_of_ids(n: int) -> list[str]:
    return [f"row {i}" for i in range(n)]


def test_unlabelled_rows_and_exports_are_refused(train: Rows, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unlabelled rows out"):
        make("vilu_plus").fit(train.featured, unlabelled=train.featured)
    make("vilu_plus").fit(train.featured).save(tmp_path / "predictor")
    with pytest.raises(UsageError, match="given logits"):
        export_onnx(tmp_path / "predictor", tmp_path / "score.onnx")
    with pytest.raises(UsageError, match="embeddings of texts"):
        vilu.TwoModels(train.embedded, train.bare)


def test_the_fingerprint_sees_the_logits() -> None:
    first = vilu.Embeddings.from_logits([[0.0, 1.0]])
    assert source_fingerprint(first) == source_fingerprint(
        vilu.Embeddings.from_logits([[0.0, 1.0]])
    )
    assert source_fingerprint(first) != source_fingerprint(
        vilu.Embeddings.from_logits([[0.0, 2.0]])
    )
