"""Test MCM's fitted temperature.

The references are SciPy's scalar search, autograd, and data with a known temperature.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import optimize, special

import vilu
from tests.builders.logit_rows import batch_of
from tests.conftest import toy_embeddings, toy_pairs, variant
from vilu.embeddings.memory import Embeddings
from vilu.embeddings.rows import Rows
from vilu.embeddings.source import EmbeddingSource
from vilu.predictors import temperature as fitted
from vilu.predictors.temperature import (
    MCMTS,
    calibration_errors,
    golden_section_search,
    loss_and_derivative,
)

CPU = torch.device("cpu")


def logits_and_targets(data: EmbeddingSource) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(batch.logits.double().numpy(), batch.target.numpy()) for batch in data.batches(10_000)]


def likelihood(data: EmbeddingSource, log_multiplier: float) -> float:
    losses = [
        -special.log_softmax(logits * math.exp(log_multiplier), axis=1)[
            np.arange(len(target)), target
        ]
        for logits, target in logits_and_targets(data)
    ]
    return float(np.concatenate(losses).mean())


def known_temperature(multiplier: float, n: int = 4000) -> Embeddings:
    """Return rows whose labels are drawn from the posterior at ``multiplier`` times the logit
    scale.
    """
    data, rng = toy_embeddings(n=n, k=8), np.random.default_rng(1)
    p = special.softmax(logits_and_targets(data)[0][0] * multiplier, axis=1)
    return variant(data, target=(p.cumsum(axis=1) > rng.random((n, 1))).argmax(axis=1))


@pytest.mark.parametrize(
    "data", [toy_embeddings(), known_temperature(0.2), toy_pairs()], ids=["toy", "cold", "pairs"]
)
def test_likelihood_optimum_is_that_of_a_scalar_search(data: EmbeddingSource) -> None:
    predictor = MCMTS().fit(data)
    expected = optimize.minimize_scalar(
        lambda v: likelihood(data, v), bounds=(-4, 4), options={"xatol": 1e-9}
    ).x
    # A scalar search without gradients finds a minimum up to the square root of float64's
    # precision, about 1e-8 times f / f''.
    assert float(predictor.learned_["log_multiplier"]) == pytest.approx(expected, abs=1e-6)


def test_likelihood_terms_are_a_value_and_its_derivative() -> None:
    batch = next(toy_embeddings(n=50).batches(50))
    v = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    value = torch.nn.functional.cross_entropy(
        batch.logits.double() * v.exp(), batch.target, reduction="sum"
    )
    value.backward()
    assert torch.allclose(
        loss_and_derivative(batch, 0.3), torch.stack([value.detach(), v.grad]), rtol=1e-12
    )


@pytest.mark.parametrize("objective", ["nll", "ece"])
def test_a_known_temperature_is_found(objective: str) -> None:
    truth = 0.3
    data = known_temperature(truth)
    found = float(MCMTS(objective=objective).fit(data).learned_["log_multiplier"])
    # The Fisher information on log m is N E[Var_p(z)]. The likelihood may miss by four standard
    # errors. The calibration error uses less from the labels and has a flat, jagged minimum, so it
    # may miss by twelve.
    z = logits_and_targets(data)[0][0] * truth
    p = special.softmax(z, axis=1)
    variance = ((p * z**2).sum(1) - (p * z).sum(1) ** 2).sum()
    assert abs(found - math.log(truth)) < (4 if objective == "nll" else 12) / math.sqrt(variance)


def test_streaming_in_small_batches_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    data = toy_embeddings()
    whole = [float(MCMTS(objective=o).fit(data).learned_["log_multiplier"]) for o in ("nll", "ece")]
    monkeypatch.setattr(fitted, "SCORING_BATCH", 37)
    parts = [float(MCMTS(objective=o).fit(data).learned_["log_multiplier"]) for o in ("nll", "ece")]
    assert parts == pytest.approx(whole, abs=1e-6)


def test_calibration_errors_are_the_metric() -> None:
    data = toy_embeddings()
    batch = next(data.batches(600))
    multipliers = [-2.0, 0.0, 0.7]
    found = calibration_errors(Rows(data, torch.arange(600)), 600, CPU, multipliers)
    for value, v in zip(found, multipliers, strict=True):
        u = 1 - special.softmax(batch.logits.double().numpy() * math.exp(v), axis=1).max(axis=1)
        assert value == pytest.approx(vilu.metrics.ece(u, batch.failure.numpy(), bins=15), abs=2e-6)


def test_the_calibration_optimum_is_at_least_as_good_as_the_grid() -> None:
    data = toy_embeddings()
    rows = Rows(data, torch.arange(600))
    found = float(MCMTS(objective="ece").fit(data).learned_["log_multiplier"])
    grid = np.linspace(-math.log(100), math.log(100), 41).tolist()
    error, *others = calibration_errors(rows, 600, CPU, [found, *grid])
    assert error <= min(others)


@pytest.mark.parametrize("centre", [-0.7, 0.0, 0.99])
def test_golden_section(centre: float) -> None:
    for function in (lambda x: (x - centre) ** 2, lambda x: abs(x - centre)):
        point, value = golden_section_search(function, -1.0, 1.0)
        assert point == pytest.approx(centre, abs=fitted.MIN_INTERVAL)
        assert value == function(point)


def test_without_failures_it_scores_as_mcm_and_says_so() -> None:
    data = toy_embeddings()
    failure = next(data.batches(600)).failure
    right = data.take((failure == 0).nonzero().squeeze(1))
    with pytest.warns(UserWarning, match="only 0 failures among .* they identify no temperature"):
        predictor = MCMTS().fit(right)
    assert np.array_equal(predictor.predict_uncertainty(data), vilu.MCM().predict_uncertainty(data))
    assert predictor.notes_["multiplier"] == 1


def test_labels_that_contradict_the_logits_end_at_the_bound() -> None:
    data = toy_embeddings(k=2)
    contrary = variant(data, target=1 - next(data.batches(600)).prediction)
    assert MCMTS().fit(contrary).notes_["multiplier"] == pytest.approx(0.01)


def test_the_temperature_changes_the_order_of_rows() -> None:
    """A temperature must be able to change the order.

    One row has one strong rival, and one row has many weak rivals. Their number counts for more if
    the posterior is flatter.
    """
    batch = batch_of([[0.0, -0.5, -9, -9, -9, -9], [0.0, -2.0, -2, -2, -2, -2]])
    order = [int(fitted.tempered_uncertainty(batch, math.log(m)).argmax()) for m in (2.0, 0.5)]
    # 1 / u - 1 is one over the rivals' sum of exp(m l_j): e^-1 + 4 e^-18 > 5 e^-4, and e^-.25 + 4
    # e^-4.5 < 5 e^-1.
    assert order == [0, 1]
