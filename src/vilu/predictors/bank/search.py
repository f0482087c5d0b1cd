"""Training images kept by a predictor, and their exact search in blocks.

Shapes: N bank rows, B queries, K classes, D embedding width.
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
Allowed = Callable[[slice, slice], Tensor]
"""(Some queries, some bank rows) -> (b, n) bool: which pairs count."""

QUERY_ROWS = 1_024
BANK_ROWS = 8_192  # with QUERY_ROWS, 32 MiB of similarities at a time


def draw_rows(train: Rows, most: int, seed: int) -> tuple[Rows, Tensor]:
    """At most ``most`` of the rows, in order, and their positions (M,) among them.

    A warning tells where some are left out.
    """
    n = len(train.index)
    if n <= most:
        return train, torch.arange(n)
    warn_caller(
        f"{most} of {n} training rows are kept, drawn with seed {seed}. Raise max_bank for more."
    )
    shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    drawn = shuffled[:most].sort().values
    return dataclasses.replace(train, index=train.index[drawn]), drawn


def labels(train: Rows) -> Tensor:
    """(M,) classes of rows with shared candidates."""
    return train.source.target[train.index]


def image_blocks(train: Rows) -> Iterator[tuple[slice, Tensor]]:
    """Positions and unit-norm image embeddings (b, D) float32, block by block.

    Embeddings rounded to float16 are off unit norm by up to 1e-3, which a distance of near
    neighbours would show.
    """
    for start in range(0, len(train.index), SCORING_BATCH):
        index = train.index[start : start + SCORING_BATCH]
        yield slice(start, start + len(index)), normalize(train.source.image_rows(index), dim=1)


def gather(train: Rows) -> Tensor:
    """(M, D) float32 unit-norm image embeddings."""
    bank = torch.empty(len(train.index), train.source.space.embed_dim, dtype=torch.float32)
    for block, image in image_blocks(train):
        bank[block] = image
    return bank


def nearest(
    query: Tensor,
    bank: Tensor,
    k: int,
    allowed: Allowed | None = None,
    *,
    query_rows: int = QUERY_ROWS,
    bank_rows: int = BANK_ROWS,
) -> tuple[Tensor, Tensor]:
    """Cosines (B, k) float32, falling, and indices (B, k) of the most similar rows of a bank.

    The bank is (N, D), the queries are (B, D).

    Exact, on the device of the queries, with one block of similarities, (``query_rows``,
    ``bank_rows``), in memory at a time. Of
    equal cosines the lowest index comes first (those of equal rows may differ in the last bit, at
    the edge of a block of a product); at most N come back, and of pairs that are not allowed the
    cosine is minus infinity.
    """
    similarities = []
    indices = []
    for start in range(0, len(query), query_rows):
        block = query[start : start + query_rows]
        similarity, index = _nearest(block, bank, k, allowed, start, bank_rows)
        similarities.append(similarity)
        indices.append(index)
    return torch.cat(similarities), torch.cat(indices)


def distance(similarity: Tensor) -> Tensor:
    """Euclidean distance of unit vectors, from their cosine."""
    return squared_distance(similarity).sqrt()


def squared_distance(similarity: Tensor) -> Tensor:
    """Squared Euclidean distance of unit vectors, from their cosine."""
    return (2 - 2 * similarity).clamp(min=0)


def _nearest(
    query: Tensor, bank: Tensor, k: int, allowed: Allowed | None, first: int, bank_rows: int
) -> tuple[Tensor, Tensor]:
    """``nearest`` for one block of queries, the first of which is number ``first``."""
    query = normalize(query, dim=1)
    best = query.new_empty(len(query), 0)
    best_index = torch.empty(len(query), 0, dtype=torch.int64, device=query.device)
    for start in range(0, len(bank), bank_rows):
        rows = bank[start : start + bank_rows].to(query.device)
        similarity = query @ rows.T
        if allowed is not None:
            pairs = allowed(slice(first, first + len(query)), slice(start, start + len(rows)))
            similarity = similarity.masked_fill(~pairs, -math.inf)
        leading, index = leaders(similarity, k)
        # Stable: the rows of earlier blocks have lower indices than those of this block.
        ranked, order = torch.cat([best, leading], dim=1).sort(dim=1, descending=True, stable=True)
        indices = torch.cat([best_index, index + start], dim=1).gather(1, order)
        best = ranked[:, :k]
        best_index = indices[:, :k]
    return best, best_index


def leaders(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of every row (B, M), falling, and their indices.

    Of equal values the lowest index comes first. ``topk`` leaves open which of equal values it
    takes, so rows with a tie at the last place are sorted in full.
    """
    if k >= values.shape[1]:
        best, where = values.sort(dim=1, descending=True, stable=True)
        return best, where
    best, where = values.topk(k + 1, dim=1)
    tied = (best[:, k - 1] == best[:, k]) & (best[:, k] > -math.inf)
    where, order = where[:, :k].sort(dim=1)
    best, falling = best[:, :k].gather(1, order).sort(dim=1, descending=True, stable=True)
    where = where.gather(1, falling)
    if bool(tied.any()):
        full, order = values[tied].sort(dim=1, descending=True, stable=True)
        best[tied] = full[:, :k]
        where[tied] = order[:, :k]
    return best, where
