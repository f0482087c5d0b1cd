"""Mahalanobis distances to the predicted class."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from vilu.embeddings.rows import Rows
from vilu.embeddings.similarity import float64
from vilu.embeddings.source import Batch, EmbeddingSource
from vilu.predictors.bank.class_gaussians import (
    NEGLIGIBLE_VARIANCE,
    class_means,
    scatter_within_classes,
    whitener,
)
from vilu.predictors.bank.closed_set import ClosedSet
from vilu.predictors.bank.search import class_labels
from vilu.predictors.contract.labelled import class_texts
from vilu.predictors.contract.predictor import CLASSES, Learnt


def shared_covariance(train: Rows, label: Tensor, mean: Tensor) -> Tensor | None:
    """Estimate the shrunk covariance (D, D) of M images around the class means (K, D).

    The Ledoit-Wolf estimate is multiplied by M / (M - number of classes with images), because the
    class means come from the same M images. Return None if no class has two different images.
    """
    scatter_matrix, fourth_power_sum = scatter_within_classes(train, label, mean)
    n = len(label)
    n_means = len(label.unique())
    has_spread = float(scatter_matrix.trace()) > NEGLIGIBLE_VARIANCE * n
    has_one_image_per_class = n == n_means
    if has_one_image_per_class or not has_spread:
        return None
    bias_correction = n / (n - n_means)
    return ledoit_wolf(scatter_matrix, fourth_power_sum, n) * bias_correction


def spherical_covariance(train: Rows) -> Tensor:
    """Return the identity (D, D) times the mean variance of a coordinate.

    The variances are over all images. If the mean variance is zero, the result is the identity.
    """
    one_label = torch.zeros_like(train.index)  # all images in one class
    mean, _ = class_means(train, one_label, n_classes=1)
    scatter_matrix, _ = scatter_within_classes(train, one_label, mean)
    dim = len(scatter_matrix)
    degrees_of_freedom = max(len(one_label) - 1, 1)
    variance = float(scatter_matrix.trace()) / (degrees_of_freedom * dim)
    has_spread = variance > NEGLIGIBLE_VARIANCE  # False also for NaN
    if not has_spread:
        variance = 1.0
    return torch.eye(dim, dtype=torch.float64) * variance


def ledoit_wolf(scatter_matrix: Tensor, fourth_power_sum: float, n: int) -> Tensor:
    """Estimate a covariance (D, D), shrunk towards a multiple of the identity.

    Args:
        scatter_matrix: (D, D) sum of x x^T over the n centred rows x.
        fourth_power_sum: Sum of |x|^4 over these rows.
        n: Number of rows.

    The estimate needs the sum of x_a^2 x_b^2 over all rows x and all coordinate pairs (a, b).
    This sum equals ``fourth_power_sum``, so one pass over the rows is enough.

    Source: Ledoit and Wolf, Journal of Multivariate Analysis 2004.
    """
    covariance = scatter_matrix / n
    d = len(covariance)
    variance = covariance.trace() / d
    target = variance * torch.eye(d, dtype=torch.float64)
    squared_norm = covariance.square().sum()
    # squared distance between the covariance and the target
    dispersion = squared_norm - d * variance**2
    # estimated mean squared error of the covariance
    error = (fourth_power_sum / n - squared_norm) / n
    shrinkage = torch.ones((), dtype=torch.float64)
    if float(dispersion) > 0:
        shrinkage = (error / dispersion).clamp(0, 1)
    return (1 - shrinkage) * covariance + shrinkage * target


@dataclasses.dataclass
class Mahalanobis(ClosedSet):
    """Squared Mahalanobis distance to the predicted class's mean.

    z is the image, and t̂ is the predicted class. Without ``relative``,

        u = (z - mu_t̂)^T S^-1 (z - mu_t̂).

    mu_t̂ is the class mean. All classes share S, the covariance of the training images around the
    class means. With ``relative``, (z - mu)^T S_0^-1 (z - mu) is subtracted, where mu and S_0 are
    the mean and the covariance over all training images.

    S and S_0 are Ledoit-Wolf estimates. A shrunk covariance also works with fewer images than
    coordinates, where the plain covariance is singular. If no class has two different images, S is
    the identity times the mean variance of a coordinate. A class without training images has the
    mean mu.

    Args:
        relative: Whether to subtract the distance to the distribution over all training images.
            This distance measures how unusual an image is.

    Source: Lee et al., NeurIPS 2018, and for ``relative``, Ren et al., 2021. In these papers the
    distance is to the nearest class. Here the distance to the predicted class is used, because the
    task is to predict whether this answer is wrong.

    Examples:
        >>> import numpy as np, vilu
        >>> image = [[1.0, 0.0], [0.8, 0.6], [0.6, 0.8], [0.0, 1.0]]  # at 0, 37, 53 and 90 degrees
        >>> text = np.eye(2)  # class 0 at 0 degrees, class 1 at 90 degrees
        >>> train = vilu.Embeddings(image, text, target=[0, 1, 1, 1])  # the answer at 37 is wrong
        >>> new = vilu.Embeddings([[0.96, 0.28], [0.28, 0.96]], text)  # at 16 and 74 degrees
        >>> # the class means are at 0 and 60 degrees
        >>> vilu.PREDICTORS["mahalanobis"]().fit(train).predict_uncertainty(new).round(2)
        array([1.14, 0.43])
    """

    name: ClassVar[str] = "mahalanobis"
    summary: ClassVar[str] = "Mahalanobis distance to the predicted class (Lee et al. 2018)"
    reference: ClassVar[str] = "Lee et al., NeurIPS 2018"
    looks_at: ClassVar[frozenset[str]] = frozenset({"logits", "image"})
    cost: ClassVar[str] = "fit: two passes, D x D; score: D^2 per row"
    # name, type (f float32, d float64, i int64, ? bool) and sizes for each learned tensor
    _forms: ClassVar[str] = "means:dKD whitener:dDD classes:fKD global_mean:d1D global_whitener:dDD"

    relative: bool = False

    def _learn(
        self,
        train: Rows,
        failure: Tensor,  # noqa: ARG002
        validation: EmbeddingSource | None,  # noqa: ARG002
    ) -> Learnt:
        label = class_labels(train)
        learned = fit_gaussian(train, label, train.source.n_candidates)
        if self.relative:
            one_label = torch.zeros_like(label)  # all images in one class
            global_gaussian = fit_gaussian(train, one_label, n_classes=1)
            learned["global_mean"] = global_gaussian["means"]
            learned["global_whitener"] = global_gaussian["whitener"]
        text = class_texts(train)
        return Learnt(learned | {CLASSES: text})

    def tensor_names(self) -> tuple[str, ...]:
        """Return the fitted tensors' names. The two global tensors exist only with ``relative``."""
        if self.relative:
            return self.tensors
        return self.tensors[:-2]  # without the global tensors, which are the last two in ``_forms``

    def _score(self, batch: Batch) -> Tensor:
        image = float64(batch.image)
        answer = self.answer_of(batch).to(image.device)
        mean = self.tensor("means", image.device)[answer]
        distance = self._distance(image, mean, "whitener")
        if not self.relative:
            return distance
        global_mean = self.tensor("global_mean", image.device)
        return distance - self._distance(image, global_mean, "global_whitener")

    def _distance(self, image: Tensor, mean: Tensor, whitener_name: str) -> Tensor:
        """Compute squared distances (B,) between images (B, D) and means, after whitening."""
        whitened = (image - mean) @ self.tensor(whitener_name, image.device)
        return whitened.square().sum(dim=1)


@dataclasses.dataclass
class RelativeMahalanobis(Mahalanobis):
    """``Mahalanobis`` with ``relative``: the distance to all training images is subtracted.

    The score is large if the predicted class's distribution fits an image worse than the
    distribution over all training images.

    Examples:
        >>> import numpy as np, vilu
        >>> image = [[1.0, 0.0], [0.8, 0.6], [0.6, 0.8], [0.0, 1.0]]  # at 0, 37, 53 and 90 degrees
        >>> text = np.eye(2)  # class 0 at 0 degrees, class 1 at 90 degrees
        >>> train = vilu.Embeddings(image, text, target=[0, 1, 1, 1])  # the answer at 37 is wrong
        >>> new = vilu.Embeddings([[0.96, 0.28], [0.28, 0.96]], text)  # at 16 and 74 degrees
        >>> vilu.PREDICTORS["relative_mahalanobis"]().fit(train).predict_uncertainty(new).round(2)
        array([ 0.22, -0.49])
    """

    name: ClassVar[str] = "relative_mahalanobis"
    summary: ClassVar[str] = (
        "Mahalanobis distance to the predicted class less that to all images (Ren et al. 2021)"
    )
    reference: ClassVar[str] = "Ren et al., ICML workshop on uncertainty 2021"
    looks_at: ClassVar[frozenset[str]] = frozenset({"logits", "image"})

    relative: bool = True


def fit_gaussian(train: Rows, label: Tensor, n_classes: int) -> dict[str, Tensor]:
    """Compute class means (K, D), and a matrix (D, D) that whitens images around the means."""
    means, _ = class_means(train, label, n_classes)
    covariance = shared_covariance(train, label, means)
    if covariance is None:
        covariance = spherical_covariance(train)
    return {"means": means, "whitener": whitener(covariance)}
