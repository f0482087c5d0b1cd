"""Learned visual uncertainty, the image-only baseline."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from torch import Tensor

from vilu.nn.heads import FailureHead
from vilu.nn.losses import FailureWeight, weighted_mse
from vilu.nn.train import Loss
from vilu.predictors.heads.head import HeadPredictor, bce_loss
from vilu.types import Batch


@dataclasses.dataclass
class LVU(HeadPredictor):
    """Learned visual uncertainty: ViLU's MLP on the image embedding alone.

    loss="mse": sigmoid(g) regresses one minus the true-class probability, as the released code does (the supplement
    says "the backbone's loss"); loss="bce": ViLU's own loss, which the released checkpoints seem to be trained with.

    Source: ViLU, supplement A.3, after ConfidNet (Corbière et al., NeurIPS 2019).
    """

    name: ClassVar[str] = "lvu"
    summary: ClassVar[str] = "image-only head: regression of the true-class probability (mse), or BCE"
    reference: ClassVar[str] = "Corbière et al., NeurIPS 2019"
    cost: ClassVar[str] = "fit: 6,000 steps of an MLP; score: 1 MFLOP a row"

    loss: Literal["mse", "bce"] = "mse"

    def _build_head(self, dim: int) -> FailureHead:
        return FailureHead(dim, self.hidden, attention=None, predicted_caption=False)

    def _loss(self, weight: FailureWeight) -> Loss:
        return bce_loss(weight) if self.loss == "bce" else true_class_loss(weight)


def true_class_loss(weight: FailureWeight) -> Loss:
    """Weighted MSE of sigmoid(g) to one minus the zero-shot probability of the true class."""

    def loss(batch: Batch, logit: Tensor) -> Tensor:
        wrong = 1 - batch.logits.softmax(dim=-1).gather(1, batch.target[:, None]).squeeze(1)
        return weighted_mse(logit, wrong, batch.failure, weight(batch.failure))

    return loss
