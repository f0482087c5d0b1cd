"""Learned visual uncertainty, the image-only baseline."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from vilu.nn.heads import FailureHead
from vilu.nn.losses import FailureWeight, weighted_mse
from vilu.nn.train import Loss
from vilu.nn.world import current_world
from vilu.predictors.heads.head import HeadPredictor, bce_loss
from vilu.types import Batch


@dataclasses.dataclass
class LVU(HeadPredictor):
    """Learned visual uncertainty: ViLU's MLP on the image embedding alone, u = sigmoid(g).

    With p_y the zero-shot probability of the true class, the losses are
    "mse": squared error of sigmoid(g) to 1 - p_y, as the released code does;
    "loss": squared error of softplus(g) to the backbone's loss -log p_y, as the supplement says; over the mean square
    of a batch's losses where that exceeds one, so that a step does not grow with the VLM's logit scale;
    "bce": ViLU's own loss, which the released checkpoints seem to be trained with.

    A predicted loss softplus(g) = -log p_y means p_y = 1 - sigmoid(g), so sigmoid(g) has one meaning in both
    regressions: the probability that the VLM withholds from the truth, which stands in for the probability of failure.
    The mean of -log p_y is ruled by its largest values, so "loss" errs upwards (by Jensen's inequality the best "loss"
    is never below the best "mse"); only "bce" learns the failure itself.

    Source: ViLU, supplement A.3, after ConfidNet (Corbière et al., NeurIPS 2019).
    """

    name: ClassVar[str] = "lvu"
    summary: ClassVar[str] = "image-only head: regression of the true-class probability or the loss, or BCE"
    reference: ClassVar[str] = "Corbière et al., NeurIPS 2019"
    cost: ClassVar[str] = "fit: 6,000 steps of an MLP; score: 1 MFLOP a row"

    loss: Literal["mse", "loss", "bce"] = "mse"

    def _build_head(self, dim: int) -> FailureHead:
        return FailureHead(dim, self.hidden, attention=None, predicted_caption=False)

    @property
    def learns_failure(self) -> bool:
        """Whether the loss is weighted BCE."""
        return self.loss == "bce"

    def _loss(self, weight: FailureWeight) -> Loss:
        return LOSSES[self.loss](weight)


def withheld_probability(batch: Batch) -> Tensor:
    """(B,) one minus the zero-shot probability of the true class."""
    return -torch.expm1(batch.target_log_probability)


def backbone_loss(batch: Batch) -> Tensor:
    """(B,) cross-entropy of the zero-shot posterior."""
    return -batch.target_log_probability


def regression(target: Callable[[Batch], Tensor], link: Callable[[Tensor], Tensor]) -> Callable[[FailureWeight], Loss]:
    """Weighted squared error of ``link(g)`` to a target, over the mean squared target where that exceeds one."""

    def weighted(weight: FailureWeight) -> Loss:
        def loss(batch: Batch, logit: Tensor) -> Tensor:
            wanted = target(batch)
            size = current_world().mean(wanted.square()).clamp(min=1)
            return weighted_mse(logit, wanted, batch.failure, weight(batch.failure), link) / size

        return loss

    return weighted


LOSSES: dict[str, Callable[[FailureWeight], Loss]] = {
    "mse": regression(withheld_probability, torch.sigmoid),
    "loss": regression(backbone_loss, functional.softplus),
    "bce": bce_loss,
}
"""How a head is trained, by name."""
