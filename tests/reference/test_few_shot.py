"""Test few-shot baselines and adaptation without labels against independent computations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, logsumexp, softmax
from sklearn.linear_model import LogisticRegression

from tests.builders.bank_data import clusters, with_targets
from tests.conftest import toy_embeddings
from vilu import PREDICTORS
from vilu.embeddings.memory import Embeddings
from vilu.predictors.bank.linear_probe import LinearProbe
from vilu_bench.methods.few_shot import (
    N_FOLDS,
    GDAAndZeroShot,
    LinearProbeCV,
    ProbeAndZeroShot,
    TipAdapter,
    class_folds,
    fit_mix_weights,
)
from vilu_bench.methods.transductive import OTTER, StatA, fit_gaussians, nearest_affinity

TRAIN, TEST = clusters(80), clusters(50, seed=1)


def zero_shot_logits(data: Embeddings) -> np.ndarray:
    image = data.image.double().numpy()
    return data.space.logit_scale * image @ data.text.double().numpy().T


def of_answers(log_posterior: np.ndarray, data: Embeddings) -> np.ndarray:
    """Return 1 - q for the zero-shot answers."""
    answer = zero_shot_logits(data).argmax(axis=1)
    return 1 - softmax(log_posterior, axis=1)[np.arange(len(answer)), answer]


def held_out_folds(label: np.ndarray) -> list[np.ndarray]:
    """Return masks for the held-out rows. The only label in a class is never held out."""
    fold = class_folds(label, 0)
    is_only_label = np.bincount(label)[label] == 1
    masks = [(fold == number) & ~is_only_label for number in range(N_FOLDS)]
    return [mask for mask in masks if mask.any()]


def test_folds_have_the_rows_of_a_class_in_turn() -> None:
    label = np.repeat([0, 1, 2], [10, 5, 20])
    fold = class_folds(label, 0)
    for name in range(3):
        count = np.bincount(fold[label == name], minlength=N_FOLDS)
        assert count.max() - count.min() <= 1


def test_cross_validated_c_is_the_likeliest_of_held_out_labels() -> None:
    label = TRAIN.target.numpy()
    image = TRAIN.image.double().numpy()
    grid = (0.01, 1.0, 100.0)
    likelihood = dict.fromkeys(grid, 0.0)
    for mask in held_out_folds(label):
        for c in grid:
            model = LogisticRegression(C=c, max_iter=10_000).fit(image[~mask], label[~mask])
            log_p = model.predict_log_proba(image[mask])
            likelihood[c] += log_p[np.arange(mask.sum()), label[mask]].sum()
    predictor = LinearProbeCV(grid=grid).fit(TRAIN)
    best = max(likelihood, key=likelihood.__getitem__)
    assert predictor.notes_["C"] == best
    expected = LinearProbe(C=best).fit(TRAIN).predict_uncertainty(TEST)
    assert np.array_equal(predictor.predict_uncertainty(TEST), expected)


def test_one_label_a_class_takes_the_defaults() -> None:
    first_of_class = [int((TRAIN.target == label).nonzero()[0]) for label in range(4)]
    few = TRAIN.take(first_of_class)
    with pytest.warns(UserWarning, match="fitted on 4 rows"):
        assert LinearProbeCV().fit(few).notes_["C"] == 100.0
    with pytest.warns(UserWarning, match="fitted on 4 rows"):
        notes = ProbeAndZeroShot().fit(few).notes_
    assert (notes["zero_shot"], notes["probe"]) == (0.5, 0.5)
    with pytest.warns(UserWarning, match="fitted on 4 rows"):
        notes = TipAdapter().fit(few).notes_
    assert (notes["alpha"], notes["beta"]) == (1.0, 5.5)
    # There is no covariance within classes, so only the zero-shot posterior is left.
    with pytest.warns(UserWarning, match="fitted on 4 rows"):
        gda = GDAAndZeroShot().fit(few)
    expected = of_answers(zero_shot_logits(TEST), TEST)
    assert gda.predict_uncertainty(TEST) == pytest.approx(expected, abs=1e-6)


def test_pool_weights_are_the_likeliest() -> None:
    rng = np.random.default_rng(0)
    log_p = log_softmax(rng.normal(size=(400, 2, 5)), axis=2)
    drawn = 1.2 * log_p[:, 0] + 0.4 * log_p[:, 1] + rng.gumbel(size=(400, 5))
    label = drawn.argmax(axis=1)

    def likelihood(weights: np.ndarray) -> float:
        log_q = log_softmax(weights[0] * log_p[:, 0] + weights[1] * log_p[:, 1], axis=1)
        return float(log_q[np.arange(400), label].sum())

    weights = fit_mix_weights(log_p, label)
    best = likelihood(weights)
    for step in ([0.05, 0], [-0.05, 0], [0, 0.05], [0, -0.05]):
        assert likelihood(weights + step) < best


def test_mix_of_probe_and_zero_shot_by_hand() -> None:
    predictor = ProbeAndZeroShot().fit(TRAIN)
    a, w = (predictor.notes_[name] for name in ("zero_shot", "probe"))
    probe = LinearProbe().fit(TRAIN)
    (batch,) = TEST.batches(len(TEST))
    of_probe = np.maximum(probe.log_posterior(batch).numpy(), np.log(1e-6))
    expected = of_answers(a * log_softmax(zero_shot_logits(TEST), axis=1) + w * of_probe, TEST)
    assert predictor.predict_uncertainty(TEST) == pytest.approx(expected, abs=1e-6)


def gda_logits(image: np.ndarray, label: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Return the logits by the released formula in NumPy, with covariance and pseudo-inverse
    written out.
    """
    k = label.max() + 1
    mean = np.stack([image[label == c].mean(axis=0) for c in range(k)])
    centred = image - mean[label]
    # The released code calls ``Tensor.cov``, which subtracts the mean. The mean is zero here.
    covariance = np.cov(centred.T)
    n, dim = centred.shape
    precision = dim * np.linalg.pinv((n - 1) * covariance + np.trace(covariance) * np.eye(dim))
    bias = -np.einsum("nd,dc,nc->n", mean, precision, mean) / 2
    return query @ (mean @ precision).T + bias


def test_gaussian_discriminants_by_the_released_formula() -> None:
    label = TRAIN.target.numpy()
    image = TRAIN.image.double().numpy()
    logits = zero_shot_logits(TRAIN)
    grid = GDAAndZeroShot().grid
    n_right = dict.fromkeys(grid, 0)
    for mask in held_out_folds(label):
        g = gda_logits(image[~mask], label[~mask], image[mask])
        for alpha in grid:
            answer = (logits[mask] + alpha * g).argmax(axis=1)
            n_right[alpha] += int((answer == label[mask]).sum())
    predictor = GDAAndZeroShot().fit(TRAIN)
    best = max(n_right, key=n_right.__getitem__)  # among equal counts the first alpha wins
    assert predictor.notes_["alpha"] == best
    query = TEST.image.double().numpy()
    expected = of_answers(zero_shot_logits(TEST) + best * gda_logits(image, label, query), TEST)
    assert predictor.predict_uncertainty(TEST) == pytest.approx(expected, abs=1e-6)


def test_cache_by_loops() -> None:
    predictor = TipAdapter(alphas=(2.0,), betas=(3.0,)).fit(TRAIN)
    bank = TRAIN.image.double().numpy()
    query = TEST.image.double().numpy()
    added = np.zeros((len(query), 4))
    for row, image in enumerate(query):
        for key, label in zip(bank, TRAIN.target.numpy(), strict=True):
            added[row, label] += np.exp(-3.0 * (1 - image @ key))
    expected = of_answers(zero_shot_logits(TEST) + 2.0 * added, TEST)
    assert predictor.predict_uncertainty(TEST) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    "method", ["linear_probe_cv", "probe_and_zero_shot", "gda_and_zero_shot", "tip_adapter"]
)
def test_classes_without_labels_are_scored(method: str) -> None:
    few = with_targets(TRAIN, np.minimum(TRAIN.target.numpy(), 1))
    uncertainty = PREDICTORS[method]().fit(few).predict_uncertainty(TEST)
    assert np.isfinite(uncertainty).all()


def test_otter_gives_every_class_an_equal_share() -> None:
    data = toy_embeddings(n=300, k=5, d=12, scale=8.0)
    predictor = OTTER().fit(data)
    (batch,) = data.batches(len(data))
    share = predictor.log_posterior(batch).exp().mean(dim=0)
    assert share.numpy() == pytest.approx(np.full(5, 0.2), abs=1e-6)


def released_stata(
    image: np.ndarray, logits: np.ndarray, text: np.ndarray, affinity: np.ndarray
) -> np.ndarray:
    """Return StatA's posteriors by loops over classes, with the defaults in its code."""
    k = len(text)
    y_hat = softmax(logits, axis=1)
    z = y_hat
    mean = text
    first = sum(z[:, [c]] * (image - text[c]) ** 2 for c in range(k)).sum(axis=0) / len(image)
    cov = np.tile(first, (k, 1))
    for step in range(11):
        likelihood = np.stack(
            [-0.5 * ((image - mean[c]) ** 2 / cov[c]).sum(axis=1) for c in range(k)], axis=1
        )
        for _ in range(5):
            follow = 50 / 6 * (affinity.T @ z + affinity @ z)
            log_z = np.log(y_hat) + (likelihood + follow) / 50
            z = np.exp(log_z - logsumexp(log_z, axis=1, keepdims=True))
        if step == 10:
            break
        answered = np.bincount(z.argmax(axis=1), minlength=k)
        for_means = []
        for_covs = []
        for c in range(k):
            beta = answered[c] / (answered[c] + 1)
            members = z[:, c] @ image
            m = beta * members / np.linalg.norm(members) + (1 - beta) * text[c]
            m = m / np.linalg.norm(m)
            spread = z[:, c] @ (image - m) ** 2 / z[:, c].sum()
            for_means.append(m)
            for_covs.append(beta * spread + (1 - beta) * (first + (text[c] - m) ** 2))
        mean = np.stack(for_means)
        cov = np.stack(for_covs)
    return z


def test_stata_by_loops() -> None:
    data = toy_embeddings(n=120, k=4, d=6, scale=8.0)
    image = data.image.double()
    text = data.text.double()
    logits = torch.from_numpy(zero_shot_logits(data))
    learned = fit_gaussians(image, logits, text, 1.0, 3, 10)
    affinity = nearest_affinity(image, 3).to_dense().numpy()
    cosine = (image @ image.T).numpy()
    np.fill_diagonal(cosine, -1)
    for row in range(120):
        nearest = np.argsort(-cosine[row])[:3]
        assert affinity[row, nearest] == pytest.approx(cosine[row, nearest])
        assert (affinity[row] != 0).sum() == 3
    expected = released_stata(image.numpy(), logits.numpy(), text.numpy(), affinity)
    assert learned.posterior.numpy() == pytest.approx(expected, abs=1e-9)
    predictor = StatA().fit(data)
    q = logits - ((image[:, None] - learned.mean) ** 2 / learned.variance).sum(dim=2) / 100
    expected_uncertainty = of_answers(q.numpy(), data)
    assert predictor.predict_uncertainty(data) == pytest.approx(expected_uncertainty, abs=1e-4)
