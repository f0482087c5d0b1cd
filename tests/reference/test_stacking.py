"""Test stacking against scikit-learn, put together by hand from methods on the same folds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import special
from sklearn.linear_model import LogisticRegression

import vilu
from tests.conftest import toy_embeddings
from vilu import PREDICTORS
from vilu.embeddings.memory import Embeddings
from vilu.embeddings.rows import Rows
from vilu.errors import DataError, UsageError
from vilu.predictors.contract import labelled as folds
from vilu.predictors.stacking import Stacking

MEMBERS = ("mcm", "max_logit", "knn_vote", "linear_probe", "mahalanobis")


def failures(data: Embeddings) -> np.ndarray:
    return torch.cat([batch.failure for batch in data.batches(1024)]).numpy()


def columns(train: Embeddings, data: Embeddings) -> np.ndarray:
    """Return scores (N, M) from methods that are fitted through their public interface."""
    found = []
    for name in MEMBERS:
        score = PREDICTORS[name]().fit(train).predict_uncertainty(data)
        found.append(
            special.logit(score.clip(1e-12, 1 - 1e-12))
            if PREDICTORS[name].is_probability
            else score
        )
    return np.stack(found, axis=1)


def by_hand(scores: np.ndarray, failure: np.ndarray, new: np.ndarray) -> np.ndarray:
    mean, deviation = scores.mean(axis=0), scores.std(axis=0)
    model = LogisticRegression(max_iter=1000, tol=1e-6)
    model.fit(((scores - mean) / deviation).clip(-5, 5), failure)
    return model.predict_proba(((new - mean) / deviation).clip(-5, 5))[:, 1]


def test_cross_fitted_by_hand() -> None:
    train, test = toy_embeddings(n=200), toy_embeddings(seed=1, ids_from=1000)
    failure = failures(train)
    scores = np.full((200, len(MEMBERS)), np.nan)
    for rest, part in folds.cross_fit_splits(
        Rows(train, torch.arange(200)), torch.from_numpy(failure), None, 0
    ):
        scores[part.index] = columns(*(train.take(rows.index) for rows in (rest, part)))
    found = Stacking(members=MEMBERS).fit(train).predict_uncertainty(test)
    # L-BFGS stops at a gradient norm 1e-6, and rounding may make it stop a step earlier.
    assert np.allclose(found, by_hand(scores, failure, columns(train, test)), atol=1e-5)


def test_on_validation_rows_by_hand() -> None:
    train, validation, test = (
        toy_embeddings(n=200, seed=seed, ids_from=1000 * seed) for seed in range(3)
    )
    found = Stacking(members=MEMBERS).fit(train, validation).predict_uncertainty(test)
    expected = by_hand(columns(train, validation), failures(validation), columns(train, test))
    assert np.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("n", [3, 10, 23])
def test_folds_part_the_rows_and_share_the_failures(n: int) -> None:
    failure = (torch.arange(n) % 3 == 0).long()
    index = torch.arange(n) + 5
    roles = folds.cross_fit_splits(Rows(toy_embeddings(n=n + 5), index), failure, None, 0)
    assert torch.equal(torch.cat([part.index for _, part in roles]).sort().values, index)
    for rest, part in roles:
        assert torch.equal(torch.cat([rest.index, part.index]).sort().values, index)
        assert abs(float(failure[part.index - 5].sum()) - float(failure.sum()) / 5) < 1


def test_of_many_rows_one_fifth_is_held_out() -> None:
    data = toy_embeddings(n=200)
    failure = torch.from_numpy(failures(data))
    rows = Rows(data, torch.arange(200))
    ((rest, part),) = folds.cross_fit_splits(rows, failure, None, 0, max_folded_rows=30)
    assert (len(rest.index), len(part.index)) == (160, 30)
    assert not set(rest.index.tolist()) & set(part.index.tolist())


@pytest.mark.filterwarnings("ignore:.*its probabilities say little")
def test_a_handful_of_labels() -> None:
    """A few labels must give finite probabilities that differ.

    With two rows each fold leaves one row. With ten rows in ten classes, no class is in both parts
    of a fold.
    """
    many = toy_embeddings(k=10)
    failure, target = failures(many), many.target.numpy()
    wrong = np.flatnonzero(failure)[:2]
    right = [
        np.flatnonzero((failure == 0) & (target == c))[0]
        for c in range(10)
        if c not in target[wrong]
    ]
    for rows in ([wrong[0], right[0]], [*wrong, *right]):
        with pytest.warns(UserWarning, match="expect an unreliable fit"):
            predictor = Stacking().fit(many.take(torch.tensor(rows)))
        probability = predictor.predict_failure_probability(many)
        assert np.isfinite(probability).all()
        assert probability.std() > 0


def test_a_member_that_is_the_same_everywhere_has_no_weight() -> None:
    """A constant score varies by rounding, because 0.1 has no exact mean.

    It must still have no weight.
    """
    scores = torch.stack(
        [torch.randn(50, generator=torch.Generator().manual_seed(0)), torch.full((50,), 0.1)], dim=1
    )
    stack = Stacking()._regress(scores.double(), torch.arange(50) % 2)
    assert stack["coefficients"][0] != 0
    assert stack["coefficients"][1] == 0


def test_members_bring_their_columns_and_states(tmp_path) -> None:
    train, test = toy_embeddings(n=200), toy_embeddings(n=50, seed=1, ids_from=1000)
    quick = Stacking(members=("mcm", "tta", "prompt_disagreement", "sirc"))
    found = quick.fit(train).predict_uncertainty(test)
    assert set(quick.columns_to_score) == {"views", "prompts"}
    quick.save(tmp_path)
    assert np.array_equal(vilu.load(tmp_path).predict_uncertainty(test), found)


def test_members_are_checked() -> None:
    train = toy_embeddings(n=60)
    for members, match in [
        (("mcm", "entrpy"), "Did you mean 'entropy'"),
        (("mcm", "mcm"), "must be different methods"),
        (("mcm", "stacking"), "must be different methods"),
        ((), "'members' parameter of stacking"),
    ]:
        with pytest.raises(UsageError, match=match):
            Stacking(members=members).fit(train)


def test_held_out_rows_of_one_kind_are_refused() -> None:
    train, other = toy_embeddings(n=200), toy_embeddings(n=100, seed=1, ids_from=1000)
    right = other.take(torch.from_numpy(np.flatnonzero(failures(other) == 0)))
    with pytest.raises(DataError, match="Found 0 failures among them"):
        Stacking(members=("mcm",)).fit(train, right)


def test_rows_of_one_picture_are_refused() -> None:
    image, text = np.tile([1.0, 0.0], (80, 1)), np.eye(2)
    data = Embeddings(image, text, target=[0, 0, 0, 1] * 20)
    with pytest.raises(DataError, match="all 80 training rows show one picture"):
        Stacking(members=("mcm", "linear_probe")).fit(data)


def test_restore_refuses_other_tensors() -> None:
    train = toy_embeddings(n=200)
    state = Stacking(members=MEMBERS).fit(train).state()
    for members in (MEMBERS[:-1], (*MEMBERS, "entropy")):
        with pytest.raises(DataError, match="a stacking holds mean, deviation"):
            Stacking(members=members).restore(dict(state))
