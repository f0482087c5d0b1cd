"""Vote of the nearest training images."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vilu.nn.train import Rows
from vilu.predictors.bank.search import BankPredictor, Count, draw_rows, gather, labels, nearest
from vilu.predictors.labelled import ClosedSetPredictor
from vilu.types import Batch


@dataclasses.dataclass
class KNNVote(BankPredictor, ClosedSetPredictor):
    """Share of the k nearest training images that are not of the predicted class.

    u = 1 - sum_{i <= k, y_i = t̂} w_i / sum_{i <= k} w_i, with w_i = 1 or (1 + cos(z, z_i)) / 2. A predicted class
    without training images gets u = 1. With fewer than k training images all of them vote: a uniform vote is then the
    share of the class in the bank, the same for every image, and says nothing. Uniform votes take k + 1 values, so many
    images tie.

    Args:
        k: Number of neighbours.
        weighting: "uniform", or "similarity" for votes weighted by cosine.

    Source: the confidence of a k-nearest-neighbour classifier (Cover and Hart, IEEE Trans. Inf. Theory 1967) in the
    class that the VLM predicts.
    """

    name: ClassVar[str] = "knn_vote"
    summary: ClassVar[str] = "share of the nearest training images not of the predicted class"
    reference: ClassVar[str] = "Cover and Hart, IEEE Trans. Inf. Theory 1967"
    cost: ClassVar[str] = "fit: copies the images; score: one product with the bank"
    tensors: ClassVar[tuple[str, ...]] = ("bank", "labels")

    k: Count = 20
    weighting: Literal["uniform", "similarity"] = "uniform"

    def _fit_tensors(self, train: Rows, failure: Tensor) -> dict[str, Tensor]:  # noqa: ARG002
        kept, _ = draw_rows(train, self.max_bank, self.seed)
        return {"bank": gather(kept), "labels": labels(kept)}

    def _class_uncertainty(self, batch: Batch, classes: Tensor) -> Tensor:
        similarity, index = nearest(batch.image, self.learned_["bank"], self.k)
        other = self._tensor("labels", index.device)[index] != classes[batch.prediction][:, None]
        weight = torch.ones_like(similarity) if self.weighting == "uniform" else (1 + similarity) / 2
        return (weight * other).sum(dim=1) / weight.sum(dim=1)
