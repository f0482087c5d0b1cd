"""Test SIRC against its published form, and its subspace against an SVD."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import special

from tests.builders.bank_data import unit
from tests.builders.logit_rows import batch_of
from tests.conftest import toy_embeddings, variant
from vilu.embeddings.memory import Embeddings
from vilu.embeddings.source import log_posterior
from vilu.errors import UsageError
from vilu.predictors.persistence.storage import load_predictor
from vilu_bench.methods.sirc import LOG_DOUBT_FUNCTIONS, SIRC

CONFIDENCES = {
    "msp": lambda p: 1 - p.max(axis=1),
    "entropy": lambda p: special.entr(p).sum(axis=1),
    "doctor": lambda p: 1 - (p**2).sum(axis=1),
}


def residual(images: np.ndarray, train: np.ndarray, components: int) -> np.ndarray:
    _, _, directions = np.linalg.svd(train, full_matrices=False)
    basis = directions[:components].T
    return -np.linalg.norm(images - images @ basis @ basis.T, axis=1)


@pytest.mark.parametrize("typicality", ["norm1", "residual"])
@pytest.mark.parametrize("confidence", list(CONFIDENCES))
def test_published_form(confidence: str, typicality: str) -> None:
    """SIRC must be the logarithm of minus the published score.

    The published score is -(S1_max - S1) (1 + exp(-b (S2 - a))), a confidence.
    """
    train, test = toy_embeddings(scale=5.0), toy_embeddings(scale=5.0, seed=1, ids_from=1000)
    images = {data: data.image.double().numpy() for data in (train, test)}
    if typicality == "norm1":
        known, new = (np.abs(images[data]).sum(axis=1) for data in (train, test))
    else:
        known, new = (residual(images[data], images[train], 8) for data in (train, test))
    gap = CONFIDENCES[confidence](
        special.softmax(next(test.batches(600)).logits.double().numpy(), axis=1)
    )
    published = -gap * (1 + np.exp(-(new - (known.mean() - 3 * known.std())) / known.std()))
    found = SIRC(confidence=confidence, typicality=typicality).fit(train).predict_uncertainty(test)
    # Where the posterior is sure, the published gap is a difference from one. Its relative error is
    # 1e-16 over a gap above 1e-9, so below 1e-7.
    assert gap.min() > 1e-9
    assert np.allclose(found, np.log(-published), rtol=1e-6, atol=1e-6)


def test_nothing_underflows() -> None:
    """Sure rows must keep their order.

    If one rival has a gap of g nats, 1 - p = e^-g, H = (1 + g) e^-g and 1 - sum p^2 = 2 e^-g, up to
    factors 1 + e^-g.
    """
    gaps = np.array([40.0, 300.0, 600.0])
    log_p = log_posterior(batch_of([[gap, 0.0] for gap in gaps]))
    expected = {"msp": -gaps, "entropy": np.log1p(gaps) - gaps, "doctor": math.log(2) - gaps}
    for name, values in expected.items():
        assert np.allclose(LOG_DOUBT_FUNCTIONS[name](log_p).numpy(), values, rtol=1e-12)


def test_gaps_beyond_every_exponent_stay_finite_and_in_order() -> None:
    log_p = log_posterior(batch_of([[gap, 0.0, -1.0] for gap in (800.0, 1500.0, 3000.0)]))
    for doubt in LOG_DOUBT_FUNCTIONS.values():
        values = doubt(log_p)
        assert torch.isfinite(values).all()
        assert (values.diff() < 0).all()


def test_an_untypical_image_is_uncertain_whatever_the_posterior_says() -> None:
    train = toy_embeddings()
    predictor = SIRC().fit(train)
    image = train.image.clone()
    image[0] = train.text[0]
    # No unit vector has a smaller 1-norm.
    image[1] = torch.eye(16)[int(train.text[0].abs().argmax())] * train.text[0].sign()
    u = predictor.predict_uncertainty(variant(train, image=image))
    sure = -np.expm1(log_posterior(next(variant(train, image=image).batches(600))).amax(1).numpy())
    shift, slope = float(predictor.learned_["shift"]), float(predictor.learned_["slope"])
    assert u[1] == pytest.approx(np.log(sure[1]) + np.logaddexp(0, slope * (shift - 1)), rel=1e-6)
    assert u[1] - np.log(sure[1]) > u[0] - np.log(sure[0])


def test_a_saved_subspace_scores_bit_for_bit_as_the_fitted_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    data = Embeddings(
        unit(rng.normal(size=(800, 512))),
        unit(rng.normal(size=(5, 512))),
        target=rng.integers(5, size=800),
        logit_scale=20.0,
    )
    fitted = SIRC(typicality="residual").fit(data)
    fitted.save(tmp_path)
    assert np.array_equal(
        load_predictor(tmp_path).predict_uncertainty(data), fitted.predict_uncertainty(data)
    )


def test_subspace_leaves_something_out() -> None:
    train = toy_embeddings()
    assert SIRC(typicality="residual").fit(train).learned_["complement"].shape == (16, 8)
    assert SIRC(typicality="residual", components=15).fit(train).learned_["complement"].shape == (
        16,
        1,
    )
    with pytest.raises(UsageError, match=r"less than the embedding width 16\. Got 16"):
        SIRC(typicality="residual", components=16).fit(train)


@pytest.mark.parametrize("typicality", ["norm1", "residual"])
def test_identical_training_images(typicality: str) -> None:
    train = toy_embeddings()
    same = variant(train, image=train.image[:1].expand(600, -1).clone(), columns=None)
    predictor = SIRC(typicality=typicality).fit(same)
    with pytest.warns(UserWarning, match="are these embeddings from another model"):
        assert np.isfinite(predictor.predict_uncertainty(train)).all()
