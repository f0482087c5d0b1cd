"""Test heads that begin from fitted weights, and draws with a few labels from every class."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import vilu
from tests.conftest import toy_embeddings, toy_pairs
from vilu import PREDICTORS
from vilu.errors import DataError, NotFittedError, ProvenanceError, UsageError
from vilu.predictors.contract.seen import draw_shots
from vilu.predictors.vilu.fine_tuning import FINE_TUNING, start_from_fitted
from vilu.predictors.vilu.head import HeadPredictor

QUICK = {"hidden": (16, 8), "epochs": 4, "batch_size": 64, "device": "cpu"}

pytestmark = pytest.mark.filterwarnings("ignore:only .* among")


def fitted(method: str = "vilu", **more: object) -> HeadPredictor:
    more = {"members": 2, **more} if method == "deep_ensemble" else more
    return PREDICTORS[method](**QUICK, **more).fit(toy_embeddings(n=300))


@pytest.fixture
def few():
    return toy_embeddings(n=60, seed=4, ids_from=5000)


WITH_A_HEAD = [name for name, cls in vilu.PREDICTORS.items() if issubclass(cls, HeadPredictor)]


@pytest.mark.parametrize("method", WITH_A_HEAD)
def test_training_begins_with_the_fitted_weights(method: str, few) -> None:
    """If the learning rate is almost zero, the fitted weights must not move.

    A new head starts elsewhere.
    """
    first = fitted(method)
    again = start_from_fitted(PREDICTORS[method], first, {"learning_rate": 1e-12, "epochs": 1}).fit(
        few
    )
    new = PREDICTORS[method](**{**QUICK, "learning_rate": 1e-12, "epochs": 1, "seed": 1}).fit(few)
    before, after, other = first.state(), again.state(), new.state()
    assert before.keys() == after.keys()
    # The weight decay's step may round a weight in float32. A new head is an initialisation away.
    assert all(torch.allclose(before[name], after[name], rtol=0, atol=1e-6) for name in before)
    assert not all(torch.allclose(before[name], other[name], rtol=0, atol=1e-2) for name in before)
    assert first.state().keys() == before.keys()


def test_fine_tuning_learns_and_leaves_the_first_fit_alone(few) -> None:
    first = fitted()
    before = {name: tensor.clone() for name, tensor in first.state().items()}
    tuned = start_from_fitted(PREDICTORS["vilu"], first, {"epochs": "3", "learning_rate": "0.05"})
    assert tuned.network_ is None
    tuned.fit(few)
    assert all(torch.equal(first.state()[name], before[name]) for name in before)
    moved = [name for name in before if not torch.equal(before[name], tuned.state()[name])]
    assert {"attention.image", "attention.text", "first_bias"} <= set(moved)  # no freeze
    assert (tuned.epochs, tuned.learning_rate) == (3, 0.05)
    again = start_from_fitted(PREDICTORS["vilu"], first, {"epochs": 3, "learning_rate": 0.05}).fit(
        few
    )
    assert all(torch.equal(again.state()[name], tensor) for name, tensor in tuned.state().items())
    assert not np.array_equal(tuned.predict_uncertainty(few), first.predict_uncertainty(few))


def test_parameters_are_inherited_but_for_those_of_fine_tuning(tmp_path) -> None:
    first = fitted(weighting="ema", momentum=0.5)
    first.save(tmp_path)
    tuned = start_from_fitted(PREDICTORS["vilu"], vilu.load(tmp_path))
    assert (tuned.weighting, tuned.momentum, tuned.hidden) == ("ema", 0.5, (16, 8))
    assert {name: getattr(tuned, name) for name in FINE_TUNING} == FINE_TUNING


def test_rows_of_both_fits_are_remembered(few, tmp_path) -> None:
    tuned = start_from_fitted(PREDICTORS["vilu"], fitted(), {"epochs": 1}).fit(few)
    tuned.save(tmp_path)
    found = vilu.load(tmp_path)
    assert {sketch.n_rows for sketch in found.seen_.values()} == {360}
    assert len(found.seen(few)) == 60
    assert len(found.seen(toy_embeddings(n=300))) == 300
    assert found.notes_["start"]["n_train"] == 300
    assert len(found.notes_["start"]["weights"]) == 64
    assert np.array_equal(found.predict_uncertainty(few), tuned.predict_uncertainty(few))


def test_other_methods_architectures_and_spaces_are_refused(few) -> None:
    first = fitted()
    with pytest.raises(
        UsageError,
        match="vilu_plus does not begin from another fit; methods with a failure head do",
    ):
        start_from_fitted(PREDICTORS["vilu_plus"], first)
    with pytest.raises(ProvenanceError, match=r"a lvu begins from a fitted lvu\. Got a vilu"):
        start_from_fitted(PREDICTORS["lvu"], first)
    with pytest.raises(
        ProvenanceError, match=r"a vilu begins from a fitted vilu\. Got a mc_dropout"
    ):
        start_from_fitted(PREDICTORS["vilu"], fitted("mc_dropout"))
    for values in ({"hidden": "8,8"}, {"attention": "paper"}, {"mcm_input": True}):
        with pytest.raises(ProvenanceError, match="another architecture"):
            start_from_fitted(PREDICTORS["vilu"], first, values)
    with pytest.raises(ProvenanceError, match="another architecture"):
        start_from_fitted(PREDICTORS["deep_ensemble"], fitted("deep_ensemble"), {"members": 1})
    with pytest.raises(UsageError, match="no parameter 'learning'"):
        start_from_fitted(PREDICTORS["vilu"], first, {"learning": 1})
    with pytest.raises(NotFittedError):
        start_from_fitted(PREDICTORS["vilu"], PREDICTORS["vilu"]())
    with pytest.raises(ProvenanceError, match="logit_scale"):
        start_from_fitted(PREDICTORS["vilu"], first).fit(
            toy_embeddings(n=60, seed=4, ids_from=5000, scale=30.0)
        )


def test_a_constant_is_no_start() -> None:
    data = toy_embeddings(n=100)
    right = data.image @ data.text.T
    data.target[:] = right.argmax(dim=1)
    constant = PREDICTORS["vilu"](**QUICK, allow_degenerate=True).fit(data)
    with pytest.raises(DataError, match="is a constant"):
        start_from_fitted(PREDICTORS["vilu"], constant)


def test_pools_can_be_fine_tuned_too() -> None:
    first = PREDICTORS["vilu"](**QUICK).fit(toy_pairs(n=128))
    tuned = start_from_fitted(PREDICTORS["vilu"], first, {"epochs": 2}).fit(toy_pairs(n=64, seed=5))
    assert len(tuned.notes_["history"]["loss"]) == 2


@pytest.mark.parametrize("n", [1, 5, 12])
def test_shots_are_so_many_usable_labelled_rows_of_every_class(n: int) -> None:
    data = toy_embeddings(n=400)
    data.target[:50] = -1
    data.status[50:100] = 1
    rows = draw_shots(data, n, seed=3)
    assert torch.equal(rows, rows.unique())
    assert rows.min() >= 100
    assert torch.equal(data.target[rows].bincount(), torch.full((5,), n))
    assert torch.equal(rows, draw_shots(data, n, seed=3))
    assert not torch.equal(rows, draw_shots(data, n, seed=4))
    assert set(rows.tolist()) < set(draw_shots(data, n + 1, seed=3).tolist())


def test_every_row_of_a_class_is_as_likely_as_any_other() -> None:
    """Every row must be equally likely.

    A draw takes 2 of 5 rows from each class. Over 2,000 seeds a row comes 800 times, with a
    deviation of 22.
    """
    data = toy_embeddings(n=10, k=2)
    data.target[:] = torch.arange(10) % 2
    counts = torch.cat([draw_shots(data, 2, seed) for seed in range(2000)]).bincount(minlength=10)
    assert (counts - 800).abs().max() < 5 * 22


def test_a_class_with_fewer_rows_gives_all_it_has() -> None:
    data = toy_embeddings(n=40)
    data.target[:] = torch.arange(40) % 3  # classes 3 and 4 have no rows
    data.target[39] = 3  # class 0 had 14, class 1 and 2 have 13
    with pytest.warns(
        UserWarning, match=r"2 of 5 classes have fewer than 13 labelled rows \(the fewest: 0\)"
    ):
        rows = draw_shots(data, 13)
    assert data.target[rows].bincount(minlength=5).tolist() == [13, 13, 13, 1, 0]
    assert 39 in rows.tolist()


def test_shots_are_rows_to_take() -> None:
    data = toy_embeddings(n=300)
    rows = draw_shots(data, 4, seed=1)
    part = data.take(rows)
    assert list(part.ids) == [data.ids[row] for row in rows.tolist()]
    assert torch.equal(part.image_rows(torch.arange(len(rows))), data.image[rows])
    assert torch.equal(part.target, data.target[rows])


def test_what_has_no_classes_or_no_labels_has_no_shots() -> None:
    with pytest.raises(UsageError, match="pairs have no classes"):
        draw_shots(toy_pairs(), 5)
    with pytest.raises(UsageError, match="at least 1"):
        draw_shots(toy_embeddings(), 0)
    data = toy_embeddings(n=20)
    data.target[:] = -1
    with pytest.raises(DataError, match="none of the 20 rows has a label"):
        draw_shots(data, 5)


def test_the_start_is_no_parameter() -> None:
    names = {field.name for field in dataclasses.fields(PREDICTORS["vilu"]) if field.init}
    assert "start_" not in names
