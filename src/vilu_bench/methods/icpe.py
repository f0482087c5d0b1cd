"""ICPE: mean of the zero-shot probability and the predicted class's share in the density."""

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
    average_with_zero_shot,
)
from vilu.predictors.bank.search import Count, image_blocks
from vilu.predictors.contract.predictor import Learnt
from vilu_bench.methods.bayesvlm import run_last_layer


@dataclasses.dataclass
class ICPE(ClassDensity):
    """ICPE as released: averages the zero-shot probability and the answer's density share.

    u = 1 - (p_max + s_d) / 2, with s_d = N_t̂(x) / sum_c N_c(x).

    p_max is the zero-shot probability of the answer t̂. N_c is the Gaussian for class c. Its mean
    and sample covariance (divisor n_c - 1) are from the n_c training images in the class, with
    ``ridge`` added to the diagonal. All images are projected on the training set's first principal
    components.

    x is the image encoder's output P phi *before* normalisation, computed from the columns
    ``features`` and ``image_projection``. If the data do not have both columns, x is the unit-norm
    embedding. Then the method is not ICPE, and the label in the results says so.

    Args:
        features: Whether to compute x from the two columns, if the data have both.
        components: Maximum number of principal components. With n training images there are at
            most n - 1.
        ridge: Number added to the diagonal of every covariance. It is at least 1e-11 times the
            largest mean variance in a covariance.

    Source: "ICPE", WACV 2026, and its notebook (zhenxianglin/ICPE): PCA with 128 components, ridge
    1e-8, float64 densities. This implementation also defines cases that the notebook leaves
    undefined. With fewer images than components there are fewer components. A class with one image
    has the mean covariance within classes. A class without images is left out of the sum. If such a
    class is the answer, the density of all training images is used. The notebook computes FPR95 at
    the ROC vertex with the TPR nearest to 0.95. ``vilu.metrics`` interpolates.

    For a class with fewer images than components, the covariance is singular up to the ridge. Then
    s_d is 0 or 1 for nearly all images. The method needs hundreds of images per class.

    Examples:
        >>> import numpy as np, vilu
        >>> image = [[1.0, 0.0], [0.8, 0.6], [0.6, 0.8], [0.0, 1.0]]  # at 0, 37, 53 and 90 degrees
        >>> text = np.eye(2)  # class 0 at 0 degrees, class 1 at 90 degrees
        >>> train = vilu.Embeddings(image, text, target=[0, 1, 1, 1])  # the answer at 37 is wrong
        >>> new = vilu.Embeddings([[0.96, 0.28], [0.8, 0.6]], text)  # at 16 and 37 degrees
        >>> # at 37 degrees the answer is 0, but only class 1 has density there: s_d = 0
        >>> vilu.PREDICTORS["icpe"]().fit(train).predict_uncertainty(new).round(3)
        array([0.015, 0.5  ])
    """

    name: ClassVar[str] = "icpe"
    summary: ClassVar[str] = (
        "zero-shot probability averaged with the density of the predicted class (ICPE, WACV 2026)"
    )
    reference: ClassVar[str] = "ICPE, WACV 2026"
    optional_columns: ClassVar[tuple[str, ...]] = ("features", "image_projection")
    # name, type (f float32, d float64, i int64, ? bool) and sizes for each learned tensor
    _forms: ClassVar[str] = f"{ClassDensity._forms} on_features:?"

    features: bool = True
    components: Count = 128
    ridge: Ridge = 1e-8

    @property
    def label(self) -> str:
        """The method's name. After a fit on unit-norm embeddings, "(unit norm)" follows."""
        if not self.learned_ or self._uses_features:
            return self.name
        return f"{self.name} (unit norm)"

    def columns_to_fit(self, train: EmbeddingSource) -> tuple[str, ...]:
        """Return both columns if ``features`` is set and ``train`` has both, else no column."""
        has_columns = train.columns.issuperset(self.optional_columns)
        if self.features and has_columns:
            return self.optional_columns
        return ()

    @property
    def columns_to_score(self) -> tuple[str, ...]:
        """The columns that the fit used."""
        return self.optional_columns if self._uses_features else ()

    @property
    def _uses_features(self) -> bool:
        """Whether the predictor was fitted on the two columns."""
        if not self.learned_:
            return False
        return bool(self.learned_["on_features"])

    def _learn(
        self,
        train: Rows,
        failure: Tensor,  # noqa: ARG002
        validation: EmbeddingSource | None,  # noqa: ARG002
    ) -> Learnt:
        uses_features = set(self.optional_columns) <= set(train.columns)
        read_blocks = blocks_of_outputs if uses_features else image_blocks
        densities = self._fit_densities(
            train, self.components, self.ridge, read_blocks, relative_ridge=0.0
        )
        on_features = torch.tensor(uses_features)
        return Learnt(densities | {"on_features": on_features})

    def _score(self, batch: Batch) -> Tensor:
        image = outputs_before_norm(batch) if self._uses_features else float64(batch.image)
        log_odds = self._log_odds(batch, image)
        return average_with_zero_shot(batch, log_odds)


def outputs_before_norm(batch: Batch) -> Tensor:
    """Compute the image encoder's outputs (B, D) before normalisation, float64."""
    # this call also checks both columns. Its outputs are computed again, in float64
    phi, _ = run_last_layer(batch, "features", "image_projection", batch.image)
    projection = float64(batch.columns["image_projection"])
    return float64(phi) @ projection.T


def blocks_of_outputs(train: Rows) -> Iterator[tuple[slice, Tensor]]:
    """Yield blocks: positions among the rows (a slice), and outputs before normalisation (b, D)."""
    start = 0
    for batch in train.batches(SCORING_BATCH):
        stop = start + len(batch.index)
        yield slice(start, stop), outputs_before_norm(batch).cpu()
        start = stop
