"""Gaussians of classes: distances and densities of the predicted one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from vilu.embeddings.rows import Rows
from vilu.embeddings.similarity import float64
from vilu.embeddings.source import Batch, EmbeddingSource
from vilu.embeddings.source import log_posterior as zero_shot_log_posterior
from vilu.predictors.bank.closed_set import ClosedSet
from vilu.predictors.bank.search import Count, image_blocks, labels
from vilu.predictors.contract.labelled import class_texts
from vilu.predictors.contract.predictor import CLASSES, Learnt

Blocks = Callable[[Rows], Iterator[tuple[slice, Tensor]]]
"""Rows -> positions and images (b, D), block by block; ``image_blocks``: those of unit norm."""

NO_SPREAD = 1e-12  # variance of unit vectors up to which they are the same image, up to rounding
FLOOR = 1e-9
"""Added to a covariance before it is inverted, as a share of its mean variance.

It is needed where embeddings span a subspace only.
"""
LEAST = 1e-11  # ridge, as a share of the largest mean variance: a smaller one is lost by rounding


def class_means(
    train: Rows, label: Tensor, n_classes: int, blocks: Blocks = image_blocks
) -> tuple[Tensor, Tensor]:
    """Mean (K, D) and number (K,) of the images of each class.

    The mean of a class without images is that of all images.
    """
    total = torch.zeros(n_classes, train.source.space.embed_dim, dtype=torch.float64)
    for block, image in blocks(train):
        total.index_add_(0, label[block], image.double())
    count = torch.bincount(label, minlength=n_classes)
    mean = total / count.clamp(min=1)[:, None]
    mean[count == 0] = total.sum(dim=0) / max(len(label), 1)
    return mean, count


def scatter(
    train: Rows, label: Tensor, mean: Tensor, blocks: Blocks = image_blocks
) -> tuple[Tensor, float]:
    """Sum (D, D) of x x^T and sum of |x|^4, over x = image - mean of its class."""
    dim = mean.shape[1]
    matrix = torch.zeros(dim, dim, dtype=torch.float64)
    fourth = 0.0
    for block, image in blocks(train):
        x = image.double() - mean[label[block]]
        matrix += x.T @ x
        fourth += float(x.square().sum(dim=1).square().sum())
    return matrix, fourth


def whitener(covariance: Tensor, floor: float = FLOOR) -> Tensor:
    """W (D, D) with |x W|^2 = x^T covariance^-1 x, up to ``floor`` times the mean variance."""
    identity = torch.eye(len(covariance), dtype=covariance.dtype)
    raised = covariance + floor * covariance.diagonal().mean() * identity
    lower = torch.linalg.cholesky(raised)
    inverse: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False)
    return inverse.T.contiguous()


Ridge = Annotated[float, Field(gt=0, allow_inf_nan=False)]

ABSENT = 0
"""Number of the covariance of all images, for classes without images."""
POOLED = 1
"""Number of the mean covariance within classes, for classes of one image.

Classes of more images have covariances of their own, with higher numbers.
"""


@dataclasses.dataclass
class ClassDensity(ClosedSet):
    """A method with one Gaussian N_c per class.

    The images are centred and projected on their principal components.
    """

    cost: ClassVar[str] = "fit: four passes, a covariance a class; score: K x 128^2 a row"
    _forms: ClassVar[str] = (
        "centre:dD projection:dDR means:dKR whiteners:dGRR log_dets:dG groups:iK<G classes:fKD"
    )

    def _densities(
        self,
        train: Rows,
        most: int,
        ridge: float,
        blocks: Blocks = image_blocks,
        floor: float = FLOOR,
    ) -> dict[str, Tensor]:
        """The Gaussians in at most ``most`` components, with a ridge on every diagonal."""
        label = labels(train)
        means, count = class_means(train, label, train.source.n_candidates, blocks)
        centre, projection, variance = principal_components(train, most, blocks)
        scatters, groups = class_scatters(train, label, means, count, projection, blocks)
        identity = torch.eye(len(variance), dtype=torch.float64)
        n_classes_seen = int((count > 0).sum())
        pooled = scatters.sum(dim=0) / max(len(label) - n_classes_seen, 1)
        if float(pooled.trace()) <= NO_SPREAD:
            pooled = identity * variance.mean()
        own = scatters / (count[groups > POOLED] - 1)[:, None, None]
        covariances = torch.stack([variance.diag(), pooled, *own])
        mean_variances = covariances.diagonal(dim1=1, dim2=2).mean(dim=1)
        ridge = max(ridge, LEAST * float(mean_variances.amax()))
        covariances += ridge * identity
        return {
            "centre": centre,
            "projection": projection,
            "means": (means - centre) @ projection,
            "whiteners": torch.stack([whitener(covariance, floor) for covariance in covariances]),
            "log_dets": torch.linalg.slogdet(covariances).logabsdet,
            "groups": groups,
            CLASSES: class_texts(train),
        }

    def _log_odds(self, batch: Batch, image: Tensor) -> Tensor:
        """(B,) float64 log sum_{c != a} N_c - log N_a of the images (B, D), a the answer."""
        answer = batch.prediction.to(image.device)[:, None]
        density, is_seen = self._densities_of(batch, image)
        of_answer = density.gather(1, answer).squeeze(1)
        # A class without images has the density of all images. Counted as a rival, it would win for
        # every image that is a little unlike its class.
        of_seen = density.masked_fill(~is_seen, -math.inf)
        of_rivals = of_seen.scatter(1, answer, -math.inf).logsumexp(dim=1)
        has_no_rival = of_rivals == -math.inf  # minus infinity is no score that can be ordered
        return of_rivals.masked_fill(has_no_rival, 0.0) - of_answer

    def _densities_of(self, batch: Batch, image: Tensor) -> tuple[Tensor, Tensor]:
        """(B, K) float64 log N_c up to a constant, and (K,) bool, which classes had images."""
        classes = self.classes_of(batch.text)
        groups = self.tensor("groups", image.device)[classes.to(image.device)]
        return self._log_density(image, classes, groups), groups != ABSENT

    def _log_density(self, image: Tensor, classes: Tensor, groups: Tensor) -> Tensor:
        """(B, K) float64 log N_c up to a constant, class by class of equal covariance."""
        centred = image - self.tensor("centre", image.device)
        z = centred @ self.tensor("projection", image.device)
        means = self.tensor("means", image.device)[classes.to(image.device)]
        whiteners = self.tensor("whiteners", image.device)
        log_dets = self.tensor("log_dets", image.device)
        density = z.new_empty(len(z), len(groups))
        for group in groups.unique().tolist():
            member = groups == group
            # whitened, the Mahalanobis distance is a Euclidean one: one product for all classes
            squares = squared_distances(z @ whiteners[group], means[member] @ whiteners[group])
            density[:, member] = -(squares + log_dets[group]) / 2
        return density


def mean_of_both(batch: Batch, odds: Tensor) -> Tensor:
    """(B,) float64 1 - (p_max + s_d) / 2 from the log-odds (B,) of the density.

    s_d is the share that the answer has of the density.
    """
    return (batch.beside_answer.doubt.to(odds.device) + torch.sigmoid(odds)) / 2


@dataclasses.dataclass
class ClassGaussians(ClassDensity):
    """Zero-shot probability and class-conditional density of the image, averaged.

    With score="log_odds" it is the density's log-odds alone.

    s_d = N_t̂(z) / sum_c N_c(z), with one Gaussian N_c per class, fitted on unit-norm image
    embeddings that are centred and projected on their first principal components: the class mean,
    and the class covariance plus ``ridge``. With score="probability" u = 1 - (p_max + s_d) / 2. s_d
    is often 0 or 1 to many digits; with score="log_odds" u = -log(s_d / (1 - s_d)), computed as log
    sum_{c != t̂} N_c - log N_t̂, which does not saturate (p_max is left out).

    A class of one image takes the mean covariance within classes, or, where no class has two
    different images, the mean variance of a coordinate. A class without images is in no sum; where
    it is the prediction, its density is that of all training images. Where no other class has
    images, log sum = 0.

    Args:
        score: "probability" or "log_odds".
        components: Most principal components; fewer where there are fewer images.
        ridge: Added to the diagonal of every covariance.

    Source: the idea of ICPE (``icpe``), as implemented in sgchr273/TRINE: unit norm and a ridge
    that is not small beside the variances. Differs from it: classes of one image count. Until
    ``icpe`` was the released method this one had its name; what was saved then is read as this.

    Examples:
        >>> import numpy as np, vilu
        >>> image = [[1.0, 0.0], [0.8, 0.6], [0.6, 0.8], [0.0, 1.0]]  # at 0, 37, 53 and 90 degrees
        >>> train = vilu.Embeddings(image, np.eye(2), [0, 1, 1, 1])
        >>> new = vilu.Embeddings([[0.96, 0.28], [0.8, 0.6]], np.eye(2))  # at 16 and 37 degrees
        >>> vilu.PREDICTORS["class_gaussians"]().fit(train).predict_uncertainty(new).round(3)
        array([0.017, 0.5  ])
    """

    name: ClassVar[str] = "class_gaussians"
    summary: ClassVar[str] = (
        "zero-shot probability averaged with the density of the predicted class, regularised"
    )
    reference: ClassVar[str] = "after ICPE, WACV 2026"

    score: Literal["probability", "log_odds"] = "probability"
    components: Count = 128
    ridge: Ridge = 1e-4

    def _learn(
        self,
        train: Rows,
        failure: Tensor,  # noqa: ARG002
        validation: EmbeddingSource | None,  # noqa: ARG002
    ) -> Learnt:
        return Learnt(self._densities(train, self.components, self.ridge))

    def log_posterior(self, batch: Batch) -> Tensor:
        """(B, K) float64 log q_c, q_c = (p_c + s_c) / 2; with score="log_odds" q_c = s_c.

        s_c is the share that class c has of the density; a class without training images has none.
        """
        density, is_seen = self._densities_of(batch, float64(batch.image))
        log_share = density.masked_fill(~is_seen, -math.inf).log_softmax(dim=-1)
        if self.score == "log_odds":
            return log_share
        log_p = zero_shot_log_posterior(batch).to(log_share.device)
        return torch.logaddexp(log_p, log_share) - math.log(2)

    def _score(self, batch: Batch) -> Tensor:
        odds = self._log_odds(batch, float64(batch.image))
        return odds if self.score == "log_odds" else mean_of_both(batch, odds)


def class_scatters(
    train: Rows, label: Tensor, means: Tensor, count: Tensor, basis: Tensor, blocks: Blocks
) -> tuple[Tensor, Tensor]:
    """Projected scatters (G, R, R), and the number (K,) of the covariance of every class.

    There is a scatter for each class of two images or more.
    """
    several = (count > 1).nonzero().squeeze(1)
    groups = torch.where(count > 0, POOLED, ABSENT)
    groups[several] = torch.arange(len(several)) + POOLED + 1
    members = label.argsort(stable=True).split(count.tolist())
    scatters = basis.new_zeros(len(several), basis.shape[1], basis.shape[1])
    for total, c in zip(scatters, several.tolist(), strict=True):
        rows_of_class = dataclasses.replace(train, index=train.index[members[c]])
        for _, image in blocks(rows_of_class):
            projected = (image.double() - means[c]) @ basis
            total.add_(projected.T @ projected)
    return scatters, groups


def squared_distances(whitened: Tensor, means: Tensor) -> Tensor:
    """(B, K) squared Euclidean distances of whitened queries (B, D) and whitened means (K, D)."""
    squares = whitened.square().sum(dim=1)[:, None] + means.square().sum(dim=1)
    # |a|^2 + |b|^2 - 2 a.b of near points is rounding, which may be below zero
    return (squares - 2 * whitened @ means.T).clamp(min=0)


def principal_components(train: Rows, most: int, blocks: Blocks) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (D,), the first components (D, R) and their variances (R,).

    There are at most as many as images less one, and at least one.
    """
    one_class = torch.zeros_like(train.index)
    mean, _ = class_means(train, one_class, 1, blocks)
    matrix, _ = scatter(train, one_class, mean, blocks)
    n = len(one_class)
    rank = max(min(most, len(matrix), n - 1), 1)
    rising_variances, rising_components = torch.linalg.eigh(matrix / max(n - 1, 1))
    components = rising_components.flip(1)[:, :rank].contiguous()
    variances = rising_variances.flip(0)[:rank].clamp(min=0).contiguous()
    return mean[0], components, variances
