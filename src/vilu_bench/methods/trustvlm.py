"""TrustVLM: similarity to class prototypes from a second encoder."""

from __future__ import annotations

import dataclasses
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from vilu.embeddings.rows import Rows
from vilu.embeddings.similarity import float64
from vilu.embeddings.source import Batch, EmbeddingSource
from vilu.errors import ProvenanceError
from vilu.predictors.bank.closed_set import ClosedSet
from vilu.predictors.bank.search import Count, class_labels
from vilu.predictors.contract.labelled import class_texts
from vilu.predictors.contract.predictor import CLASSES, Learnt


@dataclasses.dataclass
class TrustVLM(ClosedSet):
    """TrustVLM: zero-shot probability plus similarity to the predicted class's prototype.

    u = (1 - p_max) + weight * (1 - cos(f, P_t̂))

    p_max is the zero-shot probability of the answer t̂. f is the image's row in the column
    ``features``. These features must be from a second encoder, and not from the VLM. The prototype
    P_c is the mean f over up to ``shots`` training images in class c, drawn with ``seed``. A class
    without training images has the prototype 0, and the cosine with this prototype is 0.

    Args:
        weight: Weight of the similarity.
        shots: Maximum number of training images per class.

    Source: TrustVLM, arXiv:2505.23745, and its code (weight 1, 0.1 on Oxford Pets, 16 shots, DINOv2
    features averaged over tokens). The paper's TrustVLM* is left out, because it predicts another
    answer and does not score the VLM's answer.

    Examples:
        >>> import numpy as np, vilu
        >>> image = [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]
        >>> text = np.eye(2)
        >>> target = [0, 0, 1]
        >>> features = {"features": [[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]}  # second encoder
        >>> train = vilu.Embeddings(image, text, target=target, columns=features)
        >>> new_features = {"features": [[1.0, 0.0], [0.0, 1.0]]}
        >>> new = vilu.Embeddings([[1.0, 0.0], [1.0, 0.0]], text, columns=new_features)
        >>> # both new images are answered 0, but image 2 has the features of class 1
        >>> vilu.PREDICTORS["trustvlm"]().fit(train).predict_uncertainty(new).round(2)
        array([0.11, 0.55])
    """

    name: ClassVar[str] = "trustvlm"
    summary: ClassVar[str] = (
        "zero-shot probability plus similarity to class prototypes of a second encoder (TrustVLM)"
    )
    reference: ClassVar[str] = "TrustVLM, arXiv 2505.23745"
    cost: ClassVar[str] = "fit: 16 images per class; score: one product with K prototypes"
    columns: ClassVar[tuple[str, ...]] = ("features",)
    # name, type (f float32, d float64, i int64, ? bool) and sizes for each learned tensor
    _forms: ClassVar[str] = "prototypes:fKF classes:fKD"

    weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    shots: Count = 16

    def _learn(
        self,
        train: Rows,
        failure: Tensor,  # noqa: ARG002
        validation: EmbeddingSource | None,  # noqa: ARG002
    ) -> Learnt:
        label = class_labels(train)
        shot_rows = draw_per_class(label, self.shots, self.seed)
        features = train.source.column("features", train.index[shot_rows])
        sum_of_class = features.new_zeros(train.source.n_candidates, features.shape[1])
        sum_of_class.index_add_(0, label[shot_rows], features)
        prototypes = normalize(sum_of_class, dim=1)
        text = class_texts(train)
        return Learnt({"prototypes": prototypes, CLASSES: text})

    def _score(self, batch: Batch) -> Tensor:
        answer = self.answer_of(batch)
        features = normalize(batch.columns["features"], dim=1)
        prototypes = self.tensor("prototypes", features.device)
        if features.shape[1] != prototypes.shape[1]:
            raise ProvenanceError(
                f"{self.name} was fitted on features of width {prototypes.shape[1]}, "
                f"and those to score have {features.shape[1]}. "
                "Embed both with the same second encoder."
            )
        similarity = (features * prototypes[answer]).sum(dim=1)
        zero_shot_uncertainty = batch.judged_rivals.total_probability  # 1 - p_max
        return zero_shot_uncertainty + self.weight * (1 - float64(similarity))


def draw_per_class(label: Tensor, max_rows: int, seed: int) -> Tensor:
    """Draw at most ``max_rows`` rows per class at random, and return sorted indices."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(label), generator=generator)
    # all rows, sorted by class, where the rows in a class stay in random order
    class_order = label[shuffled].argsort(stable=True)
    rows_by_class = shuffled[class_order]
    count = torch.bincount(label)
    first_of_class = count.cumsum(0) - count  # position in ``rows_by_class`` where a class begins
    position = torch.arange(len(label))
    rank_in_class = position - first_of_class[label[rows_by_class]]
    drawn_rows = rows_by_class[rank_in_class < max_rows]
    return drawn_rows.sort().values
