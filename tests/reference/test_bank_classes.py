"""Test the linear probe against scikit-learn, TrustVLM against loops, and every bank method with
one image per class.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from tests.builders.bank_data import answers, clusters, images, posterior, with_targets
from tests.conftest import in_memory
from vilu import PREDICTORS
from vilu.embeddings.memory import Embeddings
from vilu.errors import ProvenanceError
from vilu.predictors.bank.linear_probe import LinearProbe
from vilu_bench.methods.trustvlm import TrustVLM, draw_per_class

TRAIN, TEST = clusters(80), clusters(50, seed=1)
BANK = [name for name, method in PREDICTORS.items() if ".bank." in method.__module__]


@pytest.mark.parametrize("n_known", [4, 3, 2])
@pytest.mark.parametrize("c", [100.0, 0.1])
def test_linear_probe(n_known: int, c: float) -> None:
    target = np.minimum(TRAIN.target.numpy(), n_known - 1)
    model = LogisticRegression(C=c, max_iter=10_000, tol=1e-9).fit(
        TRAIN.image.double().numpy(), target
    )
    probability = model.predict_proba(TEST.image.double().numpy())
    expected = [
        1 - row[t] if t < n_known else 1.0
        for row, t in zip(probability, answers(TEST), strict=True)
    ]
    predictor = LinearProbe(C=c).fit(with_targets(TRAIN, target))
    # The reference goes on to the optimum. Ours stops at a gradient norm 1e-4, which moves a logit
    # by about 1e-2.
    np.testing.assert_allclose(predictor.predict_failure_probability(TEST), expected, atol=5e-3)


def test_linear_probe_stops_near_the_optimum() -> None:
    """The objective must be near its minimum.

    By strong convexity it lies at most |gradient|^2 / (2 / (C n)) above the minimum.
    """

    def objective(weight: np.ndarray, bias: np.ndarray) -> float:
        loss = log_loss(
            TRAIN.target.numpy(), softmax(TRAIN.image.double().numpy() @ weight.T + bias, axis=1)
        )
        return float(loss + np.sum(weight**2) / (2 * 100.0 * 80))

    model = LogisticRegression(C=100.0, max_iter=10_000, tol=1e-9).fit(
        TRAIN.image.double().numpy(), TRAIN.target
    )
    learned = LinearProbe().fit(TRAIN).learned_
    gap = objective(learned["weight"].numpy(), learned["bias"].numpy()) - objective(
        model.coef_, model.intercept_
    )
    assert -1e-9 < gap < 28 * 1e-4**2 * 100.0 * 80 / 2  # 4 x (6 + 1) coefficients


def test_linear_probe_keeps_confident_images_apart() -> None:
    train, test = clusters(80, spread=0.02), clusters(50, seed=1, spread=0.02)
    predictor = LinearProbe().fit(train)
    predictor.learned_["weight"] *= 10
    uncertainty = predictor.predict_uncertainty(test)
    assert uncertainty.max() < 1e-17  # 1 - P rounds to zero
    assert len(np.unique(uncertainty)) == len(test)


def test_linear_probe_of_one_class() -> None:
    predictor = LinearProbe().fit(with_targets(TRAIN, np.full(80, 2)))
    assert np.array_equal(predictor.predict_uncertainty(TEST), (answers(TEST) != 2).astype(float))


def test_linear_probe_is_sure_that_classes_without_images_are_no_answer() -> None:
    predictor = LinearProbe().fit(with_targets(TRAIN, TRAIN.target.numpy() % 2))
    assert (
        predictor.predict_uncertainty(TEST.take(range(50), classes=[2, 3])).tolist() == [1.0] * 50
    )


def test_linear_probe_says_when_it_has_not_settled() -> None:
    with pytest.warns(ConvergenceWarning, match="failed to converge"):
        LinearProbe(max_iter=2).fit(TRAIN)


@pytest.mark.parametrize(("shots", "weight"), [(1, 1.0), (16, 0.1), (1000, 2.0)])
def test_trustvlm(shots: int, weight: float) -> None:
    target = np.where(TRAIN.target.numpy() == 3, 0, TRAIN.target.numpy())  # class 3 has no images
    train = with_targets(TRAIN, target)
    kept = draw_per_class(train.target, shots, seed=0).numpy()
    features = train.column("features", torch.arange(80)).double().numpy()
    expected = []
    for p, f, t in zip(
        posterior(TEST).max(axis=1),
        TEST.column("features", torch.arange(50)),
        answers(TEST),
        strict=True,
    ):
        prototype = features[[row for row in kept if target[row] == t]].sum(axis=0)
        length = np.linalg.norm(prototype) * np.linalg.norm(f)
        expected.append(1 - p + weight * (1 - (f.numpy() @ prototype / length if length else 0)))
    found = TrustVLM(shots=shots, weight=weight).fit(train).predict_uncertainty(TEST)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_shots_are_drawn_per_class() -> None:
    label = torch.tensor([2, 0, 2, 2, 0, 2, 5])
    kept = draw_per_class(label, 2, seed=0)
    assert torch.equal(kept, kept.sort().values)
    assert torch.bincount(label[kept]).tolist() == [2, 0, 2, 0, 0, 1]
    draws = {tuple(draw_per_class(label, 2, seed=seed).tolist()) for seed in range(20)}
    assert len(draws) > 1
    assert draw_per_class(label, 4, seed=0).tolist() == list(range(7))


def test_features_of_another_width_are_refused() -> None:
    narrow = Embeddings(
        TEST.image, TEST.text, target=None, logit_scale=20.0, columns={"features": np.ones((50, 3))}
    )
    with pytest.raises(ProvenanceError, match="features of width 5, and those to score have 3"):
        TrustVLM().fit(TRAIN).predict_uncertainty(narrow)


@pytest.mark.parametrize("name", BANK)
@pytest.mark.parametrize(("n_wrong", "d"), [(0, 64), (1, 768), (10, 64)])
@pytest.mark.filterwarnings("ignore:.*its probabilities say little")
def test_one_labelled_image_per_class(name: str, n_wrong: int, d: int) -> None:
    """With ten images, none, one or all answers are wrong. Scores must stay finite and differ."""
    test, pool = clusters(40, 10, d, seed=2, spread=0.03), clusters(60, 10, d, spread=0.03)
    first = np.unique(answers(pool), return_index=True)[1]
    target = np.arange(10)
    target[:n_wrong] = (target[:n_wrong] + 1) % 10
    train = with_targets(in_memory(pool, pool.usable_rows[first]), target)
    scores = PREDICTORS[name]().fit(train).predict_uncertainty(test)
    assert np.isfinite(scores).all()
    # Ten neighbours are all ten images, so they vote the same for every image.
    assert name == "knn_vote" or len(np.unique(scores)) > 1


@pytest.mark.filterwarnings("ignore:.*its probabilities say little")
@pytest.mark.filterwarnings("ignore:the largest cosine of a row")
def test_one_labelled_image_at_all() -> None:
    train = in_memory(TRAIN, TRAIN.usable_rows[:1])
    for name in BANK:
        assert np.isfinite(PREDICTORS[name]().fit(train).predict_uncertainty(TEST)).all()


def test_images_off_unit_norm_by_their_rounding_keep_their_scores() -> None:
    """Float16 embeddings may be off unit norm by 1e-3.

    They stay unchanged, and scores must not move.
    """
    stretched = Embeddings(TRAIN.image * 1.0009, TRAIN.text, target=TRAIN.target, logit_scale=20.0)
    plain = Embeddings(TRAIN.image, TRAIN.text, target=TRAIN.target, logit_scale=20.0)
    for name in ("knn_distance", "trust_score", "mahalanobis", "delta_knn"):
        scores = [
            PREDICTORS[name]().fit(train).predict_uncertainty(TEST) for train in (plain, stretched)
        ]
        np.testing.assert_allclose(scores[0], scores[1], atol=1e-4, rtol=1e-4)
    assert np.allclose(np.linalg.norm(images(stretched), axis=1), 1)
