"""Test Monte-Carlo dropout and deep ensembles against heads that are thinned, fitted and averaged
by hand.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from tests.conftest import toy_embeddings
from vilu.embeddings.memory import Embeddings
from vilu.embeddings.source import Batch
from vilu.errors import DataError, UsageError
from vilu.metrics import auroc
from vilu.predictors.nn.head import Dropout, FailureHead
from vilu.predictors.vilu.vilu import ViLU
from vilu_bench.methods.ensembles import DeepEnsemble, MCDropout

QUICK = {"hidden": (16, 8), "epochs": 4, "batch_size": 64, "device": "cpu"}


@pytest.fixture(scope="module")
def data() -> tuple[Embeddings, Embeddings, Embeddings]:
    return tuple(toy_embeddings(n=300, seed=seed, ids_from=1000 * seed) for seed in range(3))


@pytest.fixture(scope="module")
def dropped(data) -> MCDropout:
    return MCDropout(**QUICK, dropout=0.3, passes=7).fit(data[0], data[1])


def first_batch(data: Embeddings) -> Batch:
    return next(data.batches(len(data)))


def test_passes_are_thinned_heads(data, dropped: MCDropout) -> None:
    """A dropped unit has the weight zero in the next matrix.

    The expected scores come from changed weights, in float64.
    """
    state = {name: tensor.double() for name, tensor in dropped.state().items()}
    batch = first_batch(data[2])
    hidden = FailureHead(16, (16, 8))
    hidden.load_state_dict(
        {
            name.replace("rest.2", "rest.1").replace("rest.5", "rest.3"): t
            for name, t in dropped.state().items()
        }
    )
    first = hidden.first_layer(batch).detach().double().relu()
    generator = torch.Generator().manual_seed(0)
    scores = []
    for _ in range(7):
        one, two = (
            torch.empty(width).bernoulli_(0.7, generator=generator).double() / 0.7
            for width in (16, 8)
        )
        second = (first @ (state["rest.2.weight"] * one).T + state["rest.2.bias"]).relu()
        scores.append(
            (second @ (state["rest.5.weight"] * two).T + state["rest.5.bias"]).squeeze(1).sigmoid()
        )
    expected = torch.stack(scores).mean(0).numpy()
    np.testing.assert_allclose(dropped.predict_uncertainty(data[2]), expected, atol=1e-5)


def test_many_passes_are_the_mean_over_random_masks(data, dropped: MCDropout) -> None:
    """The reference is torch's own dropout, where every row has its own masks."""
    torch.manual_seed(0)
    batch, head = first_batch(data[2]), dropped.heads[0]
    first, draws = head.first_layer(batch).detach(), []
    for _ in range(400):
        hidden = first
        for layer in head.rest:
            hidden = (
                torch.nn.functional.dropout(hidden, 0.3)
                if isinstance(layer, Dropout)
                else layer(hidden)
            )
        draws.append(hidden.squeeze(1).detach().sigmoid())
    draws = torch.stack(draws)
    many = dataclasses.replace(dropped, passes=400)
    many.space_, many.network_ = dropped.space_, head
    found = torch.from_numpy(many.predict_uncertainty(data[2]))
    error = draws.std(0) * np.sqrt(2 / 400)
    # All 300 rows share the masks on one side. The largest of 300 errors is below five standard
    # deviations.
    assert ((found - draws.mean(0)).abs() <= 5 * error + 1e-6).all()


def test_a_vanishing_rate_is_vilu(data) -> None:
    """If all masks are ones, fitted weights must be equal to the bit, and scores to 1e-12."""
    plain = ViLU(**QUICK).fit(data[0], data[1])
    dropout = MCDropout(**QUICK, dropout=1e-12).fit(data[0], data[1])
    assert [tensor.tolist() for _, tensor in sorted(dropout.state().items())] == [
        tensor.tolist() for _, tensor in sorted(plain.state().items())
    ]
    np.testing.assert_allclose(
        dropout.predict_uncertainty(data[2]), plain.predict_uncertainty(data[2]), atol=1e-12
    )


def test_dropout_trains_other_heads_and_selects_without(data, dropped: MCDropout) -> None:
    undropped = ViLU(**QUICK).fit(data[0], data[1])
    assert dropped.notes_["history"]["loss"] != undropped.notes_["history"]["loss"]
    batch = first_batch(data[1])
    # Logits at the kept epoch, without masks.
    logit = dropped.heads[0](batch).detach().double().numpy()
    history = dropped.notes_["history"]
    kept = history["validation_auroc"][history["kept_epoch"]]
    assert auroc(logit, batch.failure.numpy()) == kept


def test_masks_have_the_rate_and_keep_the_mean() -> None:
    layer = Dropout(0.2, seed=3)
    mask = layer.mask((400, 500), torch.Generator().manual_seed(0))
    assert set(mask.unique().tolist()) == {0.0, float(torch.tensor(1.0) / 0.8)}
    # The tolerance is five standard errors with 200,000 Bernoulli draws.
    assert float((mask == 0).float().mean()) == pytest.approx(0.2, abs=5 * np.sqrt(0.16 / 200_000))
    rows = torch.rand(6, 5)
    first, second = layer(rows), layer(rows)
    assert not torch.equal(first, second)
    assert torch.equal(Dropout(0.2, seed=3)(rows), first)
    assert torch.equal(layer.eval()(rows), rows)


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1])
def test_rates_that_cannot_be(rate: float, data) -> None:
    with pytest.raises(UsageError, match="'dropout'"):
        MCDropout(**QUICK, dropout=rate).fit(data[0])


@pytest.fixture(scope="module")
def ensemble(data) -> DeepEnsemble:
    return DeepEnsemble(**QUICK, members=3, seed=2).fit(data[0], data[1])


def test_an_ensemble_is_the_mean_of_heads_fitted_alone(data, ensemble: DeepEnsemble) -> None:
    alone = [ViLU(**QUICK, seed=seed).fit(data[0], data[1]) for seed in (6, 7, 8)]
    scores = np.array([member.predict_uncertainty(data[2]) for member in alone])
    np.testing.assert_allclose(ensemble.predict_uncertainty(data[2]), scores.mean(0), rtol=1e-14)
    assert len(np.unique(scores[:, 0])) == 3
    assert ensemble.notes_["member_1"] == {"history": alone[1].notes_["history"]}


def test_one_member_is_vilu(data) -> None:
    one = DeepEnsemble(**QUICK, members=1, seed=4).fit(data[0], data[1])
    assert np.array_equal(
        one.predict_uncertainty(data[2]),
        ViLU(**QUICK, seed=4).fit(data[0], data[1]).predict_uncertainty(data[2]),
    )


def test_weights_of_other_heads_are_refused(ensemble: DeepEnsemble) -> None:
    state = ensemble.state()
    for fewer in (
        DeepEnsemble(**QUICK, members=2),
        DeepEnsemble(**QUICK | {"hidden": (16, 4)}, members=3),
    ):
        fewer.space_ = ensemble.space_
        with pytest.raises(DataError, match="weights"):
            fewer.restore(dict(state))
    more = DeepEnsemble(**QUICK, members=4)
    more.space_ = ensemble.space_
    with pytest.raises(DataError, match="do not fit"):
        more.restore(dict(state))
