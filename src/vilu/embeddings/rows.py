"""A selection of rows of a source, and the number of rows that are scored together."""

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
"""Number of rows that are scored together."""


@dataclass(frozen=True)
class Rows:
    """Some rows of a source, and further data that a fit may use.

    Attributes:
        source: The source of the rows.
        index: (M,) int64 indices of the rows in the source.
        columns: Names of the columns that batches contain.
        unlabelled: Source of further rows without labels.
        outside_rows: (E,) int64 indices of rows that belong to none of the classes. None: the
            usable rows that the source marks as outside.
        answers: Zero-shot answers of all N rows of the source, if they were computed before
            (``vilu.predictors.nn.train.with_zero_shot_answers``).
    """

    source: EmbeddingSource
    index: Tensor
    columns: tuple[str, ...] = ()
    unlabelled: EmbeddingSource | None = None
    outside_rows: Tensor | None = None
    answers: ZeroShot | None = None

    @property
    def outside(self) -> Tensor:
        """Indices (E,) int64 of rows that belong to none of the classes: ``outside_rows``.

        If ``outside_rows`` is None, they are the usable rows that the source marks as outside.
        """
        if self.outside_rows is not None:
            return self.outside_rows
        usable_rows = self.source.usable_rows
        return usable_rows[self.source.outside[usable_rows]]

    def pictures(self) -> tuple[Tensor, Tensor]:
        """Number the P pictures of the rows from 0 to P - 1.

        Returns two tensors. The first has, for every picture, the position (P,) in ``index`` of its
        first row; the positions ascend. The second has, for every row, the number (M,) of its
        picture.
        """
        identities = self.source.picture_identities(self.index.numpy(force=True))
        # for every row, the position of the first row of the same picture
        first_position = first_rows(identities)
        first_of_picture, picture_of_row = np.unique(first_position, return_inverse=True)
        return torch.from_numpy(first_of_picture), torch.from_numpy(picture_of_row)

    def batches(self, size: int) -> Iterator[Batch]:
        """Yield batches of the rows, in order; all logits of a batch fit into memory.

        See ``EmbeddingSource.batches``.
        """
        batches = self.source.batches(size, rows=self.index, columns=self.columns)
        return map(self._with_answers, batches)

    def steps(self, size: int, generator: torch.Generator | None = None) -> Iterator[Batch]:
        """Yield one batch per training step.

        With a generator the rows are shuffled. Without a generator they are in order.
        """
        order = self.index
        if generator is not None:
            order = self.source.shuffled(self.index, generator)
        steps = self.source.steps(size, rows=order, columns=self.columns)
        return map(self._with_answers, steps)

    def _with_answers(self, batch: Batch) -> Batch:
        """Set the zero-shot answers of a batch if they were computed before; return the batch."""
        if self.answers is None:
            return batch
        return batch.answered(self.answers.take(batch.index))
