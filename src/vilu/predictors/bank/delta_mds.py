"""Delta-MDS: Mahalanobis distance to images that were answered rightly against that to images that were not."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor

from vilu.nn.train import Rows
from vilu.predictors.bank.delta import NO_CAPTIONS, MarginWeight, cosine_margin
from vilu.predictors.bank.gaussian import (
    class_means,
    shared_covariance,
    spherical_covariance,
    squared_distances,
    whitener,
)
from vilu.predictors.bank.search import labels
from vilu.predictors.labelled import ClosedSetPredictor
from vilu.similarity import float64
from vilu.types import Batch


@dataclasses.dataclass
class DeltaMDS(ClosedSetPredictor):
    """Delta-MDS: squared Mahalanobis distance to images that the VLM answers rightly, less that to those it does not.

    u = min_c (z - m_c)^T R^-1 (z - m_c) - min_c (z - n_c)^T W^-1 (z - n_c) - margin_weight * (cos_(1) - cos_(2)): m_c
    is the mean of the images of class c answered rightly and R the covariance around these means, n_c and W those of
    the images answered wrongly; cos are the cosines with the candidates. The minima run over the classes that have such
    images; where none has, the term is zero. A bank in which no class has two different images takes the covariance
    within the classes of all training images, or, where that is no better, the mean variance of a coordinate.

    Args:
        margin_weight: Weight lambda of the gap between the two largest cosines; 0: none. The paper's recipe is to
            balance the magnitudes of the two terms; those of distances grow with D and with less shrinkage.

    Source: Heng and Soh, ICLR 2026, eq. 5. Differs from the released code: embeddings have unit norm, and covariances
    are Ledoit-Wolf estimates, since few images leave the plain ones singular. lambda multiplies cosines, because the
    CLIP logits of that code are cosines without the logit scale: so it does not depend on a model's scale.
    """

    name: ClassVar[str] = "delta_mds"
    summary: ClassVar[str] = "Mahalanobis distance to rightly answered images less that to others (Heng and Soh 2026)"
    reference: ClassVar[str] = "Heng and Soh, ICLR 2026"
    cost: ClassVar[str] = "fit: two passes, D x D; score: 2 D (D + K) a row"
    no_captions: ClassVar[str | None] = NO_CAPTIONS
    tensors: ClassVar[tuple[str, ...]] = tuple(
        f"{bank}_{part}" for bank in ("right", "wrong") for part in ("means", "counts", "whitener")
    )

    margin_weight: MarginWeight = 0.0

    def _fit_tensors(self, train: Rows, failure: Tensor) -> dict[str, Tensor]:
        label = labels(train)
        learned: dict[str, Tensor] = {}
        for bank, value in (("right", 0), ("wrong", 1)):
            part = dataclasses.replace(train, index=train.index[failure == value])
            means, counts = class_means(part, label[failure == value], train.source.n_candidates)
            covariance = shared_covariance(part, label[failure == value], means)
            white = whitener(stand_in(train, label) if covariance is None else covariance)
            learned |= {f"{bank}_means": means @ white, f"{bank}_counts": counts, f"{bank}_whitener": white}
        return learned

    def _class_uncertainty(self, batch: Batch, classes: Tensor) -> Tensor:
        image = float64(batch.image)
        known = classes.to(image.device)
        right, wrong = (self._distance(image, known, bank) for bank in ("right", "wrong"))
        return right - wrong - self.margin_weight * cosine_margin(batch)

    def _distance(self, image: Tensor, classes: Tensor, bank: str) -> Tensor:
        """(B,) squared distance to the nearest class of a bank."""
        means, counts = (self._tensor(f"{bank}_{part}", image.device)[classes] for part in ("means", "counts"))
        squares = squared_distances(image @ self._tensor(f"{bank}_whitener", image.device), means)
        found = squares.masked_fill(counts == 0, math.inf).amin(dim=1)
        return torch.where(found == math.inf, 0.0, found)


@dataclasses.dataclass
class DeltaMDSMargin(DeltaMDS):
    """``DeltaMDS`` plus the margin, the paper's Delta-MDS-RLog; lambda = 10,000 is its value for CLIP (table 6)."""

    name: ClassVar[str] = "delta_mds_margin"
    summary: ClassVar[str] = "delta_mds plus the margin of the two largest cosines (Heng and Soh 2026)"

    margin_weight: MarginWeight = 10_000.0


def stand_in(train: Rows, label: Tensor) -> Tensor:
    """Covariance for a bank that has none of its own."""
    means, _ = class_means(train, label, train.source.n_candidates)
    covariance = shared_covariance(train, label, means)
    return spherical_covariance(train) if covariance is None else covariance
