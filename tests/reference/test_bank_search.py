"""Test the blocked search against scikit-learn and against full sorts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from tests.builders.bank_data import clusters
from vilu.embeddings.rows import Rows
from vilu.predictors.bank.search import draw_rows, k_largest, nearest_in_bank
from vilu_bench.methods.neighbours import KNNDistance

BLOCKS = {"query_rows": 5, "bank_rows": 7}
"""The block sizes divide neither the query count nor the bank's row count."""


def unit(n: int, d: int, seed: int) -> torch.Tensor:
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, dim=1)


@pytest.mark.parametrize("k", [1, 3, 7, 8, 40, 100])
def test_search_finds_what_scikit_learn_finds(k: int) -> None:
    bank, query = unit(40, 9, 0), unit(23, 9, 1)
    similarity, index = nearest_in_bank(query, bank, k, **BLOCKS)
    reference = NearestNeighbors(n_neighbors=min(k, 40), metric="cosine", algorithm="brute").fit(
        bank.double().numpy()
    )
    distance, where = reference.kneighbors(query.double().numpy())
    assert np.array_equal(index.numpy(), where)
    # A float32 dot product between unit vectors of width 9 is off by at most 9 * 2^-24 < 1e-6.
    np.testing.assert_allclose(similarity.numpy(), 1 - distance, rtol=0, atol=1e-6)


def test_equal_rows_come_lowest_index_first() -> None:
    # Coordinates are sums of a few powers of two. So equal rows have equal products at any index.
    bank = torch.eye(4).repeat(6, 1)  # rows i, i + 4, i + 8, ... are equal
    _, index = nearest_in_bank(torch.eye(4), bank, 3, **BLOCKS)
    assert index.tolist() == [[i, i + 4, i + 8] for i in range(4)]
    _, index = nearest_in_bank(torch.eye(4), torch.eye(4)[:1].expand(30, 4), 10, **BLOCKS)
    assert index.tolist() == [list(range(10))] * 4


def test_leaders_are_the_head_of_a_stable_sort() -> None:
    rng = np.random.default_rng(0)
    for k in (1, 2, 5, 11, 12):
        values = torch.from_numpy(rng.integers(4, size=(50, 12)).astype(np.float32))
        best, where = k_largest(values, k)
        order = np.argsort(-values.numpy(), axis=1, kind="stable")[:, :k]
        assert np.array_equal(where.numpy(), order)
        assert np.array_equal(best.numpy(), np.take_along_axis(values.numpy(), order, axis=1))


def test_pairs_that_do_not_count_are_not_found() -> None:
    bank, query = unit(40, 9, 0), unit(23, 9, 1)
    allowed = torch.rand(23, 40, generator=torch.Generator().manual_seed(2)) < 0.2
    allowed[3] = False
    shapes = []

    def pairs(queries: slice, rows: slice) -> torch.Tensor:
        shapes.append(allowed[queries, rows].shape)
        return allowed[queries, rows]

    similarity, index = nearest_in_bank(query, bank, 1, pairs, **BLOCKS)
    full = np.where(allowed.numpy(), (query.double() @ bank.double().T).numpy(), -np.inf)
    assert np.isneginf(similarity[3, 0].item())
    found = np.arange(23) != 3
    assert np.array_equal(index[found, 0].numpy(), full.argmax(axis=1)[found])
    assert max(b for b, _ in shapes) == 5
    assert max(n for _, n in shapes) == 7


def test_a_bank_of_too_many_images_is_drawn_by_the_seed() -> None:
    data = clusters(80)
    rows = Rows(data, torch.arange(10, 80))
    with pytest.warns(
        UserWarning, match="30 of 70 training rows are kept, drawn with seed 3. Raise max_bank"
    ):
        kept, positions = draw_rows(rows, 30, seed=3)
    assert torch.equal(kept.index, rows.index[positions])
    assert len(positions.unique()) == 30
    assert torch.equal(positions, positions.sort().values)
    whole, positions = draw_rows(rows, 70, seed=3)
    assert torch.equal(whole.index, rows.index)
    assert positions.tolist() == list(range(70))


def test_the_size_of_the_bank_is_noted() -> None:
    data = clusters(80)
    with pytest.warns(UserWarning, match="30 of 80"):
        first, again, other = (KNNDistance(max_bank=30, seed=seed).fit(data) for seed in (0, 0, 1))
    assert first.notes_["n_bank"] == 30
    scores = [predictor.predict_uncertainty(data) for predictor in (first, again, other)]
    assert np.array_equal(scores[0], scores[1])
    assert not np.array_equal(scores[0], scores[2])
