"""Test scores from logits alone against SciPy and numbers by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import special, stats

from tests.builders.logit_rows import batch_of
from tests.conftest import toy_embeddings
from vilu.embeddings.source import Batch, log_posterior
from vilu.errors import UsageError
from vilu.predictors.zero_shot import (
    GEN,
    MCM,
    Doctor,
    Energy,
    Entropy,
    KLUniform,
    MaxLogit,
    ProbMargin,
)

RTOL = 1e-12
"""Both sides are float64 functions on the same float32 logits.

They differ by a few roundings (1e-16) at K = 40.
"""

OF_SUMS = 2e-6
"""Exponentials for the other candidates take float32 differences and are summed in float32.

The relative errors are 6e-8 times the subtracted number's size, and 6e-8 times the sum.
"""


@pytest.fixture(scope="module")
def batch() -> Batch:
    return next(toy_embeddings(n=200, k=40, d=32).batches(200))


@pytest.fixture(scope="module")
def logits(batch: Batch) -> np.ndarray:
    return batch.logits.double().numpy()


def score(predictor: object, batch: Batch) -> np.ndarray:
    return predictor._score(batch).numpy()


@pytest.mark.parametrize(
    "temperature", [1.0, 0.5, torch.linspace(0.2, 3, 200, dtype=torch.float64)[:, None]]
)
def test_log_posterior(batch: Batch, logits: np.ndarray, temperature: object) -> None:
    expected = special.log_softmax(logits / np.asarray(temperature), axis=1)
    assert np.allclose(log_posterior(batch, temperature).numpy(), expected, rtol=RTOL, atol=1e-14)


def test_prob_margin(batch: Batch, logits: np.ndarray) -> None:
    p = np.sort(special.softmax(logits, axis=1), axis=1)
    assert np.allclose(score(ProbMargin(), batch), 1 - (p[:, -1] - p[:, -2]), rtol=OF_SUMS)


def test_prob_margin_keeps_sure_rows_apart() -> None:
    """Sure rows must not tie.

    With a gap g between two logits, 1 - (p_1 - p_2) is 2 / (1 + e^g). From g = 38 on p_1 - p_2
    rounds to one.
    """
    gaps = np.array([0.0, 1.0, 40.0, 50.0, 100.0])
    u = score(ProbMargin(), batch_of([[gap, 0.0] for gap in gaps]))
    assert np.allclose(u, 2 * special.expit(-gaps), rtol=RTOL)
    assert np.all(np.diff(u) < 0)


@pytest.mark.parametrize("temperature", [1.0, 0.1, 7.0])
def test_energy(batch: Batch, logits: np.ndarray, temperature: float) -> None:
    expected = -temperature * special.logsumexp(logits / temperature, axis=1)
    assert np.allclose(score(Energy(temperature), batch), expected, rtol=OF_SUMS)


@pytest.mark.parametrize("scale", [1.0, 10.0, 100.0])
@pytest.mark.parametrize(("k", "spread"), [(2, 1.0), (40, 0.3), (1_000, 0.1)])
def test_scores_that_sum_in_float32(k: int, spread: float, scale: float) -> None:
    """Scores must agree with float64 on the same logits, also where 1 - p is tiny.

    The reference keeps the largest logit apart, so nothing cancels.
    """
    logits = torch.randn(300, k, generator=torch.Generator().manual_seed(k)) * spread * scale
    exact = np.sort(logits.double().numpy(), axis=1)[:, ::-1]
    below = exact[:, 1:] - exact[:, :1]
    e = np.exp(below)
    s, t, q = e.sum(axis=1), -(e * below).sum(axis=1), np.square(e).sum(axis=1)
    expected = {
        MCM: s / (1 + s),
        Entropy: (np.log1p(s) + t / (1 + s)) / math.log(k),
        Doctor: (s * (2 + s) - q) / (1 + q),
        ProbMargin: (s + e[:, 0]) / (1 + s),
        Energy: -(exact[:, 0] + np.log1p(s)),
    }
    batch = batch_of(logits.tolist())
    for kind, values in expected.items():
        # An energy may be near zero by chance.
        assert np.allclose(
            score(kind(), batch), values, rtol=OF_SUMS, atol=1e-7 if kind is Energy else 0
        ), kind
    assert batch.zero_shot.log_norm.numpy() == pytest.approx(
        special.logsumexp(exact, axis=1), rel=1e-6, abs=1e-6
    )


@pytest.mark.parametrize("kind", [MCM, Entropy, Doctor, ProbMargin, Energy])
def test_a_sure_row_changes_no_bit_of_another(kind: type) -> None:
    """A sure row must not change how other rows are summed.

    Its sum over float32 exponentials vanishes, so its sum is taken about another logit.
    """
    rows = (torch.randn(50, 40, generator=torch.Generator().manual_seed(0)) * 5).tolist()
    sure = [500.0] + [float(i % 7) for i in range(39)]
    together = score(kind(), batch_of([sure, *rows]))
    assert np.array_equal(together[1:], score(kind(), batch_of(rows)))
    assert together[0] == pytest.approx(score(kind(), batch_of([sure]))[0], rel=1e-12)
    if kind is not Energy:
        assert together[0] > 0  # e^-494 is a float64


def test_energy_of_a_low_temperature_is_the_largest_logit(batch: Batch) -> None:
    # -max l - T log K <= u <= -max l.
    difference = score(MaxLogit(), batch) - score(Energy(1e-6), batch)
    assert difference.min() >= -1e-15
    assert difference.max() <= 1e-6 * math.log(40)


@pytest.mark.parametrize("gamma", [0.1, 0.5])
@pytest.mark.parametrize("largest", [1, 7, 40, 100])
def test_gen(batch: Batch, logits: np.ndarray, gamma: float, largest: int) -> None:
    p = np.sort(special.softmax(logits, axis=1), axis=1)[:, ::-1][:, :largest]
    expected = (p**gamma * (1 - p) ** gamma).sum(axis=1)
    # 1 - p loses digits where p is near one. The relative error is 1e-16 / (1 - p), here at most
    # 1e-9, times gamma.
    assert np.allclose(score(GEN(gamma, largest), batch), expected, rtol=1e-9)


def test_gen_by_hand() -> None:
    u = score(GEN(), batch_of([[0.0, 0.0], [2000.0, 0.0], [400.0, 0.0]]))
    # Two halves give 2 (1/4)^0.1. A posterior that underflows gives nothing. A tail e^-400 gives
    # twice (e^-400)^0.1.
    assert np.allclose(u, [2 * 0.25**0.1, 0.0, 2 * math.exp(-40)], rtol=RTOL)


def test_kl_uniform(batch: Batch, logits: np.ndarray) -> None:
    uniform = np.full(40, 1 / 40)
    expected = [-stats.entropy(uniform, p) for p in special.softmax(logits, axis=1)]
    assert np.allclose(score(KLUniform(), batch), expected, rtol=RTOL, atol=1e-14)


def test_kl_uniform_takes_the_direction_that_is_not_entropy(
    batch: Batch, logits: np.ndarray
) -> None:
    p = special.softmax(logits, axis=1)
    other_direction = [-stats.entropy(row, np.full(40, 1 / 40)) for row in p]
    entropy = score(Entropy(), batch)
    assert np.array_equal(np.argsort(other_direction), np.argsort(entropy))
    assert not np.array_equal(np.argsort(score(KLUniform(), batch)), np.argsort(entropy))
    assert score(KLUniform(), batch_of([[3.0, 3.0, 3.0]]))[0] == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize(
    ("predictor", "message"),
    [
        (Energy(0.0), "'temperature' parameter of energy"),
        (GEN(gamma=1.5), "'gamma'"),
        (GEN(largest=0), "'largest'"),
    ],
)
def test_hyper_parameters_are_checked_before_scoring(predictor: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        predictor.predict_uncertainty(toy_embeddings(n=20))
