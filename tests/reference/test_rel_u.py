"""Test Rel-U's penalty against brute-force optimisation, and its edge cases by hand."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch
from scipy import special

from tests.builders.logit_rows import batch_of
from tests.conftest import toy_embeddings, variant
from vilu.embeddings.memory import Embeddings
from vilu.predictors import temperature as fitted
from vilu_bench.methods.rel_u import RelU, best_penalty


def posterior(data: Embeddings, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    batch = next(data.batches(10_000))
    return special.softmax(
        batch.logits.double().numpy() / temperature, axis=1
    ), batch.failure.numpy()


def moment_of(p: np.ndarray, failure: np.ndarray, trade_off: float) -> np.ndarray:
    """Return the moment matrix, summed sample by sample as in the definition."""
    outer = np.einsum("ni,nj->nij", p, p)
    return trade_off * outer[failure == 1].mean(0) - (1 - trade_off) * outer[failure == 0].mean(0)


def ascend(moment: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the D that maximises <moment, D>, by projected gradient ascent.

    D is symmetric, D >= 0, has a zero diagonal and lies in the unit ball. For a cone, a projection
    on the cone and then on the ball is the projection on both.
    """
    penalty = np.abs(rng.normal(size=moment.shape))
    for _ in range(2000):
        penalty = penalty + 10 * moment / np.abs(moment).max()
        penalty = np.maximum((penalty + penalty.T) / 2, 0)
        np.fill_diagonal(penalty, 0)
        penalty /= max(np.linalg.norm(penalty), 1)
    return penalty


@pytest.mark.parametrize(("k", "trade_off"), [(3, 0.5), (5, 0.3), (5, 0.5), (5, 0.9)])
def test_penalty_is_the_optimum_of_the_objective(k: int, trade_off: float) -> None:
    data = toy_embeddings(n=200, k=k, scale=5.0)
    predictor = RelU(trade_off=trade_off, temperature=1.0).fit(data)
    moment = moment_of(*posterior(data, 1.0), trade_off)
    # The ascent reaches its fixed point geometrically. After 2,000 steps only float64 rounding is
    # left.
    expected = ascend(moment, np.random.default_rng(0))
    assert np.linalg.norm(expected) == pytest.approx(1)
    assert np.allclose(predictor.learned_["penalty"].numpy(), expected, atol=1e-9)


def test_where_nothing_is_to_be_gained_the_penalty_is_constant() -> None:
    """If no penalty gains anything, the optimum is no penalty at all.

    It would score all rows alike.
    """
    data = toy_embeddings(n=200, k=5, scale=5.0)
    moment = moment_of(*posterior(data, 1.0), 0.15)
    assert np.array_equal(ascend(moment, np.random.default_rng(0)), np.zeros((5, 5)))
    expected = (1 - np.eye(5)) / math.sqrt(20)
    assert np.allclose(
        RelU(temperature=1.0).fit(data).learned_["penalty"].numpy(), expected, rtol=1e-12
    )


def test_score_is_the_quadratic_form_of_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitted, "SCORING_BATCH", 77)
    data, test = toy_embeddings(), toy_embeddings(seed=1, ids_from=1000)
    predictor = RelU().fit(data)
    p, _ = posterior(test, 0.5)
    penalty = predictor.learned_["penalty"].numpy()
    assert np.allclose(
        predictor.predict_uncertainty(test),
        [row @ penalty @ row for row in p],
        rtol=1e-12,
        atol=1e-300,
    )
    moment = moment_of(*posterior(data, 0.5), 0.15)
    positive = np.maximum(moment, 0)
    np.fill_diagonal(positive, 0)
    # Products with other row counts round float32 logits near 20 at 1e-6. The temperature doubles
    # that.
    assert np.allclose(penalty, positive / np.linalg.norm(positive), rtol=1e-4)


def test_properties_of_the_penalty() -> None:
    penalty = RelU().fit(toy_embeddings()).learned_["penalty"]
    assert torch.equal(penalty, penalty.T)
    assert torch.equal(penalty.diagonal(), torch.zeros(5, dtype=torch.float64))
    assert float(penalty.min()) >= 0
    assert float(torch.linalg.matrix_norm(penalty)) == pytest.approx(1)


def test_two_classes_by_hand() -> None:
    """With K = 2 there is one penalty, 1 / sqrt 2 twice.

    So u = 2 p_1 p_2 / sqrt 2, whether the data speak for it or not.
    """
    for sign in (1.0, -1.0):
        penalty = best_penalty(torch.tensor([[1.0, sign], [sign, 3.0]], dtype=torch.float64))
        assert torch.allclose(
            penalty, torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64) / math.sqrt(2)
        )
    predictor = RelU(temperature=2.0)
    batch = batch_of([[2.0, 0.0]])
    predictor.learned_ = {"penalty": penalty, "classes": batch.text}
    u = predictor._score(batch)
    p = special.expit(1.0)
    assert float(u) == pytest.approx(math.sqrt(2) * p * (1 - p))


def test_without_failures_it_is_the_gini_impurity() -> None:
    data = toy_embeddings()
    right = data.take((next(data.batches(600)).failure == 0).nonzero().squeeze(1))
    p, _ = posterior(data, 0.5)
    gini = (p * (1 - p)).sum(axis=1)
    # 1 - p rounds to 1e-16, an absolute error.
    assert np.allclose(
        RelU().fit(right).predict_uncertainty(data), gini / math.sqrt(20), rtol=1e-9, atol=1e-16
    )


def test_without_successes_it_is_the_failures_part() -> None:
    data = toy_embeddings()
    wrong = data.take((next(data.batches(600)).failure == 1).nonzero().squeeze(1))
    p, _ = posterior(wrong, 0.5)
    expected = p.T @ p
    np.fill_diagonal(expected, 0)
    found = RelU().fit(wrong).learned_["penalty"].numpy()
    assert np.allclose(found, expected / np.linalg.norm(expected), rtol=1e-9)


def test_candidates_in_another_order_or_fewer_keep_their_penalties() -> None:
    data = toy_embeddings()
    predictor = RelU().fit(data)
    penalty = predictor.learned_["penalty"].numpy()
    order = [4, 0, 2]
    fewer = variant(data, text=data.text[order], target=None, columns=None)
    p, _ = posterior(fewer, 0.5)
    expected = [row @ penalty[np.ix_(order, order)] @ row for row in p]
    assert np.allclose(predictor.predict_uncertainty(fewer), expected, rtol=1e-12, atol=1e-300)


def test_a_thousand_classes_take_no_time() -> None:
    data = toy_embeddings(n=2000, k=1000, d=64)
    start = time.process_time()
    u = RelU().fit(data).predict_uncertainty(data)
    # Two times 2,000 x 1000^2 products take a fraction of a second, on a busy machine too.
    assert time.process_time() - start < 5
    assert np.isfinite(u).all()
