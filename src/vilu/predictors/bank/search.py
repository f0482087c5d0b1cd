"""Bank of a predictor's training images, and exact nearest-neighbour search in the bank.

In shapes, N counts bank rows, M training rows, B queries, and K classes. D is the embedding width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from vilu.callers import warn_caller
from vilu.embeddings.rows import SCORING_BATCH, Rows

Count = Annotated[int, Field(ge=1)]
AllowedPairs = Callable[[slice, slice], Tensor]
"""Function that selects which bank rows may be neighbours of which queries.

The arguments are two slices: b queries and n bank rows. The result is a mask (b, n): true if the
bank row may be a neighbour of the query.
"""

QUERY_BLOCK_ROWS = 1_024
"""Number of queries in a block."""
BANK_BLOCK_ROWS = 8_192
"""Number of bank rows in a block. The similarities in a block take 32 MiB in float32."""


def draw_rows(train: Rows, max_rows: int, seed: int) -> tuple[Rows, Tensor]:
    """Draw at most ``max_rows`` training rows at random, in the order of ``train``.

    Return the m drawn rows, and their positions (m,) in ``train``. Warn if rows are left out.
    """
    n = len(train.index)
    if n <= max_rows:
        return train, torch.arange(n)
    warn_caller(
        f"{max_rows} of {n} training rows are kept, drawn with seed {seed}. "
        "Raise max_bank for more."
    )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(n, generator=generator)
    drawn_positions = order[:max_rows].sort().values
    return dataclasses.replace(train, index=train.index[drawn_positions]), drawn_positions


def class_labels(train: Rows) -> Tensor:
    """Return the class labels (M,) of rows with shared candidates."""
    return train.source.target[train.index]


def image_blocks(train: Rows) -> Iterator[tuple[slice, Tensor]]:
    """Yield blocks: positions among the rows (a slice) and unit-norm images (b, D) float32.

    Embeddings are normalised again, because rounding to float16 can change the norm by up to 1e-3.
    Such an error would change the distances between near neighbours.
    """
    for start in range(0, len(train.index), SCORING_BATCH):
        index = train.index[start : start + SCORING_BATCH]
        positions = slice(start, start + len(index))
        yield positions, normalize(train.source.image_rows(index), dim=1)


def read_images(train: Rows) -> Tensor:
    """Read unit-norm image embeddings (M, D) float32 of all rows."""
    bank = torch.empty(len(train.index), train.source.space.embed_dim, dtype=torch.float32)
    for positions, images in image_blocks(train):
        bank[positions] = images
    return bank


def nearest_in_bank(
    query: Tensor,
    bank: Tensor,
    k: int,
    allowed_pairs: AllowedPairs | None = None,
    *,
    query_rows: int = QUERY_BLOCK_ROWS,
    bank_rows: int = BANK_BLOCK_ROWS,
) -> tuple[Tensor, Tensor]:
    """Find the k most similar bank rows for every query. Return cosines (B, k) and indices (B, k).

    The queries are (B, D), and the bank is (N, D). The cosines are float32 and descending. If N is
    less than k, the results have N columns. Pairs outside ``allowed_pairs`` get the cosine minus
    infinity.

    The search is exact and runs on the queries' device. Only one block of similarities
    (``query_rows``, ``bank_rows``) is in memory at a time. Bank rows with equal cosines are in
    index order. Two equal bank rows may have cosines that differ in the last bit, because a matrix
    product rounds differently at a block's edge.
    """
    similarities = []
    indices = []
    for start in range(0, len(query), query_rows):
        block = query[start : start + query_rows]
        similarity, index = _nearest_to_queries(
            block, bank, k, allowed_pairs, first_query=start, bank_rows=bank_rows
        )
        similarities.append(similarity)
        indices.append(index)
    return torch.cat(similarities), torch.cat(indices)


def distance_of_cosine(similarity: Tensor) -> Tensor:
    """Compute the Euclidean distance between unit vectors, from the cosine."""
    squared_distance = squared_distance_of_cosine(similarity)
    return squared_distance.sqrt()


def squared_distance_of_cosine(similarity: Tensor) -> Tensor:
    """Compute the squared Euclidean distance between unit vectors, from the cosine."""
    return (2 - 2 * similarity).clamp(min=0)


def _nearest_to_queries(
    query: Tensor,
    bank: Tensor,
    k: int,
    allowed_pairs: AllowedPairs | None,
    first_query: int,
    bank_rows: int,
) -> tuple[Tensor, Tensor]:
    """Search as ``nearest_in_bank`` does, for a block of queries that begins at ``first_query``."""
    query = normalize(query, dim=1)
    query_slice = slice(first_query, first_query + len(query))
    # the k most similar rows in the blocks so far
    best_similarity = query.new_empty(len(query), 0)
    best_index = torch.empty(len(query), 0, dtype=torch.int64, device=query.device)
    for start in range(0, len(bank), bank_rows):
        block = bank[start : start + bank_rows].to(query.device)
        similarity = query @ block.T
        if allowed_pairs is not None:
            is_allowed = allowed_pairs(query_slice, slice(start, start + len(block)))
            similarity = similarity.masked_fill(~is_allowed, -math.inf)
        similarity_in_block, index_in_block = k_largest(similarity, k)
        # Rows from earlier blocks come first in the concatenation, and the sort is stable. So equal
        # similarities stay in index order.
        joint_similarity = torch.cat([best_similarity, similarity_in_block], dim=1)
        joint_index = torch.cat([best_index, start + index_in_block], dim=1)
        sorted_similarity, order = joint_similarity.sort(dim=1, descending=True, stable=True)
        best_similarity = sorted_similarity[:, :k]
        best_index = joint_index.gather(1, order)[:, :k]
    return best_similarity, best_index


def k_largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the k largest values in every row, descending, and their column indices.

    For ``values`` (B, n), both results are (B, k). If n is less than k, both have n columns.

    Equal values are in index order. ``topk`` does not define the order of equal values. So a row is
    sorted in full if the values with ranks k and k + 1 are equal. The value -inf is an exception.
    It marks pairs that are not allowed, and their order does not matter.
    """
    if k >= values.shape[1]:
        largest, index = values.sort(dim=1, descending=True, stable=True)
        return largest, index
    largest, index = values.topk(k + 1, dim=1)
    value_k = largest[:, k - 1]
    value_after_k = largest[:, k]
    is_tied = (value_k == value_after_k) & (value_after_k > -math.inf)
    # The results are sorted by ascending index, and then stably by descending value. So equal
    # values stay in index order.
    index, index_order = index[:, :k].sort(dim=1)
    largest = largest[:, :k].gather(1, index_order)
    largest, value_order = largest.sort(dim=1, descending=True, stable=True)
    index = index.gather(1, value_order)
    if bool(is_tied.any()):
        all_values, all_indices = values[is_tied].sort(dim=1, descending=True, stable=True)
        largest[is_tied] = all_values[:, :k]
        index[is_tied] = all_indices[:, :k]
    return largest, index
