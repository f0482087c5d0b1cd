"""Predictor and embeddings to outcomes, and the memory of what was fitted on."""

from __future__ import annotations

import numpy as np
import pytest

import vilu
from tests.conftest import toy_embeddings, toy_pairs
from vilu.embeddings.memory import Embeddings
from vilu.errors import DataError


def test_outcomes_say_what_was_answered_and_where_from(test: Embeddings) -> None:
    outcomes = vilu.score(vilu.MCM(), test, dataset="toy", split="test")
    logits = test.image @ test.text.T
    assert np.array_equal(outcomes.prediction, logits.argmax(1).numpy())
    assert np.array_equal(outcomes.failure, (logits.argmax(1) != test.target).long().numpy())
    assert outcomes.uncertainty == pytest.approx((1 - (20 * logits).double().softmax(1).amax(1)).numpy(), abs=1e-5)
    assert (outcomes.method, outcomes.dataset, outcomes.split) == ("mcm", "toy", "test")
    assert outcomes.provenance["n_candidates"] == 5
    assert outcomes.provenance["space"] == test.space.fingerprint
    assert list(outcomes.ids) == list(test.ids)


def test_unusable_rows_keep_their_place_with_a_reason(test: Embeddings, tmp_path) -> None:
    image = test.image.clone()
    image[2], image[4] = 0, float("inf")
    outcomes = vilu.score(vilu.MCM(), Embeddings(image, test.text, test.target, 20.0))
    assert [outcomes.reason[i] for i in (1, 2, 4)] == [None, "zero_norm", "nonfinite"]
    assert outcomes.prediction[2] == -1
    table = vilu.evaluate(outcomes, n_resamples=0)
    assert table.rows[0].n == 598
    assert table.rows[0].n_unusable == 2
    outcomes.save(tmp_path / "scores.parquet")
    assert np.isnan(vilu.Outcomes.load(tmp_path / "scores.parquet").uncertainty[2])


def test_one_candidate_is_no_question(test: Embeddings) -> None:
    outcomes = vilu.score(vilu.MCM(), Embeddings(test.image, test.text[:1], None, 20.0))
    assert set(outcomes.reason) == {"k<2"}
    with pytest.raises(DataError, match="no"):
        vilu.evaluate(outcomes)


def test_nothing_to_score(test: Embeddings) -> None:
    with pytest.raises(DataError, match="nothing to score"):
        vilu.score(vilu.MCM(), Embeddings(np.empty((0, 16)), test.text, None, 20.0))


def test_pairs_carry_their_pool_size() -> None:
    outcomes = vilu.score(vilu.MCM(), toy_pairs())
    assert outcomes.provenance["pool_size"] == 32
    assert set(outcomes.failure) == {0, 1}


def test_rows_that_were_fitted_on_are_noticed(train: Embeddings) -> None:
    predictor = vilu.LVU(epochs=1, hidden=(4,)).fit(train)
    mixed = toy_embeddings(n=50, seed=5)
    mixed.image[:20] = toy_embeddings().image[580:]  # 20 training rows, under other names
    with pytest.warns(UserWarning, match="20 of 50 rows were used to fit this lvu"):
        outcomes = vilu.score(predictor, mixed)
    assert outcomes.provenance["n_seen_in_fit"] == 20
