"""Test ProbVLM against SciPy's generalised normal distribution and plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate, special, stats

import vilu
from tests.conftest import toy_embeddings, toy_pairs
from vilu.embeddings.memory import Embeddings
from vilu.embeddings.source import Batch
from vilu.embeddings.space import EmbeddingSpace
from vilu_bench.methods import probvlm
from vilu_bench.methods.probvlm import (
    GeneralisedGaussian,
    ProbabilisticAdapter,
    ProbVLM,
    dropout_masks,
)

SHAPES = [(0.5, 0.3), (1.0, 2.0), (2.0, 1.0), (4.5, 0.05)]
QUICK = {"epochs": 3, "width": 8, "batch_size": 64}


def generalised(beta: float, alpha: float, mean: float = 0.7) -> GeneralisedGaussian:
    return GeneralisedGaussian(
        *(torch.tensor(value, dtype=torch.float64) for value in (mean, 1 / alpha, beta))
    )


@pytest.mark.parametrize(("beta", "alpha"), SHAPES)
def test_density_integrates_to_one(beta: float, alpha: float) -> None:
    found = generalised(beta, alpha)

    def density(x: float) -> float:
        return math.exp(-float(found.nll(torch.tensor(x, dtype=torch.float64))))

    halves = [
        integrate.quad(density, *ends, epsabs=1e-9) for ends in ((-np.inf, 0.7), (0.7, np.inf))
    ]
    assert sum(area for area, _ in halves) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("beta", "alpha"), [*SHAPES, (0.1, 1.0), (5.0, 1e-3)])
def test_likelihood_and_variance_against_scipy(beta: float, alpha: float) -> None:
    found, known = generalised(beta, alpha), stats.gennorm(beta, loc=0.7, scale=alpha)
    x = 0.7 + alpha * np.array([-3.0, -1.0, -0.2, 1e-3, 0.5, 2.0])
    assert found.nll(torch.from_numpy(x)).numpy() == pytest.approx(-known.logpdf(x), rel=1e-9)
    assert float(found.log_variance()) == pytest.approx(math.log(known.var()), rel=1e-9)


def test_likelihood_without_deviation_has_a_finite_gradient() -> None:
    mean = torch.zeros(3, requires_grad=True)
    GeneralisedGaussian(mean, torch.ones(3), torch.tensor([0.1, 1.0, 5.0])).nll(
        torch.zeros(3)
    ).sum().backward()
    assert torch.isfinite(mean.grad).all()


def test_adapter_is_a_residual_network() -> None:
    torch.manual_seed(0)
    adapter = ProbabilisticAdapter(6, 4, torch.Generator().manual_seed(0))
    z = torch.nn.functional.normalize(torch.randn(5, 6), dim=1)
    masks = dropout_masks((5, 4), 0.5, torch.Generator().manual_seed(1))
    found = adapter(z, masks)
    x = z * math.sqrt(6)
    first = torch.relu(adapter.hidden[0](x)) * masks[0]
    y = x + adapter.out(torch.relu(adapter.hidden[1](first)) * masks[1])
    assert torch.allclose(found.mean, adapter.mean(y))
    assert torch.allclose(found.inverse_scale, torch.log1p(adapter.inverse_scale(y).exp()))
    assert torch.allclose(found.shape, 0.1 + 4.9 * torch.sigmoid(adapter.shape(y)))
    ones = (torch.ones(5, 4), torch.ones(5, 4))
    assert torch.equal(adapter(z).mean, adapter(z, ones).mean)


def test_dropout_masks_keep_the_mean() -> None:
    first, second = dropout_masks((1000, 100), 0.3, torch.Generator().manual_seed(0))
    for mask in (first, second):
        assert mask.unique().tolist() == pytest.approx([0, 1 / 0.7])
        # The mean over 100,000 entries has the standard error sqrt(0.3 / 0.7 / 1e5) = 0.002.
        assert float(mask.mean()) == pytest.approx(1, abs=0.01)
    assert not torch.equal(first, second)


# --- the method
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fitted(train: Embeddings) -> ProbVLM:
    return ProbVLM(**QUICK).fit(train)


def distribution(
    adapter: ProbabilisticAdapter, z: torch.Tensor, masks=()
) -> tuple[np.ndarray, stats.gennorm]:
    """Return the mean and the SciPy distribution that an adapter predicts for rows."""
    with torch.no_grad():
        mean, inverse_scale, shape = (part.double().numpy() for part in adapter(z, masks))
    return mean, stats.gennorm(shape, loc=mean, scale=1 / inverse_scale)


def first_batch(data) -> Batch:
    return next(data.batches(1000))


@pytest.mark.parametrize("make", [toy_embeddings, toy_pairs])
def test_alignment_loss_against_scipy(make) -> None:
    batch = first_batch(make())
    dim = batch.image.shape[1]
    network = (
        ProbVLM(dropout=0.0, cross_weight=0.25, width=8)
        .module({}, EmbeddingSpace(dim, 100.0))
        .train()
    )
    own = batch.text[batch.target]
    (_, image), (_, text) = (
        distribution(network.image, batch.image),
        distribution(network.text, own),
    )
    z_v, z_t = (math.sqrt(dim) * z.double().numpy() for z in (batch.image, own))
    likelihoods = (
        image.logpdf(z_v) + text.logpdf(z_t) + 0.25 * (image.logpdf(z_t) + text.logpdf(z_v))
    )
    assert network(batch).detach().numpy() == pytest.approx(-likelihoods.mean(axis=1), rel=1e-4)


def test_training_explains_the_embeddings_better(train: Embeddings) -> None:
    """Training must explain the embeddings better than one Gaussian over all coordinates.

    That Gaussian does not look at the embedding. The loss must also fall.
    """
    predictor = ProbVLM(epochs=15, width=32, learning_rate=1e-2).fit(train)
    _, image = distribution(predictor.network_.image, train.image)
    z = 4 * train.image.double().numpy()
    assert image.logpdf(z).mean() > stats.norm.logpdf(z, z.mean(), z.std()).mean() + 0.3
    assert predictor.notes_["history"]["loss"][-1] < predictor.notes_["history"]["loss"][0]


def test_aleatoric_against_scipy(fitted: ProbVLM, test: Embeddings) -> None:
    _, image = distribution(fitted.network_.image, test.image)
    assert fitted.predict_uncertainty(test) == pytest.approx(
        np.log(image.var()).mean(axis=1), abs=1e-4
    )


def with_uncertainty(fitted: ProbVLM, uncertainty: str, tmp_path, **more: object) -> ProbVLM:
    """Return a predictor with the same weights and another ``uncertainty``."""
    fitted.save(tmp_path)
    loaded = vilu.load(tmp_path)
    loaded.uncertainty = uncertainty
    for key, value in more.items():
        setattr(loaded, key, value)
    return loaded


def test_epistemic_against_a_loop_over_masks(fitted: ProbVLM, test: Embeddings, tmp_path) -> None:
    predictor = with_uncertainty(fitted, "epistemic", tmp_path)
    first, second = dropout_masks((15, 8), 0.1, torch.Generator().manual_seed(0))
    adapter = predictor.network_.image
    means = [
        distribution(adapter, test.image, (a, b))[0] for a, b in zip(first, second, strict=True)
    ]
    expected = np.var(means, axis=0, ddof=1).mean(axis=1)
    assert predictor.predict_uncertainty(test) == pytest.approx(expected, rel=1e-4)
    assert (
        with_uncertainty(fitted, "epistemic", tmp_path, dropout=0.0).predict_uncertainty(test) == 0
    ).all()


@pytest.mark.parametrize("make", [toy_embeddings, toy_pairs])
def test_cross_modal_against_a_loop_over_candidates(
    make, fitted: ProbVLM, tmp_path, monkeypatch
) -> None:
    data = make(seed=1)
    batch = first_batch(data)
    # Each block holds three candidates.
    monkeypatch.setattr(probvlm, "MAX_BLOCK_ENTRIES", 3 * batch.image.numel())
    predictor = with_uncertainty(fitted, "cross_modal", tmp_path)
    expected = []
    for batch in data.batches(1000):
        _, image = distribution(predictor.network_.image, batch.image)
        z_v, z_t = (4 * z.double().numpy() for z in (batch.image, batch.text))
        logits = np.stack([image.logpdf(candidate).mean(axis=1) for candidate in z_t], axis=1)
        for j in range(len(z_t)):
            _, text = distribution(predictor.network_.text, batch.text[j])
            logits[:, j] += text.logpdf(z_v).mean(axis=1)
        p = special.softmax(logits, axis=1)[np.arange(len(logits)), batch.prediction.numpy()]
        expected.append(special.logit(1 - p))
    assert predictor.predict_uncertainty(data) == pytest.approx(
        np.concatenate(expected), rel=1e-3, abs=1e-3
    )


@pytest.mark.parametrize("uncertainty", ["epistemic", "cross_modal"])
def test_other_rows_do_not_matter(
    uncertainty: str, fitted: ProbVLM, test: Embeddings, tmp_path
) -> None:
    predictor = with_uncertainty(fitted, uncertainty, tmp_path)
    rows = torch.arange(5, 599, 17)
    part = predictor.predict_uncertainty(test.take(rows))
    assert np.allclose(
        part, predictor.predict_uncertainty(test)[rows.numpy()], rtol=1e-4, atol=1e-5
    )
