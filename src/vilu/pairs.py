"""Image-caption pairs as a source: each image is matched against the captions of its pool, or the other way round.

Shapes: N rows, K candidates, D embedding width.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from vilu.errors import DataError, UsageError
from vilu.similarity import first_equal
from vilu.types import Candidates, EmbeddingSource

Direction = Literal["image_to_text", "text_to_image"]

HARD_ROWS = 2**17
"""Rows among which hard pools are sought; their captions are in memory together, 256 MiB at a width of 512."""

NEAR_ROWS = 1024
"""Rows whose likeness with as many others is looked at together."""


@dataclass(frozen=True)
class Pools:
    """What image-caption pairs are matched against; part of the problem, so fixed and recorded, whatever loads it.

    Attributes:
        size: Rows of a pool: their captions (or images) are the candidates of each of them.
        direction: "image_to_text" asks for the caption of an image, "text_to_image" for the image of a caption.
        hard: Whether the rows of a pool are alike (``hard_order`` of each ``HARD_ROWS``), else they are a random
            choice.
        near_duplicates: Cosine from which on two captions of a pool are the same answer; None: only equal captions.
        seed: Of the choice of pools in scoring; None takes the rows as they are stored.
    """

    size: int = 1024
    direction: Direction = "image_to_text"
    hard: bool = False
    near_duplicates: float | None = None
    seed: int | None = 0

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UsageError(f"pool_size must be at least 1. Got {self.size} instead.")
        if self.direction not in get_args(Direction):
            raise UsageError(
                f"direction must be one of {', '.join(get_args(Direction))}. Got {self.direction!r} instead."
            )
        if self.near_duplicates is not None and not 0 < self.near_duplicates <= 1:
            raise UsageError(f"near_duplicates must be a cosine in (0, 1]. Got {self.near_duplicates} instead.")


class PairSource(EmbeddingSource):
    """Image-caption pairs: row i of the images belongs to row i of the captions.

    Equal captions of a pool are one answer. Image to text they are one candidate, the first of them; text to image the
    images of equal captions are all right (``Candidates.same``).

    Columns are by what a row is here: those of images belong to what asks, those of candidates to what is found. Text
    to image, "features" are of captions and "text_features" of images: else a caption would bring its picture along.

    Attributes:
        pools: What is matched against what.
    """

    class_names = None
    pools: Pools

    @property
    def pair_rows(self) -> Tensor:
        """(M,) int64 positions of the usable pairs, ascending, whether or not they fill a pool."""
        return torch.arange(len(self))

    @abstractmethod
    def picture_rows(self, index: Tensor) -> Tensor:
        """(B, D) float32 unit-norm image embeddings."""

    @abstractmethod
    def caption_rows(self, index: Tensor) -> Tensor:
        """(B, D) float32 unit-norm caption embeddings."""

    def of_classes(self, index: Tensor) -> Tensor:
        """(B,) bool: whether a caption is the text of a class, which many images have, and not of an image alone."""
        return torch.zeros(len(index), dtype=torch.bool)

    @property
    def n_candidates(self) -> int:
        """K, at most: the pool size."""
        return self.pools.size

    def image_rows(self, index: Tensor) -> Tensor:
        """(B, D) what asks: images, or captions where the direction is text to image."""
        return self.picture_rows(index) if self.pools.direction == "image_to_text" else self.caption_rows(index)

    def candidates(self, index: Tensor) -> Candidates:
        """The captions of the rows themselves, or their images."""
        caption = self.caption_rows(index)
        first = first_alike(caption, self.pools.near_duplicates)
        everyone = torch.arange(len(index))
        same = None if torch.equal(first, everyone) else first
        if self.pools.direction == "text_to_image":
            return Candidates(self.picture_rows(index), everyone, same, index)
        if same is None:
            return Candidates(caption, everyone, None, index)
        distinct, target = torch.unique(first, return_inverse=True)
        return Candidates(caption[distinct], target, None, index[distinct])

    def shuffled(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Rows in new pools for one pass of training."""
        rows = super().shuffled(rows, generator)
        return self._alike(rows, generator) if self.pools.hard else rows

    def _order(self, rows: Tensor) -> Tensor:
        """The rows in the order of their pools in scoring; without those that fill no last pool."""
        generator = torch.Generator().manual_seed(self.pools.seed or 0)
        if self.pools.seed is not None:
            rows = super().shuffled(rows, generator)
        rows = rows[: len(rows) // self.pools.size * self.pools.size]
        return self._alike(rows, generator) if self.pools.hard else rows

    def _alike(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        blocks = rows.split(max(HARD_ROWS // self.pools.size, 1) * self.pools.size)
        return torch.cat([block[hard_order(self.caption_rows(block), self.pools.size, generator)] for block in blocks])


def first_alike(rows: Tensor, cosine: float | None = None) -> Tensor:
    """(N,) int64: for every row the first one that is alike: equal, or of at least that cosine to a first one.

    With a cosine rows are taken in order, and one that is near none of the firsts before it is a first itself, so that
    likeness does not chain. Memory: N times the number of firsts, in blocks.

    Args:
        rows: (N, D) unit-norm.
        cosine: In (0, 1]; None for equality.
    """
    first = first_equal(rows)
    if cosine is None:
        return first
    leaders = first.unique()
    leader_of, kept = torch.arange(len(rows)), leaders[:0]
    for block in leaders.split(NEAR_ROWS):
        found = torch.full_like(block, -1)
        for start in range(0, len(kept), NEAR_ROWS):
            tile = kept[start : start + NEAR_ROWS]
            near = (rows[block] @ rows[tile].T >= cosine) & (found < 0)[:, None]
            found = torch.where(near.any(dim=1), tile[near.byte().argmax(dim=1)], found)
        old, new = block[found >= 0], block[found < 0]
        leader_of[old] = found[found >= 0]
        leader_of[new] = new[_greedy(rows[new] @ rows[new].T >= cosine)]
        kept = torch.cat([kept, leader_of[new].unique()])
    return leader_of[first]


def _greedy(near: Tensor) -> Tensor:
    """(N,) int64: for every row of a symmetric relation (N, N) the first leader it is near, else itself, a leader."""
    relation = near.numpy()
    if not len(relation):
        return torch.arange(0)
    np.fill_diagonal(relation, val=True)
    leader = np.ones(len(relation), dtype=bool)
    # most rows are near no row before them, and need no look
    for row in np.flatnonzero(relation.argmax(axis=1) < np.arange(len(relation))):
        leader[row] = not (relation[row, :row] & leader[:row]).any()
    relation &= leader
    return torch.from_numpy(relation.argmax(axis=1))


def hard_order(rows: Tensor, pool_size: int, generator: torch.Generator) -> Tensor:
    """(N,) an order in which each ``pool_size`` consecutive rows are alike: hard negatives of one another.

    The rows are halved, at a multiple of the pool size, by their projection on the direction between two of them that
    are far apart, and the halves again: N D log(N / pool_size) operations, no matrix of similarities.

    Args:
        rows: (N, D) unit-norm, N a multiple of ``pool_size``, else the last pool is short.
        pool_size: Rows of a pool.
        generator: Chooses the rows that the direction starts from.
    """
    pending, done = [torch.arange(len(rows))], []
    while pending:
        part = pending.pop()
        if len(part) <= pool_size:
            done.append(part)
            continue
        block = rows[part]
        start = int(torch.randint(len(part), (1,), generator=generator))
        far = int((block @ block[start]).argmin())
        farther = int((block @ block[far]).argmin())
        along = (block @ (block[far] - block[farther])).argsort(stable=True)
        middle = max(len(part) // pool_size // 2, 1) * pool_size
        pending += [part[along[middle:]], part[along[:middle]]]
    return torch.cat(done)


def require_full_pools(n_rows: int, pool_size: int, what: str) -> None:
    """Refuse pairs that do not fill one pool.

    Raises:
        DataError: If there are fewer than ``pool_size``.
    """
    if n_rows < pool_size:
        raise DataError(
            f"{what} has {n_rows} usable pairs, and a pool has {pool_size}: its size is the number of candidates, "
            "so it is never cut short. Give more pairs or a smaller --pool-size."
        )
