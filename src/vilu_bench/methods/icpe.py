"""ICPE: the Gaussian of the predicted class, beside the zero-shot probability."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from vilu.embeddings.rows import SCORING_BATCH, Rows
from vilu.embeddings.similarity import float64
from vilu.embeddings.source import Batch, EmbeddingSource
from vilu.predictors.bank.class_gaussians import (
    ClassDensity,
    Ridge,
    mean_of_both,
)
from vilu.predictors.bank.search import Count, image_blocks
from vilu.predictors.contract.predictor import Learnt
from vilu_bench.methods.bayesvlm import last_layer


@dataclasses.dataclass
class ICPE(ClassDensity):
    """ICPE as released: the mean of the zero-shot probability and a share of the image's density.

    The share is that of the answer's Gaussian.

    u = 1 - (p_max + softmax_c(log N_c(x))_t̂) / 2, N_c the Gaussian of class c: mean and sample
    covariance (divisor n_c - 1) plus ``ridge`` of the training images of the class, in the first
    principal components of all of them. x is what the image encoder puts out *before* it is brought
    to unit norm, P phi of the columns ``features`` and ``image_projection``. Where the data do not
    carry both, x is the unit-norm embedding: that is another method, and the label of the results
    says so.

    Args:
        features: Use the two columns where the data carry them.
        components: Most principal components; fewer where there are fewer images.
        ridge: Added to the diagonal of every covariance; at least 1e-11 of the largest mean
            variance.

    Source: "ICPE", WACV 2026, and its notebook (zhenxianglin/ICPE): PCA with 128 components, 1e-8,
    float64 densities. Differs from it where it is not defined: with fewer images than components
    there are fewer of these; a class of one image takes the mean covariance within classes; one
    without images is in no sum, and where it is the prediction, its density is that of all training
    images. FPR95 is there at the vertex whose rate is nearest to 0.95 (``vilu.metrics``). With
    fewer images in a class than components the covariance is singular up to 1e-8, so that s_d is 0
    or 1 nearly everywhere: it wants hundreds of images a class.

    Examples:
        >>> import numpy as np, vilu
        >>> image = [[1.0, 0.0], [0.8, 0.6], [0.6, 0.8], [0.0, 1.0]]  # at 0, 37, 53 and 90 degrees
        >>> train = vilu.Embeddings(image, np.eye(2), [0, 1, 1, 1])
        >>> new = vilu.Embeddings([[0.96, 0.28], [0.8, 0.6]], np.eye(2))  # at 16 and 37 degrees
        >>> vilu.PREDICTORS["icpe"]().fit(train).predict_uncertainty(new).round(3)
        array([0.015, 0.5  ])
    """

    name: ClassVar[str] = "icpe"
    summary: ClassVar[str] = (
        "zero-shot probability averaged with the density of the predicted class (ICPE, WACV 2026)"
    )
    reference: ClassVar[str] = "ICPE, WACV 2026"
    optional_columns: ClassVar[tuple[str, ...]] = ("features", "image_projection")
    _forms: ClassVar[str] = f"{ClassDensity._forms} on_features:?"

    features: bool = True
    components: Count = 128
    ridge: Ridge = 1e-8

    @property
    def label(self) -> str:
        """The name; once fitted it says whether the fit was on unit-norm embeddings."""
        if not self.learned_ or self._on_features:
            return self.name
        return f"{self.name} (unit norm)"

    def columns_to_fit(self, train: EmbeddingSource) -> tuple[str, ...]:
        """Both columns, where wanted and there."""
        has_columns = train.columns.issuperset(self.optional_columns)
        if self.features and has_columns:
            return self.optional_columns
        return ()

    @property
    def columns_to_score(self) -> tuple[str, ...]:
        """The columns that the fit used."""
        return self.optional_columns if self._on_features else ()

    @property
    def _on_features(self) -> bool:
        """Whether there is a fit on the two columns."""
        if not self.learned_:
            return False
        return bool(self.learned_["on_features"])

    def _learn(
        self,
        train: Rows,
        failure: Tensor,  # noqa: ARG002
        validation: EmbeddingSource | None,  # noqa: ARG002
    ) -> Learnt:
        on_features = set(self.optional_columns) <= set(train.columns)
        blocks = encoded if on_features else image_blocks
        densities = self._densities(train, self.components, self.ridge, blocks, floor=0.0)
        return Learnt(densities | {"on_features": torch.tensor(on_features)})

    def _score(self, batch: Batch) -> Tensor:
        image = before_norm(batch) if self._on_features else float64(batch.image)
        return mean_of_both(batch, self._log_odds(batch, image))


def before_norm(batch: Batch) -> Tensor:
    """(B, D) float64 images as the encoder puts them out, before they are brought to unit norm."""
    phi, _ = last_layer(batch, "features", "image_projection", batch.image)
    return float64(phi) @ float64(batch.columns["image_projection"]).T


def encoded(train: Rows) -> Iterator[tuple[slice, Tensor]]:
    """Positions and images (b, D) as ``before_norm``, block by block."""
    start = 0
    for batch in train.batches(SCORING_BATCH):
        stop = start + len(batch.index)
        yield slice(start, stop), before_norm(batch).cpu()
        start = stop
