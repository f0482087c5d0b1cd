"""The training failures and successes that look most like an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vilu.explaining.rows import Names, plain_rows
from vilu.nn.train import Rows
from vilu.predictors.bank.search import image_blocks, nearest
from vilu.predictors.labelled import trainable_rows
from vilu.types import EmbeddingSource


@dataclass(frozen=True)
class Neighbour:
    """A labelled training row.

    Attributes:
        key: Its identifier.
        cosine: Of its image embedding with the explained one.
        answer: The zero-shot answer to it.
        truth: The right answer.
    """

    key: str
    cosine: float
    answer: str
    truth: str


class TrainingRows:
    """Labelled training rows, split by whether their zero-shot answer is wrong.

    Args:
        train: The training data.

    Raises:
        DataError: If no row has a label, or there is one candidate.
    """

    def __init__(self, train: EmbeddingSource) -> None:
        self.train = train
        rows, failure = trainable_rows(train, "training")
        self.failures, self.successes = rows[failure == 1], rows[failure == 0]

    def near(self, image: Tensor, keys: Sequence[str | None], n: int) -> list[tuple[list[Neighbour], list[Neighbour]]]:
        """For every image the ``n`` nearest failures and successes, the nearest first; never the image itself.

        Args:
            image: (B, D) unit-norm embeddings.
            keys: B identifiers; a training row with the same one is left out. None for an image without any.
            n: How many.
        """
        found = [self._search(image, keys, rows, n) for rows in (self.failures, self.successes)]
        wanted = torch.tensor(sorted({row for kind in found for of in kind for row, _ in of}), dtype=torch.int64)
        answers = self._answers(wanted)
        failures, successes = (
            [[self._neighbour(row, cosine, answers) for row, cosine in of] for of in kind] for kind in found
        )
        return list(zip(failures, successes, strict=True))

    def _search(self, image: Tensor, keys: Sequence[str | None], rows: Tensor, n: int) -> list[list[tuple[int, float]]]:
        """Training rows and cosines, per image."""
        cosine, place = nearest_rows(image, Rows(self.train, rows), n + 1)  # one more: it may be the image itself
        ids = self.train.ids
        return [
            [(row, c) for row, c in zip(rows[p].tolist(), of.tolist(), strict=True) if ids[row] != key][:n]
            for key, of, p in zip(keys, cosine, place, strict=True)
        ]

    def _answers(self, rows: Tensor) -> dict[int, tuple[str, str]]:
        """Answer and truth of training rows."""
        names, found = Names(self.train), {}
        for batch in plain_rows(self.train, rows):
            for row, *pair in zip(batch.index.tolist(), batch.prediction.tolist(), batch.target.tolist(), strict=True):
                answer, truth = (names.of(row, candidate) for candidate in pair)
                found[row] = (answer, truth)
        return found

    def _neighbour(self, row: int, cosine: float, answers: dict[int, tuple[str, str]]) -> Neighbour:
        return Neighbour(self.train.ids[row], cosine, *answers[row])


def nearest_rows(image: Tensor, rows: Rows, k: int) -> tuple[Tensor, Tensor]:
    """Cosines (B, k) float32, falling, and positions (B, k) among the rows; exact, with one block of rows in memory.

    Of equally similar rows the first comes first; of fewer than k rows so many come back.
    """
    best = torch.empty(len(image), 0)
    where = torch.empty(len(image), 0, dtype=torch.int64)
    query = image.cpu()
    for part, block in image_blocks(rows):
        cosine, index = nearest(query, block, k)
        # stable: the rows found so far come before those of this block
        best, order = torch.cat([best, cosine], dim=1).sort(dim=1, descending=True, stable=True)
        where = torch.cat([where, index + part.start], dim=1).gather(1, order)
        best, where = best[:, :k], where[:, :k]
    return best, where
