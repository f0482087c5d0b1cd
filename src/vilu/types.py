"""The data types that cross every boundary: ``Batch``, ``EmbeddingSource`` and the in-memory ``Embeddings``.

Shapes: N rows, B rows of a batch, K candidate texts, D embedding width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from vilu.errors import DataError, UsageError
from vilu.space import EmbeddingSpace
from vilu.validate import VALID, RowNumbers, check_class_names, check_ids, check_targets, require_usable, unit_rows

UNKNOWN = -1
"""Target of a row whose label is not known, and its failure."""


@dataclass(frozen=True)
class Batch:
    """Some images and the candidate texts they are matched against, all in float32 on one device.

    Shared candidates (K class prompts) and in-batch candidates (the captions of the pool) look the same:
    targets are rows of ``text``.

    Attributes:
        image: (B, D) unit-norm image embeddings.
        text: (K, D) unit-norm candidate embeddings.
        target: (B,) int64 rows of ``text``; -1 where unknown.
        index: (B,) int64 positions in the source.
        logit_scale: Multiplier of the cosine.
        logit_bias: Added to every logit.
    """

    image: Tensor
    text: Tensor
    target: Tensor
    index: Tensor
    logit_scale: float
    logit_bias: float = 0.0

    @cached_property
    def logits(self) -> Tensor:
        """(B, K) float32 zero-shot logits: logit_scale * cosine + logit_bias, never under autocast."""
        with torch.autocast(self.image.device.type, enabled=False):
            return self.image @ self.text.T * self.logit_scale + self.logit_bias

    @cached_property
    def prediction(self) -> Tensor:
        """(B,) int64 zero-shot answer; among equal logits the lowest index wins (as ``torch.argmax`` documents)."""
        return self.logits.argmax(dim=-1)

    @cached_property
    def failure(self) -> Tensor:
        """(B,) int64: 1 where the answer is wrong, 0 where it is right, -1 where the target is unknown."""
        wrong = (self.prediction != self.target).long()
        return torch.where(self.target == UNKNOWN, UNKNOWN, wrong)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        image, text, target, index = (t.to(device) for t in (self.image, self.text, self.target, self.index))
        return Batch(image, text, target, index, self.logit_scale, self.logit_bias)


class EmbeddingSource(ABC):
    """Rows of image embeddings with their candidate texts; what predictors are fitted on and score.

    Attributes:
        space: The embedding space.
        class_names: Names of the candidates, or None (captions, or bare arrays).
        ids: (N,) row identifiers.
        target: (N,) int64 targets, -1 where unknown.
        status: (N,) uint8, 0 where the embedding is usable, else a position in ``validate.STATUS``.
        pool_size: Number of in-batch candidates, or None when candidates are shared.
    """

    space: EmbeddingSpace
    class_names: tuple[str, ...] | None
    ids: Sequence[str]
    target: Tensor
    status: NDArray[np.uint8]
    pool_size: int | None

    def __len__(self) -> int:
        return len(self.target)

    @property
    @abstractmethod
    def n_candidates(self) -> int:
        """K."""

    @abstractmethod
    def image_rows(self, index: Tensor) -> Tensor:
        """(B, D) float32 image embeddings of the rows ``index`` (int64)."""

    @abstractmethod
    def candidates(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Candidate texts (K, D) float32 for a batch of the rows ``index``, and the batch's targets (B,)."""

    @cached_property
    def usable_rows(self) -> Tensor:
        """(M,) int64 positions of the rows whose embedding is usable."""
        return torch.from_numpy(np.flatnonzero(self.status == VALID))

    def batches(self, size: int, *, rows: Tensor | None = None) -> Iterator[Batch]:
        """Batches in the order of ``rows`` (by default all usable rows, in order).

        With in-batch candidates a batch is one pool and ``size`` does not count: the number of distractors is part
        of the problem, so a pool is never split or cut short; ``rows`` that do not fill a last pool are left out.
        """
        rows = self.usable_rows if rows is None else rows
        size = self.pool_size or size
        end = len(rows) // size * size if self.pool_size else len(rows)
        for start in range(0, end, size):
            index = rows[start : start + size]
            text, target = self.candidates(index)
            yield Batch(self.image_rows(index), text, target, index, self.space.logit_scale, self.space.logit_bias)


class Embeddings(EmbeddingSource):
    """Embeddings in memory, with K candidates shared by all rows.

    Args:
        image: (N, D) image embeddings, numpy or torch, any float dtype.
        text: (K, D) embeddings of the candidates.
        target: (N,) integer rows of ``text``, -1 where unknown; None when no label is known.
        logit_scale: Multiplier of the cosine.
        logit_bias: Added to every logit.
        class_names: K distinct names.
        ids: N row identifiers; by default the row numbers.
        space: Full identity of the space, when known; then ``logit_scale`` and ``logit_bias`` are taken from it.

    Rows are brought to unit norm (said once as a warning if they were not). An image row with NaN, infinity or zero
    norm is kept but marked in ``status``: it is never trained on, and its uncertainty is NaN.

    Raises:
        DataError: If shapes disagree, a target is not a row of ``text``, a text row is unusable, or names repeat.

    Example:
        >>> import numpy as np
        >>> data = Embeddings(np.eye(3), np.eye(3), [0, 1, 1])
        >>> next(data.batches(8)).failure.tolist()
        [0, 0, 1]
    """

    pool_size: int | None = None

    def __init__(
        self,
        image: ArrayLike | Tensor,
        text: ArrayLike | Tensor,
        target: ArrayLike | Tensor | None = None,
        logit_scale: float = 100.0,
        logit_bias: float = 0.0,
        class_names: Sequence[str] | None = None,
        *,
        ids: Sequence[str] | None = None,
        space: EmbeddingSpace | None = None,
    ) -> None:
        self.image, self.status = unit_rows(image, "image")
        self.text = require_usable(text, "text")
        self.space = space or EmbeddingSpace(self.image.shape[1], float(logit_scale), float(logit_bias))
        for name, rows in (("image", self.image), ("text", self.text)):
            if rows.shape[1] != self.space.embed_dim:
                raise DataError(
                    f"image and text must share one width. Got {self.space.embed_dim}, but {name} has {rows.shape[1]}."
                )
        self.target = check_targets(target, len(self.image), len(self.text))
        self.class_names = check_class_names(class_names, len(self.text))
        self.ids = check_ids(ids, len(self.image))

    @property
    def n_candidates(self) -> int:
        """K."""
        return len(self.text)

    def image_rows(self, index: Tensor) -> Tensor:
        """(B, D) rows of ``image``."""
        return self.image[index]

    def candidates(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The same (K, D) texts for every batch, and the targets of the rows."""
        return self.text, self.target[index]

    @classmethod
    def from_rows(cls, source: EmbeddingSource, rows: Tensor) -> Embeddings:
        """A copy in memory of some rows of a source with shared candidates."""
        text, target = source.candidates(rows)
        ids = None if isinstance(source.ids, RowNumbers) else [source.ids[row] for row in rows.tolist()]
        names = source.class_names
        return cls(source.image_rows(rows), text, target, class_names=names, ids=ids, space=source.space)

    @staticmethod
    def pairs(
        image: ArrayLike | Tensor, text: ArrayLike | Tensor, pool_size: int = 1024, logit_scale: float = 100.0
    ) -> PairEmbeddings:
        """Image-caption pairs: row i of ``image`` belongs to row i of ``text`` (see ``PairEmbeddings``)."""
        return PairEmbeddings(image, text, pool_size, logit_scale)


class PairEmbeddings(EmbeddingSource):
    """Image-caption pairs in memory: each image is matched against the captions of its pool.

    Identical captions of a pool are one target: its first occurrence, which is also what wins a tie.

    Raises:
        DataError: If the numbers of images and captions differ, a row is unusable, or ``pool_size`` does not divide N
            (a short last pool would be an easier problem).

    Example:
        >>> import numpy as np
        >>> data = Embeddings.pairs(np.eye(4), np.eye(4)[[0, 1, 3, 2]], pool_size=2)
        >>> [batch.failure.tolist() for batch in data.batches(1)]
        [[0, 0], [1, 1]]
    """

    class_names = None

    def __init__(
        self,
        image: ArrayLike | Tensor,
        text: ArrayLike | Tensor,
        pool_size: int = 1024,
        logit_scale: float = 100.0,
        logit_bias: float = 0.0,
        *,
        ids: Sequence[str] | None = None,
        space: EmbeddingSpace | None = None,
    ) -> None:
        self.image, self.text = require_usable(image, "image"), require_usable(text, "text")
        if self.image.shape != self.text.shape:
            raise DataError(
                "image and text must be pairs of one shape. "
                f"Got {tuple(self.image.shape)} and {tuple(self.text.shape)} instead."
            )
        if pool_size < 1:
            raise UsageError(f"pool_size must be at least 1. Got {pool_size} instead.")
        if len(self.image) % pool_size:
            raise DataError(
                f"the number of pairs must be a multiple of pool_size={pool_size}, since a short last pool has fewer "
                f"distractors. Got {len(self.image)}: leave out {len(self.image) % pool_size} or change pool_size."
            )
        self.pool_size = pool_size
        self.space = space or EmbeddingSpace(self.image.shape[1], float(logit_scale), float(logit_bias))
        self.target = torch.arange(len(self.image)) % pool_size
        self.status = np.zeros(len(self.image), dtype=np.uint8)
        self.ids = check_ids(ids, len(self.image))

    @property
    def n_candidates(self) -> int:
        """K, the pool size."""
        return self.pool_size or 0

    def image_rows(self, index: Tensor) -> Tensor:
        """(B, D) rows of ``image``."""
        return self.image[index]

    def candidates(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The captions of the rows themselves, and for each the first one equal to it."""
        text = self.text[index]
        _, inverse = torch.unique(text, dim=0, return_inverse=True)
        order = torch.arange(len(text))
        first = torch.full_like(order, len(text)).scatter_reduce(0, inverse, order, "amin")
        return text, first[inverse]
