"""Delta-KNN: nearest images that were answered rightly against nearest ones that were not."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from vilu.nn.train import Rows
from vilu.predictors.bank.delta import NO_CAPTIONS, MarginWeight, cosine_margin
from vilu.predictors.bank.search import BankPredictor, Count, draw_rows, gather, nearest, squared_distance
from vilu.predictors.labelled import ClosedSetPredictor
from vilu.similarity import float64
from vilu.types import Batch

SMALLEST = 1e-6
"""Added to squared distances before the logarithm, as in the released code."""


@dataclasses.dataclass
class DeltaKNN(BankPredictor, ClosedSetPredictor):
    """Delta-KNN: log-distances to training images that the VLM answers rightly, less those to images answered wrongly.

    u = mean_{i <= k} log(d_i^2 + 1e-6) - mean_{j <= k} log(e_j^2 + 1e-6) - margin_weight * (cos_(1) - cos_(2)), with
    d_i and e_j the Euclidean distances of unit vectors to the nearest images answered rightly and wrongly, and cos the
    cosines with the candidates. Up to constants and the margin this is D/2 times less a log-likelihood ratio of k-NN
    density estimates. A bank of fewer than k images is used whole; the mean of an empty bank (no image answered
    wrongly, or none rightly) is zero: that density is taken as flat.

    Args:
        k: Neighbours per bank.
        margin_weight: Weight lambda of the gap between the two largest cosines; 0: none. The paper's recipe is to
            balance the magnitudes of the two terms.

    Source: Heng and Soh, ICLR 2026, eq. 6 averaged over k neighbours (their k = 25). The logarithm is of squared
    distances, as in the released code, hence twice that of the paper. lambda multiplies cosines, because the CLIP
    logits of that code are cosines without the logit scale: so it does not depend on a model's scale.
    """

    name: ClassVar[str] = "delta_knn"
    summary: ClassVar[str] = "nearer to images answered wrongly than to those answered rightly (Heng and Soh 2026)"
    reference: ClassVar[str] = "Heng and Soh, ICLR 2026"
    cost: ClassVar[str] = "fit: copies the images; score: one product with the bank"
    no_captions: ClassVar[str | None] = NO_CAPTIONS
    tensors: ClassVar[tuple[str, ...]] = ("bank", "n_right")

    k: Count = 25
    margin_weight: MarginWeight = 0.0

    def _fit_tensors(self, train: Rows, failure: Tensor) -> dict[str, Tensor]:
        kept, positions = draw_rows(train, self.max_bank, self.seed)
        right_first = failure[positions].argsort(stable=True)
        bank = gather(dataclasses.replace(kept, index=kept.index[right_first]))
        return {"bank": bank, "n_right": (failure[positions] == 0).sum()}

    def _class_uncertainty(self, batch: Batch, classes: Tensor) -> Tensor:  # noqa: ARG002
        bank, n_right = self.learned_["bank"], int(self.learned_["n_right"])
        right, wrong = (self._log_distance(batch.image, part) for part in (bank[:n_right], bank[n_right:]))
        return right - wrong - self.margin_weight * cosine_margin(batch)

    def _log_distance(self, image: Tensor, bank: Tensor) -> Tensor:
        """(B,) float64 mean log-distance to the nearest images."""
        if not len(bank):
            return float64(torch.zeros(len(image), device=image.device))
        similarity, _ = nearest(image, bank, self.k)
        return torch.log(squared_distance(float64(similarity)) + SMALLEST).mean(dim=1)


@dataclasses.dataclass
class DeltaKNNMargin(DeltaKNN):
    """``DeltaKNN`` plus the margin, the paper's Delta-KNN-RLog; lambda = 10 is its value for CLIP (table 6)."""

    name: ClassVar[str] = "delta_knn_margin"
    summary: ClassVar[str] = "delta_knn plus the margin of the two largest cosines (Heng and Soh 2026)"

    margin_weight: MarginWeight = 10.0
