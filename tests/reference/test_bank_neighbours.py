"""Test scores from nearest training images against scikit-learn and loops over all pairs."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from tests.builders.bank_data import answers, clusters, images, unit, with_targets
from vilu.embeddings.memory import Embeddings
from vilu_bench.methods.delta import DeltaKNN, DeltaKNNMargin
from vilu_bench.methods.neighbours import TRINE, KNNDistance, KNNVote, TrustScore

# Cosines are float32 sums with six products, and off by less than 6 * 2^-24 < 4e-7. Nothing below
# divides by less than 0.1.
ATOL = 1e-5
TRAIN, TEST = clusters(80), clusters(50, seed=1)


def distances(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.linalg.norm(one[:, None] - other[None], axis=2)


@pytest.mark.parametrize("k", [1, 7, 500])
def test_distance_to_the_kth_neighbour(k: int) -> None:
    n = min(k, len(TRAIN))
    reference = (
        NearestNeighbors(n_neighbors=n).fit(images(TRAIN)).kneighbors(images(TEST))[0][:, -1]
    )
    found = KNNDistance(k=k).fit(TRAIN).predict_uncertainty(TEST)
    np.testing.assert_allclose(found, reference, atol=ATOL)


@pytest.mark.parametrize("k", [1, 20, 500])
@pytest.mark.parametrize("weighting", ["uniform", "similarity"])
def test_vote(k: int, weighting: str) -> None:
    # For unit vectors this is (1 + cos) / 2.
    weights = "uniform" if weighting == "uniform" else lambda d: 1 - d**2 / 4
    model = KNeighborsClassifier(n_neighbors=min(k, len(TRAIN)), weights=weights).fit(
        images(TRAIN), TRAIN.target
    )
    share = model.predict_proba(images(TEST))[np.arange(len(TEST)), answers(TEST)]
    found = KNNVote(k=k, weighting=weighting).fit(TRAIN).predict_uncertainty(TEST)
    np.testing.assert_allclose(found, 1 - share, atol=ATOL)


def trine(train: Embeddings, z: np.ndarray, answer: int, k: int, decay: float) -> float:
    text, target = unit(train.text.numpy()), train.target.numpy()
    cosine = images(train) @ z
    support = dict.fromkeys(range(len(text)), 0.0)
    for r, row in enumerate(np.argsort(-cosine, kind="stable")[:k]):
        texts = (1 + text[answer] @ text[target[row]]) / 2
        support[target[row]] += math.exp(-decay * r) * (1 + cosine[row]) / 2 * texts
    total = sum(support.values())
    return 1 - (support[answer] - max(s for c, s in support.items() if c != answer)) / total


@pytest.mark.parametrize(("k", "decay"), [(20, 0.1), (3, 0.0), (500, 0.5)])
def test_trine(k: int, decay: float) -> None:
    found = TRINE(k=k, decay=decay).fit(TRAIN).predict_uncertainty(TEST)
    expected = [
        trine(TRAIN, z, t, k, decay) for z, t in zip(images(TEST), answers(TEST), strict=True)
    ]
    np.testing.assert_allclose(found, expected, atol=ATOL)


def dense(rows: np.ndarray, k: int, alpha: float) -> np.ndarray:
    radius = np.sort(distances(rows, rows), axis=1)[:, min(k, len(rows)) - 1]
    return rows[radius <= np.percentile(radius, 100 * (1 - alpha))]


@pytest.mark.parametrize(("k", "alpha"), [(10, 0.0), (10, 0.25), (3, 0.5)])
def test_trust_score(k: int, alpha: float) -> None:
    target = TRAIN.target.numpy()
    sets = [images(TRAIN)[target == c] for c in range(4)]
    sets = [dense(rows, k, alpha) if alpha else rows for rows in sets]
    to_class = np.stack([distances(images(TEST), rows).min(axis=1) for rows in sets], axis=1)
    mine = to_class[np.arange(len(TEST)), answers(TEST)]
    rival = np.where(np.arange(4) == answers(TEST)[:, None], np.inf, to_class).min(axis=1)
    predictor = TrustScore(alpha=alpha, k=k).fit(TRAIN)
    assert len(predictor.learned_["bank"]) == sum(map(len, sets))
    np.testing.assert_allclose(
        predictor.predict_uncertainty(TEST), (mine + 1e-6) / (rival + 1e-6), rtol=1e-4
    )


@pytest.mark.parametrize(("k", "margin_weight"), [(25, 0.0), (4, 10.0)])
def test_delta_knn(k: int, margin_weight: float) -> None:
    right = answers(TRAIN) == TRAIN.target.numpy()
    assert 4 < np.sum(~right) < 25
    terms = []
    for bank in (images(TRAIN)[right], images(TRAIN)[~right]):
        nearest = np.sort(distances(images(TEST), bank), axis=1)[:, :k]
        terms.append(np.mean(np.log(nearest**2 + 1e-6), axis=1))
    cosines = np.sort(images(TEST) @ unit(TRAIN.text.numpy()).T, axis=1)
    expected = terms[0] - terms[1] - margin_weight * (cosines[:, -1] - cosines[:, -2])
    found = DeltaKNN(k=k, margin_weight=margin_weight).fit(TRAIN).predict_uncertainty(TEST)
    # The nearest squared distance is above 0.005. So its logarithm is off by at most 2 * 4e-7 /
    # 0.005 < 2e-4.
    np.testing.assert_allclose(found, expected, atol=2e-4)


def test_delta_knn_margin_is_delta_knn_with_the_margin() -> None:
    same = DeltaKNN(margin_weight=10.0).fit(TRAIN)
    assert np.array_equal(
        DeltaKNNMargin().fit(TRAIN).predict_uncertainty(TEST), same.predict_uncertainty(TEST)
    )


@pytest.mark.parametrize("right", [True, False])
def test_delta_knn_with_one_bank_is_the_density_of_the_other(right: bool) -> None:
    target = answers(TRAIN) if right else (answers(TRAIN) + 1) % 4
    found = DeltaKNN(k=3).fit(with_targets(TRAIN, target)).predict_uncertainty(TEST)
    nearest = np.sort(distances(images(TEST), images(TRAIN)), axis=1)[:, :3]
    expected = np.mean(np.log(nearest**2 + 1e-6), axis=1) * (1 if right else -1)
    np.testing.assert_allclose(found, expected, atol=2e-4)


def square() -> Embeddings:
    """Return two training images along the first axis and one along the second.

    The third class has none.
    """
    return Embeddings(
        [[1.0, 0, 0], [1, 0, 0], [0, 1, 0]], np.eye(3), target=[0, 0, 1], logit_scale=10.0
    )


def test_a_class_without_images_by_hand() -> None:
    query = Embeddings(np.eye(3), np.eye(3), target=None, logit_scale=10.0)  # answered 0, 1, 2
    vote = KNNVote(k=2).fit(square()).predict_uncertainty(query)
    assert vote[[0, 2]].tolist() == [0.0, 1.0]
    # The neighbours are its own image and the first among two that are equally near.
    assert vote[1] == pytest.approx(0.5)
    # Texts at right angles count half. For answer 2, class 0 has the support 1/2 (1 + e^-0.1), and
    # class 1 has e^-0.2 / 2.
    w = [1, math.exp(-0.1), math.exp(-0.2)]
    assert TRINE().fit(square()).predict_uncertainty(query)[2] == pytest.approx(
        1 + (w[0] + w[1]) / sum(w), abs=1e-6
    )
    trust = TrustScore().fit(square()).predict_uncertainty(query)
    assert trust[2] == pytest.approx(2 / math.sqrt(2), rel=1e-5)
    assert trust[0] == pytest.approx(1e-6 / math.sqrt(2), rel=1e-5)


def test_one_class_only_by_hand() -> None:
    train = Embeddings([[1.0, 0, 0], [0.6, 0.8, 0]], np.eye(3), target=[0, 0], logit_scale=10.0)
    query = Embeddings([[1.0, 0, 0], [0, 0, 1]], np.eye(3), target=None, logit_scale=10.0)
    assert KNNVote().fit(train).predict_uncertainty(query).tolist() == [0, 1]
    assert TRINE().fit(train).predict_uncertainty(query).tolist() == pytest.approx([0, 2])
    # A class without images has the distance 2. For the first query no other class has images. For
    # the second query its own class 2 has none, and class 0 is sqrt(2) away.
    assert TrustScore().fit(train).predict_uncertainty(query) == pytest.approx(
        [0, math.sqrt(2)], abs=1e-6
    )


def test_opposite_neighbours_do_not_divide_by_zero() -> None:
    """Scores must stay finite if an image or text is exactly opposite.

    Here the nearest images are opposite to the query, or their class's text is opposite to the
    answer's text.
    """
    query = Embeddings(
        [[1.0, 0.0]], [[1.0, 0.0], [-1.0, 0.0]], target=None, logit_scale=10.0
    )  # answered 0
    same = Embeddings([[1.0, 0.0]] * 3, query.text, target=[1, 1, 1], logit_scale=10.0)
    opposite = Embeddings([[-1.0, 0.0]] * 3, query.text, target=[0, 1, 1], logit_scale=10.0)
    # Class 1 has all support.
    assert TRINE().fit(same).predict_uncertainty(query).tolist() == [2]
    # Images weigh alike. Texts give class 0 so much weight that class 1 has 1e-6 times its support.
    assert TRINE(decay=0).fit(opposite).predict_uncertainty(query) == pytest.approx([0], abs=4e-6)
    assert KNNVote(weighting="similarity").fit(opposite).predict_uncertainty(
        query
    ) == pytest.approx([2 / 3])


def test_equal_images_in_two_classes_do_not_divide_by_zero() -> None:
    train = Embeddings([[1.0, 0], [1, 0]], np.eye(2), target=[0, 1], logit_scale=10.0)
    query = Embeddings([[1.0, 0]], np.eye(2), target=None, logit_scale=10.0)
    assert TrustScore().fit(train).predict_uncertainty(query).tolist() == [1.0]
