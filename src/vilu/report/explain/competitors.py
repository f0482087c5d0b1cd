"""Which other answers were near, and which labelled images are alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vilu.embeddings.checks import Identity
from vilu.embeddings.rows import Rows
from vilu.embeddings.source import Batch, EmbeddingSource, log_posterior
from vilu.errors import UNKNOWN, UsageError
from vilu.predictors.bank.search import image_blocks, nearest
from vilu.predictors.contract.labelled import trainable_rows
from vilu.predictors.contract.predictor import FailurePredictor
from vilu.predictors.nn.head import CrossAttention
from vilu.predictors.plus.vilu_plus import ViLUPlus
from vilu.predictors.vilu.head import HeadPredictor
from vilu.report.explain.rows import Names, plain_rows, truths


class Weights(NamedTuple):
    """What the weights of candidates are in words, and from a batch to its (B, K) weights, each row of sum one."""

    meaning: str
    of: Callable[[Batch], Tensor]


def weights_of(predictor: FailurePredictor) -> Weights:
    """The weights that a method has for candidates.

    Methods with a trained attention: alpha_j = softmax_j(scale (W_Q z_v) . (W_K z_tj)), averaged
    over the members of an ensemble. ``vilu_plus``: the posterior q of its pooled experts. All
    others: the zero-shot posterior p.
    """
    heads = (
        predictor.heads
        if isinstance(predictor, HeadPredictor) and predictor.constant_ is None
        else []
    )
    if attentions := [head.attention for head in heads if head.attention is not None]:
        members = f", mean of {len(attentions)} members" if len(attentions) > 1 else ""
        return Weights(
            f"weights of the trained attention{members}",
            lambda batch: _attention(attentions, batch),
        )
    if isinstance(predictor, ViLUPlus):
        return Weights("posterior of the pooled experts", lambda batch: _pooled(predictor, batch))
    return Weights("zero-shot posterior", lambda batch: log_posterior(batch).exp())


def _pooled(predictor: ViLUPlus, batch: Batch) -> Tensor:
    """(B, K) posterior."""
    return predictor.experts.to(batch.image.device).pooled_parts(batch).logits.softmax(dim=1)


def _attention(attentions: list[CrossAttention], batch: Batch) -> Tensor:
    """(B, K) mean of the attentions' weights."""
    total = torch.zeros(len(batch.image), len(batch.text), device=batch.image.device)
    with torch.no_grad(), torch.autocast(batch.image.device.type, enabled=False):
        for attention in attentions:
            query, key, _, scale = attention.to(batch.image.device).projections(batch.logit_scale)
            total += torch.softmax(
                scale * torch.linalg.multi_dot([batch.image, query.T, key, batch.text.T]), dim=-1
            )
    return total / len(attentions)


def strongest_competitor(predictor: FailurePredictor, data: EmbeddingSource) -> NDArray[np.int64]:
    """(N,) candidate of the largest weight beside the zero-shot answer, -1 for rows that cannot be scored."""
    if data.pool_size is not None:
        raise UsageError(
            "captions have no classes, so an answer's competitors have no common name. Give class data."
        )
    weights = weights_of(predictor)
    found = np.full(len(data), UNKNOWN, dtype=np.int64)
    with torch.no_grad():
        for batch, _ in predictor.scored(data):  # its answers are those of ``vilu.score``
            given = weights.of(batch)
            # equal texts are one answer, whatever their number
            answer = batch.first_equal[None] == batch.first_equal[batch.prediction][:, None]
            best = given.masked_fill(answer.to(given.device), -1.0).argmax(dim=1)
            found[batch.index.numpy(force=True)] = best.cpu().numpy()
    return found


@dataclass(frozen=True)
class Neighbour:
    """A labelled training row."""

    key: str  # its identifier
    cosine: float  # of its image embedding with the explained one
    answer: str  # the zero-shot answer to it
    truth: str  # the right answer, or that there is none


Own = tuple[Identity, NDArray[np.uint64]]
"""What rows are recognised by, and the (B,) hashes of those that are explained."""
Near = tuple[int, float]  # a training row, and its cosine


class TrainingRows:
    """Labelled training rows, split by whether their zero-shot answer is wrong."""

    def __init__(self, train: EmbeddingSource) -> None:
        self.train = train
        rows, failure = trainable_rows(train, "training", "failure")
        self.failures, self.successes = rows[failure == 1], rows[failure == 0]

    def near(
        self, image: Tensor, own: Own | None, n: int
    ) -> list[tuple[list[Neighbour], list[Neighbour]]]:
        """For every image (B, D) the ``n`` nearest failures and successes, the nearest first; none is its own row."""
        found = [self._search(image, own, rows, n) for rows in (self.failures, self.successes)]
        answers = self._answers({row for kind in found for of in kind for row, _ in of})
        failures, successes = (
            [
                [Neighbour(self.train.ids[row], cosine, *answers[row]) for row, cosine in of]
                for of in kind
            ]
            for kind in found
        )
        return list(zip(failures, successes, strict=True))

    def _search(
        self, image: Tensor, own: Own | None, rows: Tensor, n: int, more: int = 1
    ) -> list[list[Near]]:
        """Training rows and cosines, per image; so many ``more`` are looked at: they may be the image itself."""
        cosine, place = nearest_rows(image, Rows(self.train, rows), n + more)
        found = rows[place]
        other = torch.ones(found.shape, dtype=torch.bool)
        if own is not None:
            there = self.train.identities(own[0], found.flatten().numpy()).reshape(found.shape)
            other = torch.from_numpy(there != own[1][:, None])
        columns = (found.tolist(), cosine.tolist(), other.tolist())
        near = [
            [(r, c) for r, c, kept in zip(*of, strict=True) if kept][:n]
            for of in zip(*columns, strict=True)
        ]
        short = n + more < len(rows) and any(len(of) < n for of in near)
        return self._search(image, own, rows, n, 8 * more) if short else near

    def _answers(self, rows: set[int]) -> dict[int, tuple[str, str]]:
        """Answer and truth of training rows."""
        names, found = Names(self.train), {}
        for batch in plain_rows(self.train, torch.tensor(sorted(rows), dtype=torch.int64)):
            columns = (batch.index.tolist(), batch.prediction.tolist(), truths(batch).tolist())
            for row, answer, truth in zip(*columns, strict=True):
                found[row] = names.of(row, answer), names.of(row, truth)
        return found


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
