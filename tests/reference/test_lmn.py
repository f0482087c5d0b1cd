"""Test LMN's curve, loss and inputs by definition, and its temperatures after training."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import special

import vilu
from tests.builders.logit_rows import batch_of
from tests.conftest import toy_embeddings
from vilu.embeddings.memory import Embeddings
from vilu.embeddings.space import EmbeddingSpace
from vilu_bench.methods.networks import LMN, MAX_LOG_TEMPERATURE, logit_gaps, target_curve


@pytest.mark.parametrize("steepness", [0.05, 0.3, 2.0])
def test_target_curve_is_the_normalised_sigmoid(steepness: float) -> None:
    s = np.linspace(0, 1, 21)
    low, high = special.expit(-0.5 / steepness), special.expit(0.5 / steepness)
    expected = (special.expit((s - 0.5) / steepness) - low) / (high - low)
    assert np.allclose(target_curve(torch.from_numpy(s), steepness).numpy(), expected, atol=1e-12)


def test_target_curve_at_its_ends() -> None:
    s = torch.linspace(0, 1, 11, dtype=torch.float64)
    for steepness in (1e-3, 0.05, 1e3):
        curve = target_curve(s, steepness)
        assert torch.allclose(curve[[0, 5, 10]], torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
        assert (curve.diff() >= 0).all()
    # This is the diagonal of ordinary calibration.
    assert torch.allclose(target_curve(s, 1e3), s, atol=1e-6)


@pytest.mark.parametrize("balance", [0.6, 0.0, 1.0])
def test_loss_row_by_row(balance: float) -> None:
    batch = next(toy_embeddings(n=80).batches(80))
    log_t = torch.linspace(-1, 1, 80)
    found = LMN(balance=balance)._loss(batch, log_t)
    expected = []
    for logits, target, log_temperature in zip(batch.logits, batch.target, log_t, strict=True):
        p = special.softmax(logits.double().numpy() / math.exp(log_temperature))
        s = p.max()
        psi = float(target_curve(torch.tensor(s), 0.05))
        if int(logits.argmax()) == int(target):
            expected.append(balance * ((1 - psi) - np.log(p[target])))
        else:
            uniform = np.full(len(p), 1 / len(p))
            expected.append((1 - balance) * (psi + special.rel_entr(uniform, p).sum()))
    assert float(found) == pytest.approx(np.mean(expected), rel=1e-5)


def test_loss_sharpens_right_answers_and_flattens_wrong_ones() -> None:
    batch = batch_of([[1.0, 0.5, 0.0], [1.0, 0.5, 0.0]], target=[0, 1])
    log_t = torch.zeros(2, requires_grad=True)
    LMN()._loss(batch, log_t).backward()
    assert log_t.grad[0] > 0  # descent lowers T where the answer is right
    assert log_t.grad[1] < 0


def test_gaps_are_sorted_cut_and_padded() -> None:
    logits = torch.tensor([[3.0, 5.0, -90.0, 1.0], [0.0, 0.0, -10.0, -5.0]])
    expected = torch.tensor([[2.0, 4.0, 20.0], [0.0, 5.0, 10.0]]) / 20
    assert torch.allclose(logit_gaps(logits, 4), expected)
    assert torch.allclose(logit_gaps(logits, 2), expected[:, :1])
    assert torch.allclose(
        logit_gaps(logits, 6), torch.nn.functional.pad(expected, (0, 2), value=1.0)
    )
    more = torch.cat([logits, torch.full((2, 3), -100.0)], dim=1)
    # A hopeless candidate counts as absent.
    assert torch.equal(logit_gaps(more, 6), logit_gaps(logits, 6))


def test_it_starts_as_mcm() -> None:
    data = toy_embeddings()
    predictor = LMN(epochs=1, learning_rate=1e-12).fit(data)
    assert np.allclose(
        predictor.predict_uncertainty(data), vilu.MCM().predict_uncertainty(data), rtol=2e-6
    )  # MCM sums in float32


def test_uncertainty_is_that_of_the_scaled_posterior() -> None:
    data = toy_embeddings()
    predictor = LMN(epochs=3).fit(data)
    batch = next(data.batches(600))
    temperature = predictor.network_(batch).detach().double().exp().numpy()
    p = special.softmax(batch.logits.double().numpy() / temperature[:, None], axis=1)
    assert np.allclose(
        predictor.predict_uncertainty(data), 1 - p.max(axis=1), rtol=1e-9, atol=1e-15
    )
    assert np.array_equal(p.argmax(axis=1), batch.prediction.numpy())


def test_wrong_answers_get_higher_temperatures_within_the_bound() -> None:
    train, test = toy_embeddings(n=1500), toy_embeddings(seed=1, ids_from=5000)
    predictor = LMN(epochs=30, learning_rate=1e-2).fit(train)
    batch = next(test.batches(600))
    log_t = predictor.network_(batch).detach()
    assert log_t[batch.failure == 1].mean() > log_t[batch.failure == 0].mean() + 0.5
    assert log_t.abs().max() <= MAX_LOG_TEMPERATURE
    far = next(Embeddings(test.image, test.text, target=test.target, logit_scale=1e4).batches(600))
    assert predictor.network_(far).abs().max() <= MAX_LOG_TEMPERATURE


def test_published_size() -> None:
    """The network must have about 17,000 parameters at D = 512.

    The paper says 17,000 to 20,000, over its K.
    """
    network = LMN().module({}, EmbeddingSpace(512, 100.0))
    assert (
        sum(p.numel() for p in network.parameters()) == (2 * 512 + 15) * 16 + 16 + 16 + 1 == 16_657
    )


@pytest.mark.parametrize(("failure", "what"), [(0, "failures"), (1, "successes")])
def test_one_sided_training_sets_are_said(failure: int, what: str) -> None:
    data = toy_embeddings()
    rows = (next(data.batches(600)).failure == failure).nonzero().squeeze(1)
    with pytest.warns(UserWarning, match=f"only 0 {what} among {len(rows)} training rows"):
        predictor = LMN(epochs=2).fit(data.take(rows))
    assert np.isfinite(predictor.predict_uncertainty(data)).all()
