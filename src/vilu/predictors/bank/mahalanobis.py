"""Mahalanobis distance to the predicted class."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from vilu.nn.train import Rows
from vilu.predictors.bank.gaussian import (
    class_means,
    shared_covariance,
    spherical_covariance,
    whitener,
)
from vilu.predictors.bank.search import labels
from vilu.predictors.labelled import ClosedSetPredictor
from vilu.similarity import float64
from vilu.types import Batch


@dataclasses.dataclass
class Mahalanobis(ClosedSetPredictor):
    """Squared Mahalanobis distance to the mean of the predicted class, under a covariance that all classes share.

    u = (z - mu_t̂)^T S^-1 (z - mu_t̂) [- (z - mu)^T S_0^-1 (z - mu) with ``relative``], mu and S_0 being the mean and
    covariance of all training images. S and S_0 are Ledoit-Wolf estimates, so that fewer images than coordinates do.
    Where no class has two different images there is no S: distances are then Euclidean ones, in units of the mean
    variance of a coordinate. For a class without training images mu stands in.

    Args:
        relative: Whether to subtract the distance to all training images, which tells how unusual an image is.

    Source: Lee et al., NeurIPS 2018; relative: Ren et al., 2021. There the distance to the nearest class; here to the
    predicted one, whose failure is asked for. The usual plain covariance is singular with fewer images than
    coordinates.
    """

    name: ClassVar[str] = "mahalanobis"
    summary: ClassVar[str] = "Mahalanobis distance to the predicted class (Lee et al. 2018)"
    reference: ClassVar[str] = "Lee et al., NeurIPS 2018"
    cost: ClassVar[str] = "fit: two passes, D x D; score: D^2 a row"
    tensors: ClassVar[tuple[str, ...]] = ("means", "whitener")

    relative: bool = False

    def _fit_tensors(self, train: Rows, failure: Tensor) -> dict[str, Tensor]:  # noqa: ARG002
        label = labels(train)
        learned = gaussian(train, label, train.source.n_candidates)
        if self.relative:
            mean, everything = gaussian(train, torch.zeros_like(label), 1).values()
            learned |= {"global_mean": mean, "global_whitener": everything}
        return learned

    def _tensor_names(self) -> tuple[str, ...]:
        extra = ("global_mean", "global_whitener") if self.relative else ()
        return (*super()._tensor_names(), *extra)

    def _class_uncertainty(self, batch: Batch, classes: Tensor) -> Tensor:
        image = float64(batch.image)
        means = self._tensor("means", image.device)[classes[batch.prediction].to(image.device)]
        score = ((image - means) @ self._tensor("whitener", image.device)).square().sum(dim=1)
        if self.relative:
            centred = image - self._tensor("global_mean", image.device)
            score = score - (centred @ self._tensor("global_whitener", image.device)).square().sum(dim=1)
        return score


@dataclasses.dataclass
class RelativeMahalanobis(Mahalanobis):
    """``Mahalanobis`` with ``relative``: how much better all training images explain an image than its class does."""

    name: ClassVar[str] = "relative_mahalanobis"
    summary: ClassVar[str] = "Mahalanobis distance to the predicted class less that to all images (Ren et al. 2021)"
    reference: ClassVar[str] = "Ren et al., ICML workshop on uncertainty 2021"

    relative: bool = True


def gaussian(train: Rows, label: Tensor, n_classes: int) -> dict[str, Tensor]:
    """Class means (K, D), and the whitening (D, D) of the covariance around them."""
    means, _ = class_means(train, label, n_classes)
    covariance = shared_covariance(train, label, means)
    return {"means": means, "whitener": whitener(spherical_covariance(train) if covariance is None else covariance)}
