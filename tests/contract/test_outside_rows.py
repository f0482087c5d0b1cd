"""Test every method with out-of-distribution rows in its fit and validation rows."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch

import vilu
from tests.conftest import toy_columns, toy_embeddings, variant
from tests.contract.test_predictors import failures, make
from vilu import OUTSIDE, PREDICTORS
from vilu.embeddings.columns import IMAGE_COLUMNS
from vilu.embeddings.memory import Embeddings
from vilu.errors import DataError
from vilu.metrics import auroc
from vilu.predictors.contract.parameters import parameters
from vilu.predictors.contract.seen import draw_shots

N_OUTSIDE = 60
FITTED = [name for name, cls in PREDICTORS.items() if cls.needs_fit]
OF_FAILURES = [name for name in FITTED if make(name).needs == "failure"]
OF_CLASSES = [name for name in FITTED if make(name).needs == "class"]
LABELLED = OF_FAILURES + OF_CLASSES


@pytest.fixture(autouse=True)
def left_out_aloud() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".* rows are left out")
        yield


def ood_rows(data: Embeddings, seed: int, target: int = OUTSIDE) -> Embeddings:
    """Return the data, followed by sharp out-of-distribution images.

    These images point away from every text, in one direction.
    """
    rng = np.random.default_rng(seed)
    text = data.text.numpy()
    away = np.linalg.svd(text[:, :-1])[2][len(text)]  # orthogonal to all texts
    other = np.append(away, -1.0) + rng.normal(size=(N_OUTSIDE, text.shape[1])) * 0.1
    columns = {name: data.column(name, torch.arange(len(data))) for name in data.columns}
    for name, rows in toy_columns(other, text, rng).items():
        if name in IMAGE_COLUMNS:
            columns[name] = torch.cat([columns[name], torch.from_numpy(rows).float()])
    image = torch.from_numpy(other / np.linalg.norm(other, axis=1, keepdims=True)).float()
    return variant(
        data,
        image=torch.cat([data.image, image]),
        target=torch.cat([data.target, torch.full((N_OUTSIDE,), target)]),
        ids=[*data.ids, *(f"ood-{seed}-{i}" for i in range(N_OUTSIDE))],
        columns=columns,
        class_names=data.class_names,
    )


@pytest.fixture(scope="module")
def more_train(train: Embeddings) -> Embeddings:
    return ood_rows(train, 1)


@pytest.fixture(scope="module")
def validation() -> Embeddings:
    return toy_embeddings(n=300, seed=2, ids_from=5_000)


def assert_same_state(one: vilu.FailurePredictor, other: vilu.FailurePredictor) -> None:
    """Require equal tensors, except for tensors learned from out-of-distribution rows."""
    a, b = (
        {k: v for k, v in p.state().items() if not k.startswith("outside.")} for p in (one, other)
    )
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("name", PREDICTORS)
def test_scores_are_finite(
    name: str, more_train: Embeddings, validation: Embeddings, test: Embeddings
) -> None:
    predictor = make(name).fit(more_train, ood_rows(validation, 2))
    assert np.isfinite(predictor.predict_uncertainty(ood_rows(test, 3))).all()


@pytest.mark.parametrize("name", OF_CLASSES)
def test_what_learns_classes_learns_the_same_without(
    name: str, train: Embeddings, more_train: Embeddings, validation: Embeddings
) -> None:
    with pytest.warns(
        UserWarning, match=f"{N_OUTSIDE} of 660 training rows .* {N_OUTSIDE} of none of the classes"
    ):
        with_them = make(name).fit(more_train, ood_rows(validation, 2))
    assert_same_state(with_them, make(name).fit(train, validation))
    assert with_them.notes_["n_train"] == len(train)


@pytest.mark.parametrize("name", OF_FAILURES)
def test_what_learns_failures_learns_that_they_are_wrong(
    name: str, train: Embeddings, more_train: Embeddings, test: Embeddings
) -> None:
    held_out = ood_rows(test, 3)
    epochs = {"vilu_paper": 60}.get(name, 12)  # the paper's plain gradient descent is slower
    enough = {"epochs": epochs} if "epochs" in parameters(PREDICTORS[name]) else {}
    taught, other = make(name, **enough).fit(more_train), make(name, **enough).fit(train)
    assert taught.notes_["n_train"] == len(train) + N_OUTSIDE
    assert taught.notes_["n_failures"] == failures(train).sum() + N_OUTSIDE
    is_outside = held_out.outside.numpy()
    right = np.append(failures(test) == 0, np.zeros(N_OUTSIDE, dtype=bool))
    rows = is_outside | right
    before, after = (
        auroc(one.predict_uncertainty(held_out)[rows], is_outside[rows]) for one in (other, taught)
    )
    assert after >= max(before, 0.9)


@pytest.mark.parametrize("name", LABELLED)
def test_a_training_set_of_nothing_else_is_refused(name: str, more_train: Embeddings) -> None:
    nothing_else = more_train.take(np.flatnonzero(more_train.outside.numpy()))
    with pytest.raises(
        DataError, match=f"all {N_OUTSIDE} labelled training rows are of none of the classes"
    ):
        make(name).fit(nothing_else)


@pytest.mark.parametrize("name", [name for name in FITTED if name not in LABELLED])
def test_what_needs_no_label_does_not_look_at_this_one(name: str, train: Embeddings) -> None:
    assert_same_state(*(make(name).fit(ood_rows(train, 1, target)) for target in (OUTSIDE, -1)))


@pytest.mark.parametrize(
    ("predictor", "n_train"),
    [
        (
            PREDICTORS["lvu"](loss="loss", hidden=(8,), epochs=2),
            600,
        ),  # out-of-distribution images have no finite loss
        (PREDICTORS["lvu"](loss="mse", hidden=(8,), epochs=2), 660),
        (PREDICTORS["mcm_ts"](objective="nll"), 600),
        (PREDICTORS["mcm_ts"](objective="ece"), 660),
    ],
    ids=repr,
)
def test_what_is_needed_may_depend_on_a_parameter(
    predictor: vilu.FailurePredictor, n_train: int, train: Embeddings, more_train: Embeddings
) -> None:
    with_them = copy.deepcopy(predictor).fit(more_train)
    assert with_them.notes_["n_train"] == n_train
    if n_train == len(train):
        assert_same_state(with_them, copy.deepcopy(predictor).fit(train))


def test_members_of_a_stack_get_what_they_need(train: Embeddings, more_train: Embeddings) -> None:
    stack = PREDICTORS["stacking"](members=("linear_probe", "mahalanobis", "delta_knn")).fit(
        more_train
    )
    for name, alone in {
        "linear_probe": train,
        "mahalanobis": train,
        "delta_knn": more_train,
    }.items():
        assert_same_state(stack.members_[name], make(name).fit(alone))


def test_shots_are_of_classes_and_what_is_of_none_stays(more_train: Embeddings) -> None:
    rows = draw_shots(more_train, 16, seed=1).numpy()
    assert np.flatnonzero(more_train.outside.numpy()[rows]).tolist() == list(
        range(80, 80 + N_OUTSIDE)
    )
    assert np.bincount(more_train.target.numpy()[rows[:80]]).tolist() == [16] * 5
