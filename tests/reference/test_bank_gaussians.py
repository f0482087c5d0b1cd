"""Test Gaussian scores against scikit-learn and SciPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import multivariate_normal
from sklearn.covariance import LedoitWolf
from sklearn.decomposition import PCA

from tests.builders.bank_data import SCALE, answers, clusters, posterior, unit, with_targets
from tests.conftest import in_memory
from vilu import PREDICTORS
from vilu.embeddings.memory import Embeddings
from vilu.errors import DataError
from vilu.predictors.bank.class_gaussians import ClassGaussians, squared_distances, whitener
from vilu_bench.methods.delta import DeltaMDS, DeltaMDSMargin
from vilu_bench.methods.icpe import ICPE
from vilu_bench.methods.mahalanobis import Mahalanobis, RelativeMahalanobis, ledoit_wolf

TRAIN, TEST = clusters(80), clusters(50, seed=1)
# Both sides start from the same float32 unit vectors and compute in float64. The floor changes a
# covariance by FLOOR = 1e-9 times its mean variance. Its smallest eigenvalue is here at least 1e-3
# times the mean variance. So an inverted covariance has a relative error up to 1e-9 / 1e-3 = 1e-6.
RTOL = 1e-5


def images(data: Embeddings) -> np.ndarray:
    return torch.nn.functional.normalize(data.image, dim=1).double().numpy()


def squares(rows: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    return np.einsum("nd,de,ne->n", rows - mean, np.linalg.inv(covariance), rows - mean)


def shared(rows: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Return the Ledoit-Wolf covariance around the class means.

    It has as many degrees of freedom as the class means leave.
    """
    centred = np.concatenate(
        [rows[target == c] - rows[target == c].mean(axis=0) for c in np.unique(target)]
    )
    estimate = LedoitWolf(assume_centered=True).fit(centred).covariance_
    return np.asarray(estimate) * len(rows) / (len(rows) - len(np.unique(target)))


@pytest.mark.parametrize(("n", "d"), [(200, 5), (12, 30), (2, 3)])
def test_ledoit_wolf(n: int, d: int) -> None:
    x = np.random.default_rng(0).normal(size=(n, d)) * np.arange(1, d + 1)
    matrix, fourth = torch.from_numpy(x.T @ x), float(np.sum(np.sum(x**2, axis=1) ** 2))
    reference = LedoitWolf(assume_centered=True).fit(x).covariance_
    np.testing.assert_allclose(
        ledoit_wolf(matrix, fourth, n).numpy(), reference, rtol=1e-9, atol=1e-9
    )


def test_whitening_and_distances() -> None:
    rng = np.random.default_rng(0)
    x, means, root = rng.normal(size=(7, 4)), rng.normal(size=(3, 4)), rng.normal(size=(4, 4))
    white = whitener(torch.from_numpy(root @ root.T)).numpy()
    found = squared_distances(torch.from_numpy(x @ white), torch.from_numpy(means @ white)).numpy()
    expected = np.stack([squares(x, mean, root @ root.T) for mean in means], axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("relative", [False, True])
def test_mahalanobis(relative: bool) -> None:
    z, target = images(TRAIN), TRAIN.target.numpy()
    means = np.stack([z[target == c].mean(axis=0) for c in range(4)])
    expected = squares(images(TEST), means[answers(TEST)], shared(z, target))
    if relative:
        expected -= squares(images(TEST), z.mean(axis=0), shared(z, np.zeros(len(z))))
    found = Mahalanobis(relative=relative).fit(TRAIN).predict_uncertainty(TEST)
    np.testing.assert_allclose(found, expected, rtol=RTOL, atol=1e-5)
    if relative:
        assert np.array_equal(RelativeMahalanobis().fit(TRAIN).predict_uncertainty(TEST), found)


def test_mahalanobis_to_a_class_without_images_is_to_all_images() -> None:
    target = np.where(TRAIN.target.numpy() == 2, 1, TRAIN.target.numpy())
    found = Mahalanobis().fit(with_targets(TRAIN, target)).predict_uncertainty(TEST)
    z = images(TRAIN)
    expected = squares(images(TEST), z.mean(axis=0), shared(z, target))
    absent = answers(TEST) == 2
    assert absent.any()
    np.testing.assert_allclose(found[absent], expected[absent], rtol=RTOL)


@pytest.mark.filterwarnings("ignore:the largest cosine of a row")
def test_mahalanobis_without_spread_is_euclidean() -> None:
    train = Embeddings(np.eye(3)[:2], np.eye(3)[:2], target=[0, 1], logit_scale=10.0)
    query = Embeddings([[1.0, 0, 0], [0.6, 0, 0.8]], np.eye(3)[:2], target=None, logit_scale=10.0)
    # Each image is (1/2, 1/2, 0) away from the mean: 1/2 in squares. So the variance is 1 / (2 - 1)
    # / 3 per coordinate.
    assert Mahalanobis().fit(train).predict_uncertainty(query) == pytest.approx(
        [0, (0.16 + 0.64) * 3], abs=1e-6
    )
    single = Embeddings(np.eye(3)[:1], np.eye(3)[:2], target=[0], logit_scale=10.0)
    assert Mahalanobis().fit(single).predict_uncertainty(query) == pytest.approx([0, 0.8], abs=1e-6)


def log_densities(train: Embeddings, test: Embeddings, components: int, ridge: float) -> np.ndarray:
    """Return the classes' log-densities (N, K). A class without images has minus infinity."""
    target = train.target.numpy()
    pca = PCA(min(components, len(train) - 1, 6)).fit(images(train))
    z, query = pca.transform(images(train)), pca.transform(images(test))
    eye = np.eye(z.shape[1])
    centred = [z[target == c] - z[target == c].mean(axis=0) for c in np.unique(target)]
    pooled = sum(x.T @ x for x in centred) / max(len(z) - len(centred), 1)
    found = np.full((len(query), train.n_candidates), -np.inf)
    for c in np.unique(target):
        members = z[target == c]
        covariance = np.cov(members.T) if len(members) > 1 else pooled
        found[:, c] = multivariate_normal(members.mean(axis=0), covariance + ridge * eye).logpdf(
            query
        )
    return found


def log_odds(density: np.ndarray, answer: np.ndarray) -> np.ndarray:
    own = np.arange(density.shape[1]) == answer[:, None]
    return np.logaddexp.reduce(np.where(own, -np.inf, density), axis=1) - density[own]


def few() -> Embeddings:
    """Return one image from class 0 and two each from two more classes: fewer images than
    coordinates.
    """
    rows = TRAIN.usable_rows[:5]
    return with_targets(in_memory(TRAIN, rows), np.array([0, 1, 1, 2, 2]))


@pytest.mark.parametrize("components", [3, 128])
@pytest.mark.parametrize("train", [TRAIN, few()], ids=["many", "few"])
def test_class_gaussians(train: Embeddings, components: int) -> None:
    ridge = 1e-2
    density = log_densities(train, TEST, components, ridge)
    seen = density[0] > -np.inf
    known = np.isin(answers(TEST), np.flatnonzero(seen))
    odds = log_odds(density[known], answers(TEST)[known])
    settings = {"components": components, "ridge": ridge}
    found = ClassGaussians(score="log_odds", **settings).fit(train).predict_uncertainty(TEST)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[known], odds, rtol=RTOL, atol=1e-4)
    share = np.exp(density - np.logaddexp.reduce(density, axis=1)[:, None])[
        np.arange(len(TEST)), answers(TEST)
    ]
    p_max = posterior(TEST).max(axis=1)
    found = ClassGaussians(**settings).fit(train).predict_uncertainty(TEST)
    np.testing.assert_allclose(found[known], (1 - (p_max + share) / 2)[known], atol=1e-4)


def test_class_gaussians_log_odds_do_not_saturate() -> None:
    train, test = clusters(80, spread=0.02), clusters(50, seed=1, spread=0.02)
    density = ClassGaussians().fit(train).predict_uncertainty(test)
    odds = ClassGaussians(score="log_odds").fit(train).predict_uncertainty(test)
    zero_shot = PREDICTORS["mcm"]().predict_uncertainty(test)
    assert np.array_equal(density, zero_shot / 2)  # s_d is 1 to every digit
    assert len(np.unique(odds)) == len(test)


def test_class_gaussians_where_one_class_has_images() -> None:
    predictor = ClassGaussians(score="log_odds").fit(
        with_targets(TRAIN, np.zeros(80, dtype=np.int64))
    )
    found, own = predictor.predict_uncertainty(TEST), answers(TEST) == 0
    z = images(TRAIN)
    covariance = np.cov(z.T) + 1e-4 * np.eye(6)
    density = (
        -(squares(images(TEST), z.mean(axis=0), covariance) + np.linalg.slogdet(covariance)[1]) / 2
    )
    np.testing.assert_allclose(found[own], -density[own], rtol=RTOL)
    # Every other class has the density over all images. Here these are the images in class 0.
    np.testing.assert_allclose(found[~own], 0, atol=1e-9)


def encoded(
    n: int, seed: int, d: int = 6, k: int = 3, scale: float = 1.0
) -> tuple[Embeddings, np.ndarray]:
    """Return embeddings and the images (n, d) that they were made from.

    The image norms lie between 5 and 15 times ``scale``.
    """
    rng = np.random.default_rng(seed)
    text, projection = (
        unit(np.random.default_rng(7).normal(size=(k, d))),
        np.random.default_rng(8).normal(size=(d, d)),
    )
    target = np.arange(n) % k
    raw = (
        unit(text[target] + 0.5 * rng.normal(size=(n, d))) * rng.uniform(5, 15, size=(n, 1)) * scale
    )
    columns = {"features": np.linalg.solve(projection, raw.T).T, "image_projection": projection}
    columns = {name: rows.astype(np.float32) for name, rows in columns.items()}
    raw = columns["features"].astype(np.float64) @ columns["image_projection"].astype(np.float64).T
    return Embeddings(unit(raw), text, target=target, logit_scale=SCALE, columns=columns), raw


def released(
    train: np.ndarray, target: np.ndarray, test: np.ndarray, answer: np.ndarray, p_max: np.ndarray
) -> np.ndarray:
    """Return scores (N,) as the notebook defines them, by scikit-learn and SciPy.

    Higher is more certain.
    """
    pca = PCA(n_components=4).fit(train)
    z = pca.transform(train)
    classes = [z[target == c] for c in np.unique(target)]
    density = [
        multivariate_normal(
            of_class.mean(axis=0), np.cov(of_class, rowvar=False) + 1e-8 * np.eye(4)
        )
        for of_class in classes
    ]
    log = np.stack([normal.logpdf(pca.transform(test)) for normal in density], axis=1)
    return 0.5 * (p_max + softmax(log, axis=1)[np.arange(len(test)), answer])


@pytest.mark.parametrize("features", [True, False])
def test_icpe_is_what_was_released(features: bool) -> None:
    (train, raw), (test, raw_test) = encoded(90, 0), encoded(60, 1)
    logits = SCALE * images(test) @ unit(test.text.numpy()).T
    answer, p_max = logits.argmax(axis=1), softmax(logits, axis=1).max(axis=1)
    rows = (raw, raw_test) if features else (images(train), images(test))
    expected = released(rows[0], train.target.numpy(), rows[1], answer, p_max)
    predictor = ICPE(components=4, features=features).fit(train)
    # Both sides are float64 except for p_max. Its logits are float32, and off by 20 * 6 * 2^-24 <
    # 1e-5.
    np.testing.assert_allclose(predictor.predict_uncertainty(test), 1 - expected, atol=1e-5)
    assert predictor.label == ("icpe" if features else "icpe (unit norm)")
    assert len(np.unique(expected.round(6))) > 50  # the densities decide something


def test_icpe_does_not_depend_on_the_scale_of_the_features() -> None:
    scores = []
    for scale in (1.0, 2.0**14, 2.0**40):  # powers of two round all features alike
        train, test = (
            encoded(24, 0, d=12, k=4, scale=scale)[0],
            encoded(60, 1, d=12, k=4, scale=scale)[0],
        )
        scores.append(ICPE().fit(train).predict_uncertainty(test))
    # Six images per class span five directions. So the other directions decide, each by thousands
    # in the log-odds.
    np.testing.assert_allclose(scores[1:], [scores[0]] * 2, atol=1e-5)


def test_icpe_takes_both_columns_or_neither() -> None:
    train, test = encoded(90, 0)[0], encoded(60, 1)[0]
    bare = Embeddings(test.image, test.text, target=test.target, logit_scale=SCALE)
    with pytest.raises(DataError, match="needs the column 'features'"):
        ICPE().fit(train).predict_uncertainty(bare)
    second = Embeddings(
        train.image,
        train.text,
        target=train.target,
        logit_scale=SCALE,
        columns={"features": np.ones((90, 3))},
    )
    assert ICPE().fit(second).label == "icpe (unit norm)"
    other = np.eye(6, dtype=np.float32)[::-1]
    columns = {
        "features": train.column("features", train.usable_rows),
        "image_projection": other.copy(),
    }
    with pytest.raises(DataError, match="must be the embeddings"):
        ICPE().fit(
            Embeddings(
                train.image, train.text, target=train.target, logit_scale=SCALE, columns=columns
            )
        )


def delta_terms(train: Embeddings, test: Embeddings) -> list[np.ndarray]:
    z, target = images(train), train.target.numpy()
    terms = []
    for bank in (answers(train) == target, answers(train) != target):
        covariance = shared(z[bank], target[bank])
        means = [z[bank & (target == c)].mean(axis=0) for c in np.unique(target[bank])]
        terms.append(np.min([squares(images(test), mean, covariance) for mean in means], axis=0))
    return terms


@pytest.mark.parametrize("margin_weight", [0.0, 3.0])
def test_delta_mds(margin_weight: float) -> None:
    right, wrong = delta_terms(TRAIN, TEST)
    cosines = np.sort(images(TEST) @ unit(TRAIN.text.numpy()).T, axis=1)
    expected = right - wrong - margin_weight * (cosines[:, -1] - cosines[:, -2])
    found = DeltaMDS(margin_weight=margin_weight).fit(TRAIN).predict_uncertainty(TEST)
    np.testing.assert_allclose(found, expected, rtol=RTOL, atol=1e-4)


def test_delta_mds_leaves_out_classes_without_wrong_images() -> None:
    target = TRAIN.target.numpy().copy()
    target[target == 1] = answers(TRAIN)[target == 1]  # now class 1 has no wrong answer
    train = with_targets(TRAIN, target)
    assert not np.any((target == 1) & (answers(train) != 1))
    right, wrong = delta_terms(train, TEST)
    np.testing.assert_allclose(
        DeltaMDS().fit(train).predict_uncertainty(TEST), right - wrong, rtol=RTOL, atol=1e-4
    )


@pytest.mark.parametrize("right", [True, False])
def test_delta_mds_with_one_bank_is_the_distance_to_it(right: bool) -> None:
    train = with_targets(TRAIN, answers(TRAIN) if right else (answers(TRAIN) + 1) % 4)
    z, target = images(train), train.target.numpy()
    means = [z[target == c].mean(axis=0) for c in range(4)]
    expected = np.min([squares(images(TEST), mean, shared(z, target)) for mean in means], axis=0)
    found = DeltaMDS().fit(train).predict_uncertainty(TEST)
    np.testing.assert_allclose(found, expected * (1 if right else -1), rtol=RTOL)


def test_a_bank_of_one_image_takes_the_covariance_of_all() -> None:
    target = answers(TRAIN).copy()
    target[0] = (target[0] + 1) % 4  # only this image has a wrong answer
    z, train = images(TRAIN), with_targets(TRAIN, target)
    rest = np.arange(80) > 0
    means = [z[rest & (target == c)].mean(axis=0) for c in range(4)]
    right = np.min(
        [squares(images(TEST), mean, shared(z[rest], target[rest])) for mean in means], axis=0
    )
    wrong = squares(images(TEST), z[0], shared(z, target))
    np.testing.assert_allclose(
        DeltaMDS().fit(train).predict_uncertainty(TEST), right - wrong, rtol=RTOL, atol=1e-4
    )


def test_delta_mds_margin_is_delta_mds_with_the_margin() -> None:
    same = DeltaMDS(margin_weight=10_000.0).fit(TRAIN)
    assert np.array_equal(
        DeltaMDSMargin().fit(TRAIN).predict_uncertainty(TEST), same.predict_uncertainty(TEST)
    )
