"""The data types that cross every boundary: ``Batch`` and ``EmbeddingSource``.

Shapes: N rows, B rows of a batch, K candidate texts, D embedding width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vilu.columns import HOW
from vilu.errors import DataError
from vilu.space import EmbeddingSpace
from vilu.validate import VALID

UNKNOWN = -1
"""Target of a row whose label is not known, and its failure."""

SAME_TEXT = 0.999
"""Cosine from which on two texts are the same class; rounding to float16 moves it by less than 1e-6."""


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
        columns: What else was asked for, by name (``vilu.columns``).
    """

    image: Tensor
    text: Tensor
    target: Tensor
    index: Tensor
    logit_scale: float
    logit_bias: float = 0.0
    columns: Mapping[str, Tensor] = field(default_factory=dict)

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
        columns = {name: tensor.to(device) for name, tensor in self.columns.items()}
        return Batch(image, text, target, index, self.logit_scale, self.logit_bias, columns)


class EmbeddingSource(ABC):
    """Rows of image embeddings with their candidate texts; what predictors are fitted on and score.

    Attributes:
        space: The embedding space.
        class_names: Names of the candidates, or None (captions, or bare arrays).
        ids: (N,) row identifiers.
        target: (N,) int64 targets, -1 where unknown.
        status: (N,) uint8, 0 where the embedding is usable, else a position in ``validate.STATUS``.
        pool_size: Number of in-batch candidates, or None when candidates are shared.
        columns: Names of what there is beside the embeddings (``vilu.columns``).
    """

    space: EmbeddingSpace
    class_names: tuple[str, ...] | None
    ids: Sequence[str]
    target: Tensor
    status: NDArray[np.uint8]
    pool_size: int | None
    columns: frozenset[str] = frozenset()

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

    def column(self, name: str, index: Tensor) -> Tensor:  # noqa: ARG002 - for sources that have some
        """Float32 column ``name`` for a batch of the rows ``index``: of its images, its candidates or the model.

        Raises:
            DataError: If there is no such column.
        """
        raise DataError(f"these embeddings have no column {name!r}. Make it with `{HOW.get(name, 'vilu embed')}`.")

    @cached_property
    def usable_rows(self) -> Tensor:
        """(M,) int64 positions of the rows whose embedding is usable."""
        return torch.from_numpy(np.flatnonzero(self.status == VALID))

    def batches(self, size: int, *, rows: Tensor | None = None, columns: Sequence[str] = ()) -> Iterator[Batch]:
        """Batches in the order of ``rows`` (by default all usable rows, in order), with the named ``columns``.

        With in-batch candidates a batch is one pool and ``size`` does not count: the number of distractors is part
        of the problem, so a pool is never split or cut short; ``rows`` that do not fill a last pool are left out.
        """
        rows = self.usable_rows if rows is None else rows
        size = self.pool_size or size
        end = len(rows) // size * size if self.pool_size else len(rows)
        for start in range(0, end, size):
            index = rows[start : start + size]
            text, target = self.candidates(index)
            more = {name: self.column(name, index) for name in columns}
            image = self.image_rows(index)
            yield Batch(image, text, target, index, self.space.logit_scale, self.space.logit_bias, more)
