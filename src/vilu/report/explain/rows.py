"""Some rows of a source, each among its own candidates, and what candidates are called.

Captions are matched in pools, so a row of them is looked at with the rest of its pool.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vilu.embeddings.checks import SHORT_POOL, STATUS, VALID
from vilu.embeddings.rows import SCORING_BATCH
from vilu.embeddings.source import Batch, EmbeddingSource
from vilu.errors import OUTSIDE, UNKNOWN, DataError
from vilu.predictors.contract.games import NONE
from vilu.predictors.contract.predictor import FailurePredictor

ROWS = 1_024  # rows looked at together, at most
MAX_POOLS = 8  # pools that rows are drawn from, at most, where candidates come in pools


def scored_rows(
    predictor: FailurePredictor, data: EmbeddingSource, rows: Tensor, step: int = SCORING_BATCH
) -> Iterator[tuple[Batch, NDArray[np.float64]]]:
    """Batches of the wanted rows, each with its uncertainty (B,) float64, in the order of the source (or of its pools).

    A matrix product rounds by the shape of its block. So whole blocks of ``vilu.score`` are scored,
    whatever is wanted of them: uncertainty and answer are the very numbers that it gives. With step
    1, where the uncertainties are not looked at, no other rows are scored.
    """
    for batch, scores in predictor.scored(data, whole_steps(data, rows, step)):
        for part, pool in batch.by_pool():
            for places in torch.isin(pool.index.cpu(), rows).nonzero().squeeze(1).split(ROWS):
                if len(places):
                    yield select(pool, places.to(pool.index.device)), scores[part][places.numpy()]


def plain_rows(data: EmbeddingSource, rows: Tensor) -> Iterator[Batch]:
    """Batches of the wanted rows, as ``scored_rows`` without scores."""
    for batch in data.batches(ROWS, rows=whole_steps(data, rows, 1)):
        places = torch.isin(batch.index, rows).nonzero().squeeze(1)
        if len(places):
            yield select(batch, places)


def select(batch: Batch, places: Tensor) -> Batch:
    """The rows at some places of a batch, with their zero-shot answers, against all of its candidates."""
    _ = batch.zero_shot  # of all its rows, so that those taken keep theirs
    return batch.rows(places)


def whole_steps(data: EmbeddingSource, rows: Tensor, size: int) -> Tensor:
    """All rows of the steps that the rows are in, in order: a pool each, or ``size`` usable rows."""
    step = torch.arange(len(data.usable_rows)) // (data.pool_size or size)
    return data.usable_rows[torch.isin(step, step[torch.isin(data.usable_rows, rows)])]


def _pool(data: EmbeddingSource, number: int) -> Tensor:
    size = data.pool_size or 0
    return data.usable_rows[number * size : (number + 1) * size]


def draw_rows(data: EmbeddingSource, n: int, seed: int, leave_out: Tensor) -> Tensor:
    """At most ``n`` usable rows, drawn without repetition, in the order of the source; of captions from few pools."""
    rng = np.random.default_rng(seed)
    rows = data.usable_rows
    if data.pool_size is not None:
        pools = rng.permutation(len(rows) // data.pool_size)[:MAX_POOLS]
        rows = torch.cat([rows[:0], *(_pool(data, int(pool)) for pool in np.sort(pools))])
    rows = rows[~torch.isin(rows, leave_out)]
    if not len(rows):
        raise DataError(
            f"an attribution compares with other rows, and all {len(data)} are explained or cannot be used. "
            "Give training rows (--train), or explain fewer."
        )
    return rows[torch.from_numpy(np.sort(rng.choice(len(rows), min(n, len(rows)), replace=False)))]


def find_rows(data: EmbeddingSource, wanted: Sequence[int | str]) -> Tensor:
    """(M,) distinct positions of the rows with these numbers or keys, in the order asked for."""
    places: dict[str, list[int]] = {key: [] for key in wanted if isinstance(key, str)}
    for row, key in enumerate(data.ids if places else ()):
        if key in places:
            places[key].append(row)
    rows = [
        row for name in wanted for row in (places[name] if isinstance(name, str) else [int(name)])
    ]
    missing = next((key for key, found in places.items() if not found), None)
    if missing is not None:
        raise DataError(
            f"no row has the key {missing!r}. Keys look like {data.ids[0] if len(data) else None!r}."
        )
    outside = next((row for row in rows if not 0 <= row < len(data)), None)
    if outside is not None:
        raise DataError(f"there is no row {outside}: the data have {len(data)}, numbered from 0.")
    for row in rows:
        if data.status[row] != VALID:
            raise DataError(
                f"row {row} has no score to explain: {unusable(int(data.status[row]))}."
            )
    return torch.tensor(list(dict.fromkeys(rows)), dtype=torch.int64)


def unusable(status: int) -> str:
    """Why a row is not scored, in words."""
    return (
        "its pool is not full"
        if status == SHORT_POOL
        else f"its embedding is of status {STATUS[status]!r}"
    )


def class_name(names: Sequence[str] | None, candidate: int) -> str:
    """Of a class, or its number where classes have no names; of what is no class what that means."""
    if candidate in {OUTSIDE, UNKNOWN}:
        return NONE if candidate == OUTSIDE else "not known"
    return f"candidate {candidate}" if names is None else names[candidate]


def truths(batch: Batch) -> Tensor:
    """(B,) int64 targets, with ``OUTSIDE`` where the picture is of none of the classes."""
    return (
        batch.target if batch.outside is None else batch.target.masked_fill(batch.outside, OUTSIDE)
    )


class Names:
    """What the candidates of rows are called: classes by their names, captions by the keys of their pairs."""

    def __init__(self, data: EmbeddingSource) -> None:
        self.data = data
        self._pool: frozenset[int] = frozenset()
        self._members = torch.empty(0, dtype=torch.int64)

    def of(self, row: int, candidate: int) -> str:
        """Name of one candidate of a row, or of what its ``truths`` say."""
        if self.data.pool_size is None or candidate < 0:
            return class_name(self.data.class_names, candidate)
        return self.data.ids[int(self._pool_members(row)[candidate])]

    def _pool_members(self, row: int) -> Tensor:
        """Which rows the candidates of a row belong to; the last pool is remembered."""
        if row not in self._pool:
            place = int((self.data.usable_rows == row).nonzero())
            pool = _pool(self.data, place // (self.data.pool_size or 1))
            members = self.data.candidates(pool).members
            if members is None:
                raise DataError(
                    "these captions do not say which rows they belong to, so they have no names."
                )
            self._pool, self._members = frozenset(pool.tolist()), members
        return self._members
