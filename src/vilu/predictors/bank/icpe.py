"""ICPE."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from vilu.embeddings.similarity import float64
from vilu.embeddings.source import Batch, EmbeddingSource, log_posterior
from vilu.predictors.bank.mahalanobis import NO_SPREAD, class_means, scatter, squared_distances, whitener
from vilu.predictors.bank.search import NO_CLASSES, Count, image_blocks, labels
from vilu.predictors.base import CLASSES, FailurePredictor, Learnt
from vilu.predictors.labelled import class_texts
from vilu.predictors.nn.train import Rows

ABSENT, POOLED = 0, 1
"""Covariances that are no class's own: that of all images, and the mean one within classes."""


@dataclasses.dataclass
class ICPE(FailurePredictor):
    """ICPE: zero-shot probability and class-conditional density of the image, averaged.

    s_d = N_t̂(z) / sum_c N_c(z), with one Gaussian N_c per class, fitted on unit-norm image embeddings that are centred
    and projected on their first principal components: the class mean, and the class covariance plus ``ridge``. With
    score="probability" u = 1 - (p_max + s_d) / 2. s_d is often 0 or 1 to many digits; with score="log_odds"
    u = -log(s_d / (1 - s_d)), computed as log sum_{c != t̂} N_c - log N_t̂, which does not saturate (p_max is left out).

    A class of one image takes the mean covariance within classes, or, where no class has two different images, the
    mean variance of a coordinate. A class without images is in no sum; where it is the prediction, its density is that
    of all training images. Where no other class has images, log sum = 0.

    Args:
        score: "probability" or "log_odds".
        components: Most principal components; fewer where there are fewer images.
        ridge: Added to the diagonal of every covariance.

    Source: "ICPE", WACV 2026, as implemented in sgchr273/TRINE. Differs from it: classes of one image count.
    """

    name: ClassVar[str] = "icpe"
    summary: ClassVar[str] = "zero-shot probability averaged with the density of the predicted class (ICPE, WACV 2026)"
    reference: ClassVar[str] = "ICPE, WACV 2026"
    cost: ClassVar[str] = "fit: four passes, a covariance a class; score: K x 128^2 a row"
    closed_set: ClassVar[bool] = True
    no_captions: ClassVar[str | None] = NO_CLASSES
    tensors: ClassVar[tuple[str, ...]] = ("centre", "projection", "means", "whiteners", "log_dets", "groups", CLASSES)

    seed: int = 0
    device: str = "auto"
    score: Literal["probability", "log_odds"] = "probability"
    components: Count = 128
    ridge: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-4

    def _learn(self, train: Rows, failure: Tensor, validation: EmbeddingSource | None) -> Learnt:  # noqa: ARG002
        label = labels(train)
        means, count = class_means(train, label, train.source.n_candidates)
        centre, projection, variance = principal_components(train, self.components)
        covariances, groups = self._covariances(train, label, means, count, projection)
        pooled = covariances.sum(dim=0) if len(covariances) else torch.zeros_like(variance).diag()
        pooled = pooled / max(len(label) - int((count > 0).sum()), 1)
        if float(pooled.trace()) <= NO_SPREAD:
            pooled = torch.eye(len(variance), dtype=torch.float64) * variance.mean()
        own = covariances / (count[groups > POOLED] - 1)[:, None, None]
        ridge = self.ridge * torch.eye(len(variance), dtype=torch.float64)
        everything = torch.stack([variance.diag(), pooled, *own]) + ridge
        tensors = {
            "centre": centre,
            "projection": projection,
            "means": (means - centre) @ projection,
            "whiteners": torch.stack([whitener(covariance) for covariance in everything]),
            "log_dets": torch.linalg.slogdet(everything).logabsdet,
            "groups": groups,
            CLASSES: class_texts(train),
        }
        return Learnt(tensors)

    def _covariances(
        self, train: Rows, label: Tensor, means: Tensor, count: Tensor, projection: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Projected scatter (G, R, R) of each class of two images or more, and the covariance (K,) of every class."""
        groups = torch.where(count > 0, POOLED, ABSENT)
        groups[count > 1] = torch.arange(int((count > 1).sum())) + POOLED + 1
        members = label.argsort(stable=True).split(count.tolist())
        found = []
        for c in (count > 1).nonzero().squeeze(1).tolist():
            total = projection.new_zeros(projection.shape[1], projection.shape[1])
            for _, image in image_blocks(dataclasses.replace(train, index=train.index[members[c]])):
                projected = (image.double() - means[c]) @ projection
                total += projected.T @ projected
            found.append(total)
        empty = projection.new_empty(0, projection.shape[1], projection.shape[1])
        return torch.stack(found) if found else empty, groups

    def _score(self, batch: Batch) -> Tensor:
        classes = self.classes_of(batch.text)
        image = float64(batch.image)
        answer = batch.prediction.to(image.device)[:, None]
        groups = self.tensor("groups", image.device)[classes.to(image.device)]
        density = self._log_density(image, classes, groups)
        mine = density.gather(1, answer).squeeze(1)
        others = density.masked_fill(groups == ABSENT, -math.inf).scatter(1, answer, -math.inf).logsumexp(dim=1)
        odds = others.masked_fill(others == -math.inf, 0.0) - mine
        if self.score == "log_odds":
            return odds
        failure = -torch.expm1(log_posterior(batch).amax(dim=1))
        return (failure.to(odds.device) + torch.sigmoid(odds)) / 2

    def _log_density(self, image: Tensor, classes: Tensor, groups: Tensor) -> Tensor:
        """(B, K) float64 log N_c up to a constant, class by class of equal covariance."""
        z = (image - self.tensor("centre", image.device)) @ self.tensor("projection", image.device)
        means = self.tensor("means", image.device)[classes.to(image.device)]
        whiteners, log_dets = (self.tensor(name, image.device) for name in ("whiteners", "log_dets"))
        density = z.new_empty(len(z), len(groups))
        for group in groups.unique().tolist():
            member = groups == group
            squares = squared_distances(z @ whiteners[group], means[member] @ whiteners[group])
            density[:, member] = -(squares + log_dets[group]) / 2
        return density


def principal_components(train: Rows, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (D,), the first components (D, R) and their variances (R,); as many as there are images less one, or one."""
    everything = torch.zeros_like(train.index)
    mean, _ = class_means(train, everything, 1)
    matrix, _ = scatter(train, everything, mean)
    n = len(everything)
    rank = max(min(most, len(matrix), n - 1), 1)
    variance, components = torch.linalg.eigh(matrix / max(n - 1, 1))
    return mean[0], components.flip(1)[:, :rank].contiguous(), variance.flip(0)[:rank].clamp(min=0).contiguous()
