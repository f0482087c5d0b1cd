"""Selected rows of a source, and the number of rows to score together."""

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
"""Number of rows to score together."""


@dataclass(frozen=True)
class Rows:
    """Some rows of a source, and further data for a fit.

    Attributes:
        source: The source with the rows.
        index: (M,) int64 row indices in the source.
        columns: Names of the columns in the batches.
        unlabelled: A further source. Its rows have no labels.
        outside_rows: (E,) int64 indices of rows outside all classes. None: the usable rows that the
            source marks as outside.
        answers: Zero-shot answers to all N rows in the source, if already computed
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
        """Indices (E,) int64 of rows outside all classes: ``outside_rows``.

        If ``outside_rows`` is None, these are the usable rows that the source marks as outside.
        """
        if self.outside_rows is not None:
            return self.outside_rows
        usable_rows = self.source.usable_rows
        return usable_rows[self.source.outside[usable_rows]]

    def pictures(self) -> tuple[Tensor, Tensor]:
        """Assign the numbers 0 to P - 1 to the rows' P pictures.

        Return ``first_of_picture`` and ``picture_of_row``. ``first_of_picture`` (P,) has, for every
        picture, the position in ``index`` of the first row with the picture. The positions ascend.
        ``picture_of_row`` (M,) has every row's picture number.
        """
        index = self.index.numpy(force=True)
        identities = self.source.picture_identities(index)
        # for every row, the position of the first row with the same picture
        first_position = first_rows(identities)
        first_of_picture, picture_of_row = np.unique(first_position, return_inverse=True)
        return torch.from_numpy(first_of_picture), torch.from_numpy(picture_of_row)

    def batches(self, size: int) -> Iterator[Batch]:
        """Yield batches of the rows, in order. All logits of a batch fit into memory.

        See ``EmbeddingSource.batches``.
        """
        batches = self.source.batches(size, rows=self.index, columns=self.columns)
        return map(self._with_answers, batches)

    def steps(self, size: int, generator: torch.Generator | None = None) -> Iterator[Batch]:
        """Yield one batch per training step.

        With a generator the rows are shuffled. Without a generator the rows are in order.
        """
        order = self.index
        if generator is not None:
            order = self.source.shuffled(self.index, generator)
        steps = self.source.steps(size, rows=order, columns=self.columns)
        return map(self._with_answers, steps)

    def _with_answers(self, batch: Batch) -> Batch:
        """Set a batch's zero-shot answers if already computed. Return the batch."""
        if self.answers is None:
            return batch
        answers_of_batch = self.answers.take(batch.index)
        return batch.answered(answers_of_batch)
