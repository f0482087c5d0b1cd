"""The answers that compete with a row's own, and the labelled images that are like it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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
    """Weights of candidates, each row of sum one."""

    meaning: str  # what they are, in words
    of: Callable[[Batch], Tensor]  # from a batch to its (B, K) weights


def weights_of(predictor: FailurePredictor) -> Weights:
    """The weights that a method has for candidates.

    Methods with a trained attention: alpha_j = softmax_j(scale (W_Q z_v) . (W_K z_tj)), averaged
    over the members of an ensemble. ``vilu_plus``: the posterior q of its pooled experts. All
    others: the zero-shot posterior p.
    """
    attentions = _attentions(predictor)
    if attentions:
        meaning = "weights of the trained attention"
        if len(attentions) > 1:
            meaning += f", mean of {len(attentions)} members"
        return Weights(meaning, partial(_attention, attentions))
    if isinstance(predictor, ViLUPlus):
        return Weights("posterior of the pooled experts", partial(_pooled, predictor))
    return Weights("zero-shot posterior", _zero_shot)


def _attentions(predictor: FailurePredictor) -> list[CrossAttention]:
    """The trained attentions of a method's heads; empty where it has none."""
    if not isinstance(predictor, HeadPredictor) or predictor.constant_ is not None:
        return []
    return [head.attention for head in predictor.heads if head.attention is not None]


def _zero_shot(batch: Batch) -> Tensor:
    """(B, K) posterior of the zero-shot model."""
    return log_posterior(batch).exp()


def _pooled(predictor: ViLUPlus, batch: Batch) -> Tensor:
    """(B, K) posterior of the pooled experts."""
    return predictor.experts.to(batch.image.device).pooled_parts(batch).logits.softmax(dim=1)


def _attention(attentions: list[CrossAttention], batch: Batch) -> Tensor:
    """(B, K) mean of the attentions' weights."""
    total = torch.zeros(
        len(batch.image), len(batch.text), device=batch.image.device, dtype=torch.float32
    )
    with torch.no_grad(), torch.autocast(batch.image.device.type, enabled=False):
        for attention in attentions:
            query, key, _, scale = attention.to(batch.image.device).projections(batch.logit_scale)
            product = torch.linalg.multi_dot([batch.image, query.T, key, batch.text.T])
            total += torch.softmax(scale * product, dim=-1)
    return total / len(attentions)


def strongest_competitor(predictor: FailurePredictor, data: EmbeddingSource) -> NDArray[np.int64]:
    """(N,) candidate of the largest weight beside the zero-shot answer.

    It is -1 for rows that cannot be scored.
    """
    if data.pool_size is not None:
        raise UsageError(
            "captions have no classes, so an answer's competitors have no common name. "
            "Give class data."
        )
    weights = weights_of(predictor)
    competitor = np.full(len(data), UNKNOWN, dtype=np.int64)
    with torch.no_grad():
        for batch, _ in predictor.scored(data):  # its answers are those of ``vilu.score``
            weight = weights.of(batch)
            # equal texts are one answer, whatever their number
            is_answer = batch.first_equal[None] == batch.first_equal[batch.prediction][:, None]
            beside_answer = weight.masked_fill(is_answer.to(weight.device), -1.0)
            best = beside_answer.argmax(dim=1)
            competitor[batch.index.numpy(force=True)] = best.cpu().numpy()
    return competitor


@dataclass(frozen=True)
class Neighbour:
    """A labelled training row."""

    key: str  # its identifier
    cosine: float  # of its image embedding with the explained one
    answer: str  # the zero-shot answer to it
    truth: str  # the right answer, or that there is none


Own = tuple[Identity, NDArray[np.uint64]]
"""The kind of identity of rows, and the (B,) hashes of the rows that are explained."""
Near = tuple[int, float]  # a training row, and its cosine


class TrainingRows:
    """Labelled training rows, split by whether their zero-shot answer is wrong."""

    def __init__(self, train: EmbeddingSource) -> None:
        self.train = train
        rows, failure = trainable_rows(train, "training", "failure")
        self.failures = rows[failure == 1]
        self.successes = rows[failure == 0]

    def near(
        self, image: Tensor, own: Own | None, n: int
    ) -> list[tuple[list[Neighbour], list[Neighbour]]]:
        """For every image (B, D) the ``n`` nearest failures and successes, the nearest first.

        No image is its own neighbour.
        """
        failures = self._search(image, own, self.failures, n)
        successes = self._search(image, own, self.successes, n)
        rows = {row for near in failures + successes for row, _ in near}
        answers = self._answers(rows)
        neighbours = []
        for near_failures, near_successes in zip(failures, successes, strict=True):
            wrong = self._neighbours(near_failures, answers)
            right = self._neighbours(near_successes, answers)
            neighbours.append((wrong, right))
        return neighbours

    def _neighbours(self, near: list[Near], answers: dict[int, tuple[str, str]]) -> list[Neighbour]:
        return [Neighbour(self.train.ids[row], cosine, *answers[row]) for row, cosine in near]

    def _search(self, image: Tensor, own: Own | None, rows: Tensor, n: int) -> list[list[Near]]:
        """Nearest training rows and their cosines, per image."""
        # More than n are looked at, since some may be the image itself; as many as it takes.
        n_more = 1
        while True:
            near = self._near_but_own(image, own, rows, n + n_more)
            n_fewest = min(map(len, near), default=n)
            all_are_seen = n + n_more >= len(rows)
            if n_fewest >= n or all_are_seen:
                return [rows_of_image[:n] for rows_of_image in near]
            n_more *= 8

    def _near_but_own(
        self, image: Tensor, own: Own | None, rows: Tensor, k: int
    ) -> list[list[Near]]:
        """The ``k`` nearest training rows per image, without those that are the image itself."""
        cosine, place = nearest_rows(image, Rows(self.train, rows), k)
        row = rows[place]
        is_own = torch.zeros(row.shape, dtype=torch.bool)
        if own is not None:
            kind, own_hashes = own
            hashes = self.train.identities(kind, row.flatten().numpy()).reshape(row.shape)
            is_own = torch.from_numpy(hashes == own_hashes[:, None])
        near = []
        for rows_of, cosines_of, own_of in zip(row, cosine, is_own, strict=True):
            keep = ~own_of
            pairs = zip(rows_of[keep].tolist(), cosines_of[keep].tolist(), strict=True)
            near.append(list(pairs))
        return near

    def _answers(self, rows: set[int]) -> dict[int, tuple[str, str]]:
        """Answer and truth of training rows."""
        names = Names(self.train)
        answers = {}
        for batch in plain_rows(self.train, torch.tensor(sorted(rows), dtype=torch.int64)):
            columns = (batch.index.tolist(), batch.prediction.tolist(), truths(batch).tolist())
            for row, answer, truth in zip(*columns, strict=True):
                answers[row] = (names.of(row, answer), names.of(row, truth))
        return answers


def nearest_rows(image: Tensor, rows: Rows, k: int) -> tuple[Tensor, Tensor]:
    """Cosines (B, k) float32, falling, and positions (B, k) among the rows.

    The search is exact, with one block of rows in memory. Of equally similar rows the first comes
    first; of fewer than k rows so many come back.
    """
    best = torch.empty(len(image), 0, dtype=torch.float32)
    position = torch.empty(len(image), 0, dtype=torch.int64)
    query = image.cpu()
    for part, block in image_blocks(rows):
        cosine, index = nearest(query, block, k)
        # stable: the rows of earlier blocks come before those of this one
        ranked, order = torch.cat([best, cosine], dim=1).sort(dim=1, descending=True, stable=True)
        positions = torch.cat([position, index + part.start], dim=1).gather(1, order)
        best = ranked[:, :k]
        position = positions[:, :k]
    return best, position
