"""Some rows of a source, and how many of them are scored together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vilu.embeddings.similarity import ZeroShot
from vilu.embeddings.source import Batch, EmbeddingSource
from vilu.metrics.counts import first_rows

SCORING_BATCH = 4_096
"""Rows that are scored together."""


@dataclass(frozen=True)
class Rows:
    """Some rows of a source, and what else a fit may look at.

    Attributes:
        source: That they are of.
        index: (M,) int64 positions in it.
        columns: Names of those that batches bring along.
        unlabelled: Rows of the same kind without labels.
        examples: (E,) int64 positions of rows of none of the classes; None: all in the source that
            are known to be.
        answers: (N,) zero-shot answers of all rows of the source, where they were computed before
            (``vilu.predictors.nn.train.with_answers``).
    """

    source: EmbeddingSource
    index: Tensor
    columns: tuple[str, ...] = ()
    unlabelled: EmbeddingSource | None = None
    examples: Tensor | None = None
    answers: ZeroShot | None = None

    @property
    def outside(self) -> Tensor:
        """(E,) int64 ``examples``, the usable ones."""
        if self.examples is not None:
            return self.examples
        usable = self.source.usable_rows
        return usable[self.source.outside[usable]]

    def pictures(self) -> tuple[Tensor, Tensor]:
        """Places and numbers of pictures.

        (P,) index of the first row of every picture, ascending, and (M,) number of the picture of
        every row.
        """
        identities = self.source.picture_identities(self.index.numpy(force=True))
        first, picture = np.unique(first_rows(identities), return_inverse=True)
        return torch.from_numpy(first), torch.from_numpy(picture)

    def batches(self, size: int) -> Iterator[Batch]:
        """The rows in order, in batches whose logits fit into memory.

        See ``EmbeddingSource.batches``.
        """
        batches = self.source.batches(size, rows=self.index, columns=self.columns)
        return map(self._with_answers, batches)

    def steps(self, size: int, generator: torch.Generator | None = None) -> Iterator[Batch]:
        """Batches of one training step each, in order; with a generator they are shuffled."""
        order = self.index
        if generator is not None:
            order = self.source.shuffled(self.index, generator)
        steps = self.source.steps(size, rows=order, columns=self.columns)
        return map(self._with_answers, steps)

    def _with_answers(self, batch: Batch) -> Batch:
        if self.answers is None:
            return batch
        return batch.answered(self.answers.at(batch.index))
