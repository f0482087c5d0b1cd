"""Test LVU's targets and links by definition, at their optimum, and where the losses are large."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import special

import vilu
from tests.conftest import toy_embeddings
from vilu.metrics import auroc
from vilu.predictors.nn.losses import LOSSES, FailureWeight
from vilu.predictors.vilu.vilu import LVU

STATIC = FailureWeight("static", 0.3)


@pytest.mark.parametrize("loss", ["mse", "loss"])
def test_regression_by_definition(loss: str) -> None:
    batch = next(toy_embeddings(n=90).batches(90))
    g = torch.linspace(-3, 3, 90)
    p = special.softmax(batch.logits.double().numpy(), axis=1)[np.arange(90), batch.target.numpy()]
    x = g.double().numpy()
    predicted, target = {
        "mse": (special.expit(x), 1 - p),
        "loss": (np.log1p(np.exp(x)), -np.log(p)),
    }[loss]
    weight = np.where(batch.failure.numpy() == 1, 2.0, 1.0)
    expected = (weight * (predicted - target) ** 2).mean() / max((target**2).mean(), 1)
    found = LOSSES[loss](FailureWeight("static", 0.3, 2.0))(batch, g)
    assert float(found) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss", ["mse", "loss"])
def test_the_best_constant_is_the_mean_target(
    loss: str,
) -> None:
    batch = next(toy_embeddings(n=400).batches(400))
    g = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [g], max_iter=100, line_search_fn="strong_wolfe", tolerance_grad=1e-9
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = LOSSES[loss](STATIC)(batch, g.expand(400))
        value.backward()
        return value

    optimizer.step(closure)
    p = special.softmax(batch.logits.double().numpy(), axis=1)[np.arange(400), batch.target.numpy()]
    # The expected value is one minus the true class's mean probability. The mean is arithmetic for
    # mse and geometric for loss. The tolerance is for a parabola's optimum in float32.
    expected = 1 - (p.mean() if loss == "mse" else np.exp(np.log(p).mean()))
    assert torch.sigmoid(g).item() == pytest.approx(expected, abs=1e-3)
    assert torch.sigmoid(g).item() >= 1 - p.mean() - 1e-3


@pytest.mark.parametrize(("k", "scale"), [(2, 100.0), (50, 100.0), (5, 20.0)])
def test_large_losses_do_not_break_the_training(k: int, scale: float) -> None:
    """Training must survive losses up to tens of nats in few rows, as two classes have at CLIP's
    scale.
    """
    train, test = (
        toy_embeddings(n=1000, k=k, scale=scale),
        toy_embeddings(k=k, scale=scale, seed=1, ids_from=5000),
    )
    predictor = vilu.LVU(hidden=(16, 8), epochs=20, loss="loss").fit(train)
    failure = next(test.batches(600)).failure.numpy()
    u = predictor.predict_uncertainty(test)
    assert auroc(u, failure) > 0.6
    assert 0 <= u.min() <= u.max() <= 1


def test_every_loss_has_an_entry() -> None:
    assert set(LOSSES) == {"mse", "loss", "bce"}
    for loss in LOSSES:
        assert (
            LVU(loss=loss, hidden=(4,), epochs=1)
            .fit(toy_embeddings())
            .predict_uncertainty(toy_embeddings())
            .size
        )
