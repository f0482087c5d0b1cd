"""Find the competitors of an answer, and the labelled training images nearest to a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vilu.embeddings.checks import IdentityKind
from vilu.embeddings.rows import Rows
from vilu.embeddings.source import Batch, EmbeddingSource, log_posterior
from vilu.errors import UNKNOWN, UsageError
from vilu.predictors.bank.search import image_blocks, nearest_in_bank
from vilu.predictors.contract.labelled import trainable_rows
from vilu.predictors.contract.predictor import FailurePredictor
from vilu.predictors.nn.head import CrossAttention
from vilu.predictors.plus.vilu_plus import ViLUPlus
from vilu.predictors.vilu.head import HeadPredictor
from vilu.report.explain.rows import CandidateNames, true_classes, unscored_rows


class Weights(NamedTuple):
    """A way to weight a row's candidates. The weights in a row add up to 1."""

    meaning: str  # short description
    compute: Callable[[Batch], Tensor]  # returns the weights (B, K) of the candidates in a batch


def weights_of(predictor: FailurePredictor) -> Weights:
    """Choose by which weights a method's candidates are compared.

    - A method with a trained attention: the attention weights, averaged over the members of an
      ensemble. With the image z_v and the text z_tj of candidate j, the weight is
      alpha_j = softmax_j(scale (W_Q z_v) . (W_K z_tj)).
    - ``vilu_plus``: the posterior from the pooled experts.
    - Any other method with adapted answers: the method's own posterior.
    - All remaining methods: the zero-shot posterior.
    """
    attentions = _attentions(predictor)
    if attentions:
        meaning = "weights of the trained attention"
        if len(attentions) > 1:
            meaning += f", mean of {len(attentions)} members"
        attention_weights = partial(_attention_weights, attentions)
        return Weights(meaning, attention_weights)
    if isinstance(predictor, ViLUPlus):
        pooled_posterior = partial(_pooled_posterior, predictor)
        return Weights("posterior of the pooled experts", pooled_posterior)
    if predictor.answer == "adapted":
        own_posterior = partial(_own_posterior, predictor)
        return Weights(f"posterior of {predictor.name}", own_posterior)
    return Weights("zero-shot posterior", _zero_shot_posterior)


def _attentions(predictor: FailurePredictor) -> list[CrossAttention]:
    """Return the trained attentions in a method's heads. Empty if there is no attention."""
    if not isinstance(predictor, HeadPredictor) or predictor.constant_ is not None:
        return []
    return [head.attention for head in predictor.heads if head.attention is not None]


def _zero_shot_posterior(batch: Batch) -> Tensor:
    """Return the zero-shot model's posterior (B, K)."""
    return log_posterior(batch).exp()


def _own_posterior(predictor: FailurePredictor, batch: Batch) -> Tensor:
    """Return the posterior (B, K) of ``predictor``, for methods with adapted answers."""
    return predictor.log_posterior(batch).exp()


def _pooled_posterior(predictor: ViLUPlus, batch: Batch) -> Tensor:
    """Return the posterior (B, K) from the pooled experts."""
    experts = predictor.experts.to(batch.image.device)
    pooled = experts.pooled_parts(batch)
    return pooled.logits.softmax(dim=1)


def _attention_weights(attentions: list[CrossAttention], batch: Batch) -> Tensor:
    """Return the attention weights (B, K), averaged over the attentions."""
    total = torch.zeros(
        len(batch.image), len(batch.text), device=batch.image.device, dtype=torch.float32
    )
    with torch.no_grad(), torch.autocast(batch.image.device.type, enabled=False):
        for attention in attentions:
            moved_attention = attention.to(batch.image.device)
            query, key, _, scale = moved_attention.projections(batch.logit_scale)
            product = torch.linalg.multi_dot([batch.image, query.T, key, batch.text.T])
            total += torch.softmax(scale * product, dim=-1)
    return total / len(attentions)


def strongest_competitor(predictor: FailurePredictor, data: EmbeddingSource) -> NDArray[np.int64]:
    """Return for each row (N,) the candidate with the largest weight, except the judged answer.

    Rows without a score have the value -1.
    """
    if data.pool_size is not None:
        raise UsageError(
            "captions have no classes, so the competitors of an answer have no class names. "
            "Give class data."
        )
    weights = weights_of(predictor)
    competitor = np.full(len(data), UNKNOWN, dtype=np.int64)
    with torch.no_grad():
        # The batches of ``predictor.scored`` have the answers that ``vilu.score`` judges.
        for batch, _ in predictor.scored(data):
            weight = weights.compute(batch)
            # A candidate with the answer's text is no competitor of the answer. Candidates with
            # equal texts have equal values of ``first_equal_index``.
            group = batch.first_equal_index
            group_of_answer = group[batch.prediction].unsqueeze(1)
            has_text_of_answer = group == group_of_answer
            # weights are at least 0, so a candidate with the weight -1 is never the largest
            weight_of_others = weight.masked_fill(has_text_of_answer.to(weight.device), -1.0)
            best_candidate = weight_of_others.argmax(dim=1)
            rows = batch.index.numpy(force=True)
            competitor[rows] = best_candidate.cpu().numpy()
    return competitor


@dataclass(frozen=True)
class Neighbour:
    """A labelled training row near an explained row."""

    key: str  # identifier
    cosine: float  # cosine similarity between the training image and the explained image
    answer: str  # name of the zero-shot answer
    truth: str  # name of the right answer, or "none of the classes"


class RowsToSkip(NamedTuple):
    """The explained rows, which the search must skip if they are training rows, too."""

    kind: IdentityKind  # what identifies a row, such as its picture
    hashes: NDArray[np.uint64]  # (B,) identity of each explained row


class NearRow(NamedTuple):
    """A training row near an explained row."""

    row: int  # position of the training row
    cosine: float  # cosine similarity between the two images


class AnswerAndTruth(NamedTuple):
    """Names of the zero-shot answer to a training row, and of the right answer."""

    answer: str
    truth: str


class TrainingRows:
    """Labelled training rows, divided into wrong and right zero-shot answers."""

    def __init__(self, train: EmbeddingSource) -> None:
        self.train = train
        rows, failure = trainable_rows(train, "training", "failure")
        self.failures = rows[failure == 1]
        self.successes = rows[failure == 0]

    def find_neighbours(
        self, image: Tensor, to_skip: RowsToSkip | None, n: int
    ) -> list[tuple[list[Neighbour], list[Neighbour]]]:
        """Find the ``n`` nearest failures and the ``n`` nearest successes for every image (B, D).

        Training rows that are the explained image itself are left out. ``to_skip`` identifies these
        rows.

        Returns:
            For every image, two lists: the failures and the successes, both the nearest first.
        """
        failures = self._search(image, to_skip, self.failures, n)
        successes = self._search(image, to_skip, self.successes, n)
        all_near_rows = chain.from_iterable(failures + successes)
        names_of_row = self._answers_and_truths({near_row.row for near_row in all_near_rows})
        neighbours = []
        for near_failures, near_successes in zip(failures, successes, strict=True):
            wrong_neighbours = self._with_names(near_failures, names_of_row)
            right_neighbours = self._with_names(near_successes, names_of_row)
            neighbours.append((wrong_neighbours, right_neighbours))
        return neighbours

    def _with_names(
        self, near_rows: list[NearRow], names_of_row: dict[int, AnswerAndTruth]
    ) -> list[Neighbour]:
        """Make neighbours from near rows: add the keys, and the names of answer and truth."""
        neighbours = []
        for near_row in near_rows:
            names = names_of_row[near_row.row]
            neighbour = Neighbour(
                key=self.train.ids[near_row.row],
                cosine=near_row.cosine,
                answer=names.answer,
                truth=names.truth,
            )
            neighbours.append(neighbour)
        return neighbours

    def _search(
        self, image: Tensor, to_skip: RowsToSkip | None, rows: Tensor, n: int
    ) -> list[list[NearRow]]:
        """Return the ``n`` nearest of ``rows`` to each image, without rows of the image itself."""
        # Some nearest rows may be the image itself and are left out. So the search asks for more
        # than n rows, and then for still more, until every image has n neighbours or all rows have
        # been found.
        n_spare = 1
        while True:
            near_rows = self._near_other_rows(image, to_skip, rows, n + n_spare)
            fewest_neighbours = min(map(len, near_rows), default=n)
            has_found_all = n + n_spare >= len(rows)
            if fewest_neighbours >= n or has_found_all:
                return [rows_of_image[:n] for rows_of_image in near_rows]
            n_spare *= 8

    def _near_other_rows(
        self, image: Tensor, to_skip: RowsToSkip | None, rows: Tensor, k: int
    ) -> list[list[NearRow]]:
        """Find the ``k`` nearest of ``rows`` to each image, then drop rows of the image itself."""
        train_rows = Rows(self.train, rows)
        cosine, index = nearest_rows(image, train_rows, k)  # (B, k) each
        row = rows[index]  # (B, k) positions in ``train``
        is_image_itself = torch.zeros(row.shape, dtype=torch.bool)  # (B, k)
        if to_skip is not None:
            near_positions = row.flatten().numpy()
            near_hashes = self.train.identities(to_skip.kind, near_positions)
            image_hashes = to_skip.hashes.reshape(-1, 1)
            has_hash_of_image = near_hashes.reshape(row.shape) == image_hashes
            is_image_itself = torch.from_numpy(has_hash_of_image)
        near_rows = []
        for i in range(len(row)):
            is_other = ~is_image_itself[i]
            other_rows = row[i][is_other].tolist()
            other_cosines = cosine[i][is_other].tolist()
            near_rows.append(list(map(NearRow, other_rows, other_cosines)))
        return near_rows

    def _answers_and_truths(self, rows: set[int]) -> dict[int, AnswerAndTruth]:
        """Map each training row to the names of the zero-shot answer and the right answer."""
        names = CandidateNames(self.train)
        answers = {}
        sorted_rows = torch.tensor(sorted(rows), dtype=torch.int64)
        for batch in unscored_rows(self.train, sorted_rows):
            true_class = true_classes(batch)
            columns = (batch.index.tolist(), batch.prediction.tolist(), true_class.tolist())
            for row, answer, truth in zip(*columns, strict=True):
                answer_name = names.name_of(row, answer)
                truth_name = names.name_of(row, truth)
                answers[row] = AnswerAndTruth(answer_name, truth_name)
        return answers


def nearest_rows(image: Tensor, rows: Rows, k: int) -> tuple[Tensor, Tensor]:
    """Find the k nearest rows for every image (B, D), the nearest first.

    The search is exact, although only a single block of rows is in memory at a time. Equally
    similar rows keep their order in ``rows``. If there are fewer than k rows, all are returned.

    Returns:
        Cosines (B, k) float32 in descending order, and indices (B, k) int64 into ``rows``.
    """
    best_cosine = torch.empty(len(image), 0, dtype=torch.float32)
    best_index = torch.empty(len(image), 0, dtype=torch.int64)
    query = image.cpu()
    for row_slice, block in image_blocks(rows):
        block_cosine, index_in_block = nearest_in_bank(query, block, k)
        cosine = torch.cat([best_cosine, block_cosine], dim=1)
        index = torch.cat([best_index, index_in_block + row_slice.start], dim=1)
        # a stable sort keeps tied rows from earlier blocks before tied rows from this block
        sorted_cosine, order = cosine.sort(dim=1, descending=True, stable=True)
        best_cosine = sorted_cosine[:, :k]
        best_index = index.gather(1, order)[:, :k]
    return best_cosine, best_index
