"""One Gaussian per class, and the density of an image under the predicted class."""

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
"""Function of rows that yields blocks: positions (a slice) and images (b, D).

``image_blocks`` is such a function; its images have unit norm.
"""

NO_SPREAD = 1e-12
"""Variance of unit vectors up to which they are taken for the same image."""
FLOOR = 1e-9
"""Added to the diagonal of a covariance before it is inverted, as a share of its mean variance.

A covariance is singular where the embeddings span only a subspace.
"""
MIN_RIDGE = 1e-11
"""Smallest ridge, as a share of the largest mean variance. Rounding would lose a smaller ridge."""


def class_means(
    train: Rows, label: Tensor, n_classes: int, blocks: Blocks = image_blocks
) -> tuple[Tensor, Tensor]:
    """Mean (K, D) and number (K,) of the images of each class.

    A class without images gets the mean of all images.
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
    """Sums over all images of x x^T (D, D) and of |x|^4, where x = image - mean of its class."""
    dim = mean.shape[1]
    matrix = torch.zeros(dim, dim, dtype=torch.float64)
    fourth = 0.0
    for block, image in blocks(train):
        x = image.double() - mean[label[block]]
        matrix += x.T @ x
        fourth += float(x.square().sum(dim=1).square().sum())
    return matrix, fourth


def whitener(covariance: Tensor, floor: float = FLOOR) -> Tensor:
    """Whitening matrix W (D, D) of a covariance: |x W|^2 = x^T covariance^-1 x.

    ``floor`` times the mean variance is added to the diagonal of the covariance first.
    """
    identity = torch.eye(len(covariance), dtype=covariance.dtype)
    raised = covariance + floor * covariance.diagonal().mean() * identity
    lower = torch.linalg.cholesky(raised)
    inverse: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False)
    return inverse.T.contiguous()


Ridge = Annotated[float, Field(gt=0, allow_inf_nan=False)]

ABSENT = 0
"""Index of the covariance of all images. Classes without images use it."""
POOLED = 1
"""Index of the mean covariance within classes. Classes of one image use it.

Every class of two or more images has its own covariance, with a higher index.
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
        max_components: int,
        ridge: float,
        blocks: Blocks = image_blocks,
        floor: float = FLOOR,
    ) -> dict[str, Tensor]:
        """Fit the Gaussians in at most ``max_components`` principal components.

        ``ridge`` is added to the diagonal of every covariance.
        """
        label = labels(train)
        means, count = class_means(train, label, train.source.n_candidates, blocks)
        centre, projection, variance = principal_components(train, max_components, blocks)
        scatters, groups = class_scatters(train, label, means, count, projection, blocks)
        identity = torch.eye(len(variance), dtype=torch.float64)
        n_classes_seen = int((count > 0).sum())
        pooled = scatters.sum(dim=0) / max(len(label) - n_classes_seen, 1)
        if float(pooled.trace()) <= NO_SPREAD:
            pooled = identity * variance.mean()
        per_class = scatters / (count[groups > POOLED] - 1)[:, None, None]
        covariances = torch.stack([variance.diag(), pooled, *per_class])  # in the order of groups
        mean_variances = covariances.diagonal(dim1=1, dim2=2).mean(dim=1)
        ridge = max(ridge, MIN_RIDGE * float(mean_variances.amax()))
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
        """Log-odds (B,) float64 of the images (B, D) that the answer a is wrong.

        log-odds = log sum_{c != a} N_c - log N_a
        """
        answer = batch.prediction.to(image.device)[:, None]
        density, is_seen = self._densities_of(batch, image)
        of_answer = density.gather(1, answer).squeeze(1)
        # Classes without training images are no rivals. Their density is that of all images, so
        # they would win for every image that is slightly unlike its own class.
        of_seen = density.masked_fill(~is_seen, -math.inf)
        of_rivals = of_seen.scatter(1, answer, -math.inf).logsumexp(dim=1)
        # Where no rival has images, log sum_{c != a} N_c is minus infinity. It is replaced by 0,
        # so that the scores of different images still differ.
        has_no_rival = of_rivals == -math.inf
        return of_rivals.masked_fill(has_no_rival, 0.0) - of_answer

    def _densities_of(self, batch: Batch, image: Tensor) -> tuple[Tensor, Tensor]:
        """Log N_c (B, K) float64 up to a constant, and a mask (K,) of classes that had images."""
        classes = self.classes_of(batch.text)
        groups = self.tensor("groups", image.device)[classes.to(image.device)]
        return self._log_density(image, classes, groups), groups != ABSENT

    def _log_density(self, image: Tensor, classes: Tensor, groups: Tensor) -> Tensor:
        """Log N_c (B, K) float64 up to a constant.

        Classes that share a covariance are computed together.
        """
        centred = image - self.tensor("centre", image.device)
        z = centred @ self.tensor("projection", image.device)
        means = self.tensor("means", image.device)[classes.to(image.device)]
        whiteners = self.tensor("whiteners", image.device)
        log_dets = self.tensor("log_dets", image.device)
        density = z.new_empty(len(z), len(groups))
        for group in groups.unique().tolist():
            member = groups == group
            # In whitened coordinates the Mahalanobis distance is the Euclidean distance, so one
            # matrix product gives the distances to all classes of the group.
            squares = squared_distances(z @ whiteners[group], means[member] @ whiteners[group])
            density[:, member] = -(squares + log_dets[group]) / 2
        return density


def mean_of_both(batch: Batch, log_odds: Tensor) -> Tensor:
    """Mean u (B,) float64 of two uncertainties: of the zero-shot posterior and of the density.

    u = ((1 - p) + (1 - s_d)) / 2

    p is the zero-shot probability of the answer. s_d = N_a / sum_c N_c is the answer's share of
    the density, and ``log_odds`` (B,) is log((1 - s_d) / s_d).
    """
    return (batch.beside_answer.doubt.to(log_odds.device) + torch.sigmoid(log_odds)) / 2


@dataclasses.dataclass
class ClassGaussians(ClassDensity):
    """Zero-shot probability and class-conditional density of the image, averaged.

    The share of the predicted class t̂ in the density of an image z is

        s_d = N_t̂(z) / sum_c N_c(z)

    N_c is the Gaussian of class c: the mean of the class, and its covariance plus ``ridge``. The
    Gaussians are fitted on unit-norm image embeddings, which are centred and projected on their
    first principal components. The uncertainty is

        u = 1 - (p_max + s_d) / 2                                   with score="probability"
        u = -log(s_d / (1 - s_d)) = log sum_{c != t̂} N_c - log N_t̂  with score="log_odds"

    s_d is often equal to 0 or 1 up to many digits. The log-odds do not saturate there, but they
    leave p_max out.

    Classes of few images:

    - A class of one image uses the mean covariance within classes. If no class has two different
      images, it uses a diagonal covariance with the mean variance of a coordinate.
    - A class without images is left out of every sum. If it is the prediction, N_t̂ is the
      Gaussian of all training images.
    - If no other class has images, log sum_{c != t̂} N_c is set to 0.

    Args:
        score: "probability" or "log_odds".
        components: Maximum number of principal components. With n training images there are at
            most n - 1.
        ridge: Added to the diagonal of every covariance.

    Source: the idea of ICPE (``icpe``) as implemented in sgchr273/TRINE, with unit-norm embeddings
    and a ridge that is not small compared with the variances. Unlike that implementation,
    ``class_gaussians`` also counts classes of one image.

    Examples:
        >>> import numpy as np, vilu
        >>> image = [[1.0, 0.0], [0.8, 0.6], [0.6, 0.8], [0.0, 1.0]]  # at 0, 37, 53 and 90 degrees
        >>> train = vilu.Embeddings(image, np.eye(2), target=[0, 1, 1, 1])
        >>> new = vilu.Embeddings([[0.96, 0.28], [0.8, 0.6]], np.eye(2))  # at 16 and 37 degrees
        >>> # p_max is 1 for both images. At 16 degrees s_d is 0.97. The image at 37 degrees is
        >>> # a training image of class 1, but the answer is class 0: s_d is 0, so u is 1 / 2.
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
        """Log-posterior log q_c (B, K) float64 of every class c.

            q_c = (p_c + s_c) / 2    with score="probability"
            q_c = s_c                with score="log_odds"

        p_c is the zero-shot probability of class c, and s_c its share of the density. The share of
        a class without training images is 0.
        """
        density, is_seen = self._densities_of(batch, float64(batch.image))
        log_share = density.masked_fill(~is_seen, -math.inf).log_softmax(dim=-1)
        if self.score == "log_odds":
            return log_share
        log_p = zero_shot_log_posterior(batch).to(log_share.device)
        return torch.logaddexp(log_p, log_share) - math.log(2)

    def _score(self, batch: Batch) -> Tensor:
        log_odds = self._log_odds(batch, float64(batch.image))
        return log_odds if self.score == "log_odds" else mean_of_both(batch, log_odds)


def class_scatters(
    train: Rows, label: Tensor, means: Tensor, count: Tensor, basis: Tensor, blocks: Blocks
) -> tuple[Tensor, Tensor]:
    """Scatters (G, R, R) of the projected images, and the covariance index (K,) of every class.

    Each of the G classes of two or more images has one scatter matrix. The index is ``ABSENT`` for
    a class without images and ``POOLED`` for a class of one image.
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
    """Squared distances (B, K) between whitened queries (B, D) and whitened means (K, D)."""
    squares = whitened.square().sum(dim=1)[:, None] + means.square().sum(dim=1)
    # |a|^2 + |b|^2 - 2 a.b may be slightly negative for near points, by rounding
    return (squares - 2 * whitened @ means.T).clamp(min=0)


def principal_components(
    train: Rows, max_components: int, blocks: Blocks
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (D,) of the images, their first R principal components (D, R) and variances (R,).

    R = min(max_components, D, number of images - 1), but at least 1.
    """
    one_class = torch.zeros_like(train.index)
    mean, _ = class_means(train, one_class, 1, blocks)
    matrix, _ = scatter(train, one_class, mean, blocks)
    n = len(one_class)
    rank = max(min(max_components, len(matrix), n - 1), 1)
    # ``eigh`` sorts by ascending variance; the first components have the largest variance
    rising_variances, rising_components = torch.linalg.eigh(matrix / max(n - 1, 1))
    components = rising_components.flip(1)[:, :rank].contiguous()
    variances = rising_variances.flip(0)[:rank].clamp(min=0).contiguous()
    return mean[0], components, variances
