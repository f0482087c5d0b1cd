"""Test the table over pool sizes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.conftest import toy_pairs
from vilu.embeddings.memory import PairEmbeddings
from vilu.embeddings.pairs import Pools
from vilu.errors import DataError, UsageError
from vilu.metrics import auroc
from vilu.predictors import PREDICTORS
from vilu.predictors.zero_shot import MCM, Margin
from vilu.scoring.score import score
from vilu_bench.studies.pool_sizes import over_pool_sizes, size_table

DATA = toy_pairs(n=256)


def opened(pools: Pools) -> PairEmbeddings:
    return PairEmbeddings(DATA.image, DATA.text, replace(pools, size=min(pools.size, 256)), 20.0)


def test_more_candidates_are_harder_and_each_cell_is_its_own_scoring() -> None:
    table = over_pool_sizes(
        {"mcm": MCM(), "margin": Margin()}, opened, (8, 64), draws=2, n_resamples=0
    )
    assert {row.dataset for row in table} == {"pairs, pool 8", "pairs, pool 64"}
    assert {row.seed for row in table} == {0, 1}
    small, large = (
        table.filter(dataset=f"pairs, pool {k}", method="mcm", metric="auroc", seed=0)
        for k in (8, 64)
    )
    assert small.rows[0].accuracy > large.rows[0].accuracy
    again = score(MCM(), opened(Pools(64, seed=0)))
    assert large.rows[0].value == float(auroc(again.uncertainty, again.failure))


def test_table_for_reading() -> None:
    table = over_pool_sizes({"mcm": MCM()}, opened, (8, 64), draws=2, n_resamples=0)
    heading, accuracy, line = size_table(table).splitlines()
    assert heading.split() == ["pool", "size", "8", "64"]
    assert accuracy.startswith("VLM accuracy")
    values = [row.value for row in table.filter(dataset="pairs, pool 8", metric="auroc")]
    assert f"{100 * np.mean(values):.1f} ± {100 * np.std(values, ddof=1):.1f} / " in line


def test_sizes_that_the_pairs_do_not_fill() -> None:
    table = over_pool_sizes({"mcm": MCM()}, opened, (64, 512), n_resamples=0)
    assert {row.dataset for row in table} == {"pairs, pool 64"}
    with pytest.raises(DataError, match="has 256 pairs, the smallest size is 512"):
        over_pool_sizes({"mcm": MCM()}, opened, (512,))


def test_refusals() -> None:
    closed = next(cls for cls in PREDICTORS.values() if cls.no_captions)
    with pytest.raises(
        UsageError, match=f"does not work on image-caption pairs: {closed.no_captions}"
    ):
        over_pool_sizes({"closed": closed()}, opened)
    with pytest.raises(UsageError, match="draws must be at least 1"):
        over_pool_sizes({"mcm": MCM()}, opened, draws=0)
