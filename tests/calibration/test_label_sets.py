"""Test label sets: the posterior, both scores by hand, and the share of sets that miss."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import vilu
from tests.conftest import toy_embeddings, toy_pairs, without_words
from vilu.calibration.label_sets import (
    LabelSets,
    failure_aware_posterior,
    fit_label_sets,
    nonconformity,
)
from vilu.embeddings.memory import Embeddings
from vilu.embeddings.source import Batch
from vilu.errors import DataError, InfeasibleError, UsageError

MADE = {"max_miss": 0.1, "n": 10, "mean_size": 1.0, "empirical_miss": 0.0}


def batch_of(logits: list[list[float]]) -> Batch:
    """Return a batch with the given logits.

    The texts are unit vectors, one per axis.
    """
    rows = torch.tensor(logits, dtype=torch.float32)
    text = torch.eye(rows.shape[1])
    return Batch(rows, text, torch.zeros(len(rows), dtype=torch.long), torch.arange(len(rows)), 1.0)


def test_posterior_by_hand() -> None:
    batch = batch_of([np.log([0.5, 0.3, 0.2]).tolist()])
    q = failure_aware_posterior(batch, batch.logits.double().log_softmax(1), torch.tensor([0.4]))
    assert q[0].tolist() == pytest.approx([0.6, 0.4 * 0.3 / 0.5, 0.4 * 0.2 / 0.5])


def test_posterior_stays_exact_where_the_answer_is_certain() -> None:
    batch = batch_of([[100.0, 2.0, 1.0]])
    q = failure_aware_posterior(batch, batch.logits.double().log_softmax(1), torch.tensor([0.5]))
    assert q[0, 1:].tolist() == pytest.approx(
        (0.5 * torch.softmax(torch.tensor([2.0, 1.0]), 0)).tolist()
    )


def test_scores_by_hand() -> None:
    batch = batch_of([np.log([0.5, 0.3, 0.2]).tolist(), np.log([0.4, 0.3, 0.3]).tolist()])
    predictor = vilu.MCM()
    u = np.array([0.5, 0.6])  # as in the posterior, so that q = p
    lac = nonconformity(predictor, batch, u, "lac")
    assert lac.tolist() == [
        pytest.approx([0.5, 0.7, 0.8], abs=1e-6),
        pytest.approx([0.6, 0.7, 0.7], abs=1e-6),
    ]
    aps = nonconformity(predictor, batch, u, "aps")
    assert aps[0].tolist() == pytest.approx([0, 0.5, 0.8], abs=1e-6)
    # Equal candidates are added together.
    assert aps[1].tolist() == pytest.approx([0, 0.4, 0.4], abs=1e-6)


@pytest.mark.parametrize("method", ["lac", "aps"])
def test_sets_grow_with_the_probability_of_failure(method: str) -> None:
    batch = batch_of([np.log([0.6, 0.2, 0.15, 0.05]).tolist()] * 5)
    limit = {"lac": 0.9, "aps": 0.75}[method]
    sets = LabelSets(method=method, limit=limit, **MADE).members(
        vilu.MCM(), batch, np.array([0.01, 0.2, 0.3, 0.45, 0.55])
    )
    sizes = sets.sum(dim=1).tolist()
    assert sizes == sorted(sizes)
    assert sizes[0] == 1 < sizes[-1]


@pytest.mark.parametrize("method", ["lac", "aps"])
def test_the_share_that_misses_is_guaranteed(method: str) -> None:
    """The mean share of missed labels must be at most ``max_miss``.

    It is a mean over calibration rows and new rows, in 60 splits of one pool.
    """
    data = toy_embeddings(n=4000, seed=3, ids_from=None)
    rng, misses, sizes = np.random.default_rng(0), [], []
    predictor = vilu.MCM()
    for _ in range(60):
        chosen = torch.from_numpy(rng.permutation(len(data)))
        calibration, new = (data.take(rows) for rows in (chosen[:300], chosen[300:800]))
        sets = fit_label_sets(predictor, calibration, max_miss=0.2, method=method)
        found = [
            (sets.members(predictor, batch, u), batch.target) for batch, u in predictor.scored(new)
        ]
        inside = torch.cat([one.gather(1, target[:, None])[:, 0] for one, target in found])
        misses.append(1 - inside.double().mean().item())
        sizes.append(sets.mean_size)
    error = np.std(misses) / np.sqrt(len(misses))
    assert np.mean(misses) <= 0.2 + 3 * error
    if method == "lac":  # the scores have no ties, so the share is exact up to 1 / (n + 1)
        assert np.mean(misses) >= 0.2 - 1 / 301 - 3 * error
    assert 0.8 <= np.mean(sizes) < 3


def test_the_limit_is_the_conformal_quantile() -> None:
    data = toy_embeddings(n=99, seed=4, ids_from=None)
    predictor = vilu.MCM()
    sets = fit_label_sets(predictor, data, max_miss=0.1, method="lac")
    ((batch, u),) = list(predictor.scored(data))
    true = nonconformity(predictor, batch, u, "lac").gather(1, batch.target[:, None])[:, 0]
    assert sets.limit == true.sort().values[89]  # the 90th among 99: ceil(100 * 0.9)
    assert sets.empirical_miss == pytest.approx(9 / 99)


def test_the_calibrator_has_no_say() -> None:
    """Label sets must not use the calibrator, because it was fitted on the calibration rows.

    A score from the calibrator would not be exchangeable with scores for new rows.
    """
    data = toy_embeddings(n=300, seed=4, ids_from=None)
    plain = fit_label_sets(vilu.MCM(), data, max_miss=0.1, method="lac")
    assert (
        fit_label_sets(vilu.MCM().calibrate_probability(data), data, max_miss=0.1, method="lac")
        == plain
    )


def test_own_posterior_of_vilu_plus(train: Embeddings, test: Embeddings) -> None:
    rows = without_words(test)
    learned = vilu.ViLUPlus(width=32, epochs=5).fit(without_words(train))
    ((batch, u),) = list(learned.scored(rows))
    own = learned.log_posterior(batch)
    assert own.exp().sum(dim=1).tolist() == pytest.approx([1.0] * len(rows))
    at_answer = own.gather(1, batch.prediction[:, None])[:, 0].exp()
    assert (1 - at_answer).tolist() == pytest.approx(u.tolist(), abs=1e-6)  # float32 sums
    sizes = []
    for predictor in (learned, vilu.MCM()):
        sets = fit_label_sets(predictor, rows, max_miss=0.1, method="lac")
        found = [
            nonconformity(predictor, *scored, "lac") <= sets.limit
            for scored in predictor.scored(rows)
        ]
        sizes.append(torch.cat(found).sum(dim=1).double())
        assert sizes[-1].mean().item() == pytest.approx(sets.mean_size)
    # The difference is taken on the same rows, so the rows' difficulty cancels.
    more = sizes[0] - sizes[1]
    assert more.mean() <= 2 * more.std() / len(more) ** 0.5


def test_refusals(train: Embeddings) -> None:
    few = toy_embeddings(n=8, ids_from=None)
    with pytest.raises(InfeasibleError, match="need at least 9 calibration rows"):
        fit_label_sets(vilu.MCM(), few, max_miss=0.1, method="lac")
    with pytest.raises(UsageError, match="need classes"):
        fit_label_sets(vilu.MCM(), toy_pairs(), max_miss=0.1, method="lac")
    with pytest.raises(UsageError, match="max_miss must be in"):
        fit_label_sets(vilu.MCM(), few, max_miss=0.0, method="lac")
    with pytest.raises(UsageError, match="a score, not a probability"):
        fit_label_sets(vilu.Entropy(), few, max_miss=0.5, method="lac")
    with pytest.raises(DataError, match="were used to fit"):
        fit_label_sets(
            vilu.ViLU(hidden=(8,), epochs=1).fit(train), train, max_miss=0.5, method="lac"
        )
    with pytest.raises(DataError, match="has a label"):
        fit_label_sets(
            vilu.MCM(),
            Embeddings(few.image, few.text, logit_scale=20.0),
            max_miss=0.5,
            method="lac",
        )
