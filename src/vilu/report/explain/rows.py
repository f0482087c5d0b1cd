"""Read chosen rows of a source with their candidates, and name the candidates.

The candidates of a caption row are all captions in the row's pool. So a caption row is read
together with all rows in the pool.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vilu.embeddings.checks import SHORT_POOL, STATUS_NAMES, VALID
from vilu.embeddings.rows import SCORING_BATCH
from vilu.embeddings.source import Batch, EmbeddingSource
from vilu.errors import OUTSIDE, UNKNOWN, DataError
from vilu.predictors.contract.coalitions import NONE_OF_CLASSES
from vilu.predictors.contract.predictor import FailurePredictor

BATCH_ROWS = 1_024  # maximum number of rows in a batch
MAX_POOLS = 8  # maximum number of pools to draw rows from, for image-caption pairs


def scored_rows(
    predictor: FailurePredictor,
    data: EmbeddingSource,
    rows: Tensor,
    block_size: int = SCORING_BATCH,
) -> Iterator[tuple[Batch, NDArray[np.float64]]]:
    """Yield batches of the wanted rows, together with the uncertainties (B,) float64.

    The rows come in the source's order, or in the order of the pools.

    ``vilu.score`` scores rows in blocks, and the rounding in a matrix product depends on the number
    of rows. Therefore a block that contains a wanted row is scored here as a whole. So answers and
    uncertainties equal the results of ``vilu.score`` in every digit.

    Args:
        predictor: A predictor after ``fit``, or a predictor that needs no ``fit``.
        data: Source with the rows.
        rows: Positions of the wanted rows.
        block_size: Number of rows in a block. With 1, only the wanted rows are scored. This is
            enough if the uncertainties are not used.
    """
    rows_to_score = rows_of_whole_blocks(data, rows, block_size)
    for batch, scores in predictor.scored(data, rows_to_score):
        for slice_of_pool, pool in batch.by_pool():
            is_wanted = torch.isin(pool.index.cpu(), rows)
            wanted_indices = is_wanted.nonzero().squeeze(1)
            for indices in wanted_indices.split(BATCH_ROWS):
                if len(indices):
                    wanted_batch = select_rows(pool, indices.to(pool.index.device))
                    yield wanted_batch, scores[slice_of_pool][indices.numpy()]


def unscored_rows(data: EmbeddingSource, rows: Tensor) -> Iterator[Batch]:
    """Yield batches of the wanted rows like ``scored_rows``, but without uncertainties."""
    # for class data, these are the wanted rows. For captions, these are all rows in the pools
    rows_to_read = rows_of_whole_blocks(data, rows, block_size=1)
    for batch in data.batches(BATCH_ROWS, rows=rows_to_read):
        is_wanted = torch.isin(batch.index, rows)
        indices = is_wanted.nonzero().squeeze(1)
        if len(indices):
            yield select_rows(batch, indices)


def select_rows(batch: Batch, indices: Tensor) -> Batch:
    """Select a batch's rows at these indices, with all candidates in the batch.

    The rows keep the zero-shot answers from the whole batch.
    """
    _ = batch.zero_shot  # this computes and caches the answers, so that ``batch.rows`` copies them
    return batch.rows(indices)


def rows_of_whole_blocks(data: EmbeddingSource, rows: Tensor, block_size: int) -> Tensor:
    """Return all usable rows of the blocks that contain one of ``rows``, in the source's order.

    A block is a pool of image-caption pairs, or ``block_size`` usable rows from class data.
    """
    rows_per_block = data.pool_size or block_size
    block_of_row = torch.arange(len(data.usable_rows)) // rows_per_block
    wanted_blocks = block_of_row[torch.isin(data.usable_rows, rows)]
    return data.usable_rows[torch.isin(block_of_row, wanted_blocks)]


def _rows_of_pool(data: EmbeddingSource, number: int) -> Tensor:
    """Return the positions of the rows in pool ``number``. Pools are successive usable rows."""
    size = data.pool_size or 0  # callers have pools, and the 0 only satisfies the type checker
    return data.usable_rows[number * size : (number + 1) * size]


def draw_rows(data: EmbeddingSource, n_rows: int, seed: int, rows_to_leave_out: Tensor) -> Tensor:
    """Draw at most ``n_rows`` usable rows without repetition, in the source's order.

    Image-caption pairs are drawn from at most ``MAX_POOLS`` pools.
    """
    rng = np.random.default_rng(seed)
    rows = data.usable_rows
    if data.pool_size is not None:
        drawn_pools = rng.permutation(len(rows) // data.pool_size)[:MAX_POOLS]
        rows_of_pools = [_rows_of_pool(data, int(number)) for number in np.sort(drawn_pools)]
        no_rows = rows[:0]  # torch.cat needs a tensor, even if there is no pool
        rows = torch.cat([no_rows, *rows_of_pools])
    rows = rows[~torch.isin(rows, rows_to_leave_out)]
    if not len(rows):
        raise DataError(
            f"an attribution compares with other rows, and all {len(data)} rows are explained "
            "or cannot be used. Give training rows (--train), or explain fewer rows."
        )
    drawn_positions = rng.choice(len(rows), min(n_rows, len(rows)), replace=False)
    ascending_positions = np.sort(drawn_positions)
    return rows[torch.from_numpy(ascending_positions)]


def find_rows(data: EmbeddingSource, wanted: Sequence[int | str]) -> Tensor:
    """Find the positions (M,) of the wanted rows, in the wanted order, without repeats.

    A wanted row is given by number or by key. Several rows may have the same key.

    Raises:
        DataError: If a row does not exist or has no score.
    """
    keys = {number_or_key for number_or_key in wanted if isinstance(number_or_key, str)}
    rows_by_key = _rows_by_key(data, keys)
    rows: list[int] = []
    for number_or_key in wanted:
        if not isinstance(number_or_key, str):
            rows.append(int(number_or_key))
        elif number_or_key in rows_by_key:
            rows += rows_by_key[number_or_key]
        else:
            example = data.ids[0] if len(data) else None
            raise DataError(f"no row has the key {number_or_key!r}. Keys look like {example!r}.")
    for row in rows:
        if not 0 <= row < len(data):
            raise DataError(
                f"there is no row {row}: the data have {len(data)} rows, numbered from 0."
            )
    for row in rows:
        if data.status[row] != VALID:
            reason = why_unusable(int(data.status[row]))
            raise DataError(f"row {row} has no score to explain: {reason}.")
    distinct_rows = list(dict.fromkeys(rows))
    return torch.tensor(distinct_rows, dtype=torch.int64)


def _rows_by_key(data: EmbeddingSource, keys: set[str]) -> dict[str, list[int]]:
    """Map each key to the positions of the rows with this key."""
    rows_by_key: dict[str, list[int]] = {}
    if not keys:
        return rows_by_key  # reading the identifiers of a store takes long, and is not needed
    for row, key in enumerate(data.ids):
        if key in keys:
            rows_by_key.setdefault(key, []).append(row)
    return rows_by_key


def why_unusable(status: int) -> str:
    """Return the reason why a row with this status is not scored."""
    if status == SHORT_POOL:
        return "its pool is not full"
    return f"its embedding is of status {STATUS_NAMES[status]!r}"


def class_name(names: Sequence[str] | None, candidate: int) -> str:
    """Return a class's name, or the class number if the classes have no names.

    ``candidate`` may also be ``OUTSIDE`` or ``UNKNOWN``. These values are no classes.
    """
    if candidate == OUTSIDE:
        return NONE_OF_CLASSES
    if candidate == UNKNOWN:
        return "not known"
    return f"candidate {candidate}" if names is None else names[candidate]


def true_classes(batch: Batch) -> Tensor:
    """Return int64 targets (B,), with ``OUTSIDE`` where the picture shows none of the classes."""
    if batch.outside is None:
        return batch.target
    return batch.target.masked_fill(batch.outside, OUTSIDE)


class CandidateNames:
    """Candidate names: the class name, or for a caption the key of the image-caption pair."""

    def __init__(self, data: EmbeddingSource) -> None:
        self.data = data
        self._pool: frozenset[int] = frozenset()  # positions of the rows in the pool read last
        # for each candidate in this pool, the row that the candidate belongs to
        self._row_of_candidate = torch.empty(0, dtype=torch.int64)

    def name_of(self, row: int, candidate: int) -> str:
        """Name a row's candidate. ``candidate`` may be any value from ``true_classes``."""
        if self.data.pool_size is None or candidate < 0:
            return class_name(self.data.class_names, candidate)
        return self.data.ids[int(self._rows_of_candidates(row)[candidate])]

    def _rows_of_candidates(self, row: int) -> Tensor:
        """Find the rows that the candidates of ``row`` belong to. The last pool is cached."""
        if row not in self._pool:
            index_in_usable = int((self.data.usable_rows == row).nonzero())
            number_of_pool = index_in_usable // (self.data.pool_size or 1)
            pool = _rows_of_pool(self.data, number_of_pool)
            row_of_candidate = self.data.candidates(pool).row_of_candidate
            if row_of_candidate is None:
                raise DataError(
                    "these captions do not say which rows they belong to, so they have no names."
                )
            self._pool = frozenset(pool.tolist())
            self._row_of_candidate = row_of_candidate
        return self._row_of_candidate
