"""Gaussians of classes: distances and densities of the predicted one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from vilu.embeddings.rows import SCORING_BATCH, Rows
from vilu.embeddings.similarity import float64
from vilu.embeddings.source import Batch, EmbeddingSource
from vilu.predictors.bank.classes import ClosedSet
from vilu.predictors.bank.search import Count, image_blocks, labels
from vilu.predictors.base import CLASSES, Learnt
from vilu.predictors.bayesvlm import last_layer
from vilu.predictors.labelled import class_texts

Blocks = Callable[[Rows], Iterator[tuple[slice, Tensor]]]
"""Rows -> positions and images (b, D), block by block; ``image_blocks``: those of unit norm."""

NO_SPREAD = 1e-12  # variance of unit vectors up to which they are the same image, up to rounding
FLOOR = 1e-9
"""Added to a covariance before it is inverted, as a share of its mean variance: embeddings may span a subspace only."""
LEAST = 1e-11  # ridge, as a share of the largest mean variance: a smaller one is lost by rounding


def class_means(
    train: Rows, label: Tensor, n_classes: int, blocks: Blocks = image_blocks
) -> tuple[Tensor, Tensor]:
    """Mean (K, D) and number (K,) of the images of each class; where there is none, the mean of all images."""
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
    matrix, fourth = torch.zeros(mean.shape[1], mean.shape[1], dtype=torch.float64), 0.0
    for block, image in blocks(train):
        x = image.double() - mean[label[block]]
        matrix += x.T @ x
        fourth += float(x.square().sum(dim=1).square().sum())
    return matrix, fourth


def shared_covariance(train: Rows, label: Tensor, mean: Tensor) -> Tensor | None:
    """Covariance (D, D) of the images around the mean (K, D) of their class, shrunk; None where there is no spread.

    Ledoit and Wolf's estimate, scaled by M / (M - number of classes with images) for the means that
    were fitted. There is no spread when no class has two different images.
    """
    matrix, fourth = scatter(train, label, mean)
    n, n_means = len(label), len(label.unique())
    if n == n_means or float(matrix.trace()) <= NO_SPREAD * n:
        return None
    return ledoit_wolf(matrix, fourth, n) * (n / (n - n_means))


def spherical_covariance(train: Rows) -> Tensor:
    """The mean variance per coordinate of all images, times the identity; the identity itself where it is zero."""
    everything = torch.zeros_like(train.index)
    mean, _ = class_means(train, everything, 1)
    matrix, _ = scatter(train, everything, mean)
    variance = float(matrix.trace()) / (max(len(everything) - 1, 1) * len(matrix))
    return torch.eye(len(matrix), dtype=torch.float64) * (variance if variance > NO_SPREAD else 1.0)


def ledoit_wolf(matrix: Tensor, fourth: float, n: int) -> Tensor:
    """Covariance (D, D) shrunk towards a multiple of the identity, from sums over n centred rows, of x x^T and |x|^4.

    The sum of all entries of sum_i (x_i^2) (x_i^2)^T is sum_i |x_i|^4, so one pass over the rows is
    enough.

    Source: Ledoit and Wolf, Journal of Multivariate Analysis 2004.
    """
    covariance, d = matrix / n, len(matrix)
    variance = covariance.trace() / d
    squares = covariance.square().sum()
    dispersion = squares - d * variance**2
    error = (fourth / n - squares) / n
    shrinkage = (error / dispersion).clamp(0, 1) if float(dispersion) > 0 else torch.ones(())
    return (1 - shrinkage) * covariance + shrinkage * variance * torch.eye(d, dtype=torch.float64)


def whitener(covariance: Tensor, floor: float = FLOOR) -> Tensor:
    """W (D, D) with |x W|^2 = x^T covariance^-1 x, up to the floor, a share of the mean variance."""
    identity = torch.eye(len(covariance), dtype=covariance.dtype)
    lower = torch.linalg.cholesky(covariance + floor * covariance.diagonal().mean() * identity)
    inverse: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False)
    return inverse.T.contiguous()


def squared_distances(whitened: Tensor, means: Tensor) -> Tensor:
    """(B, K) squared Euclidean distances of whitened queries (B, D) and whitened means (K, D)."""
    squares = whitened.square().sum(dim=1)[:, None] + means.square().sum(dim=1)
    return (squares - 2 * whitened @ means.T).clamp(min=0)


@dataclasses.dataclass
class Mahalanobis(ClosedSet):
    """Squared Mahalanobis distance to the mean of the predicted class, under a covariance that all classes share.

    u = (z - mu_t̂)^T S^-1 (z - mu_t̂) [- (z - mu)^T S_0^-1 (z - mu) with ``relative``], mu and S_0
    being the mean and covariance of all training images. S and S_0 are Ledoit-Wolf estimates, so
    that fewer images than coordinates do. Where no class has two different images there is no S:
    distances are then Euclidean ones, in units of the mean variance of a coordinate. For a class
    without training images mu stands in.

    Args:
        relative: Whether to subtract the distance to all training images, which tells how unusual
            an image is.

    Source: Lee et al., NeurIPS 2018; relative: Ren et al., 2021. There the distance to the nearest
    class; here to the predicted one, whose failure is asked for. The usual plain covariance is
    singular with fewer images than coordinates.

    Examples:
        >>> import numpy as np, vilu
        >>> image = [[1.0, 0.0], [0.8, 0.6], [0.6, 0.8], [0.0, 1.0]]  # at 0, 37, 53 and 90 degrees
        >>> train = vilu.Embeddings(image, np.eye(2), [0, 1, 1, 1])
        >>> new = vilu.Embeddings([[0.96, 0.28], [0.28, 0.96]], np.eye(2))  # at 16 and 74 degrees
        >>> vilu.PREDICTORS["mahalanobis"]().fit(train).predict_uncertainty(new).round(2)
        array([1.14, 0.43])
    """

    name: ClassVar[str] = "mahalanobis"
    summary: ClassVar[str] = "Mahalanobis distance to the predicted class (Lee et al. 2018)"
    reference: ClassVar[str] = "Lee et al., NeurIPS 2018"
    cost: ClassVar[str] = "fit: two passes, D x D; score: D^2 a row"
    _forms: ClassVar[str] = "means:dKD whitener:dDD classes:fKD global_mean:d1D global_whitener:dDD"

    relative: bool = False

    def _learn(self, train: Rows, failure: Tensor, validation: EmbeddingSource | None) -> Learnt:  # noqa: ARG002
        label = labels(train)
        learned = gaussian(train, label, train.source.n_candidates)
        if self.relative:
            mean, everything = gaussian(train, torch.zeros_like(label), 1).values()
            learned |= {"global_mean": mean, "global_whitener": everything}
        return Learnt(learned | {CLASSES: class_texts(train)})

    def tensor_names(self) -> tuple[str, ...]:
        """The global ones only where they are subtracted."""
        return self.tensors if self.relative else self.tensors[:3]

    def _score(self, batch: Batch) -> Tensor:
        image = float64(batch.image)
        means = self.tensor("means", image.device)[self.answer_of(batch).to(image.device)]
        score = ((image - means) @ self.tensor("whitener", image.device)).square().sum(dim=1)
        if self.relative:
            centred = image - self.tensor("global_mean", image.device)
            score = score - (centred @ self.tensor("global_whitener", image.device)).square().sum(
                dim=1
            )
        return score


@dataclasses.dataclass
class RelativeMahalanobis(Mahalanobis):
    """``Mahalanobis`` with ``relative``: how much better all training images explain an image than its class does.

    Examples:
        >>> import numpy as np, vilu
        >>> image = [[1.0, 0.0], [0.8, 0.6], [0.6, 0.8], [0.0, 1.0]]  # at 0, 37, 53 and 90 degrees
        >>> train = vilu.Embeddings(image, np.eye(2), [0, 1, 1, 1])
        >>> new = vilu.Embeddings([[0.96, 0.28], [0.28, 0.96]], np.eye(2))  # at 16 and 74 degrees
        >>> vilu.PREDICTORS["relative_mahalanobis"]().fit(train).predict_uncertainty(new).round(2)
        array([ 0.22, -0.49])
    """

    name: ClassVar[str] = "relative_mahalanobis"
    summary: ClassVar[str] = (
        "Mahalanobis distance to the predicted class less that to all images (Ren et al. 2021)"
    )
    reference: ClassVar[str] = "Ren et al., ICML workshop on uncertainty 2021"

    relative: bool = True


def gaussian(train: Rows, label: Tensor, n_classes: int) -> dict[str, Tensor]:
    """Class means (K, D), and the whitening (D, D) of the covariance around them."""
    means, _ = class_means(train, label, n_classes)
    covariance = shared_covariance(train, label, means)
    return {
        "means": means,
        "whitener": whitener(spherical_covariance(train) if covariance is None else covariance),
    }


Ridge = Annotated[float, Field(gt=0, allow_inf_nan=False)]

ABSENT, POOLED = (
    0,
    1,
)  # covariances that are no class's own: that of all images, and the mean one within classes


@dataclasses.dataclass
class ClassDensity(ClosedSet):
    """A method with one Gaussian N_c per class, of images centred and projected on their principal components."""

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
        """The Gaussians in at most so many components, with a ridge on the diagonal of every covariance."""
        label = labels(train)
        means, count = class_means(train, label, train.source.n_candidates, blocks)
        centre, projection, variance = principal_components(train, most, blocks)
        covariances, groups = class_scatters(train, label, means, count, projection, blocks)
        pooled = covariances.sum(dim=0) / max(len(label) - int((count > 0).sum()), 1)
        if float(pooled.trace()) <= NO_SPREAD:
            pooled = torch.eye(len(variance), dtype=torch.float64) * variance.mean()
        own = covariances / (count[groups > POOLED] - 1)[:, None, None]
        everything = torch.stack([variance.diag(), pooled, *own])
        ridge = max(ridge, LEAST * float(everything.diagonal(dim1=1, dim2=2).mean(dim=1).amax()))
        everything += ridge * torch.eye(len(variance), dtype=torch.float64)
        return {
            "centre": centre,
            "projection": projection,
            "means": (means - centre) @ projection,
            "whiteners": torch.stack([whitener(covariance, floor) for covariance in everything]),
            "log_dets": torch.linalg.slogdet(everything).logabsdet,
            "groups": groups,
            CLASSES: class_texts(train),
        }

    def _log_odds(self, batch: Batch, image: Tensor) -> Tensor:
        """(B,) float64 log sum_{c != t̂} N_c - log N_t̂ of the images (B, D)."""
        classes = self.classes_of(batch.text)
        answer = batch.prediction.to(image.device)[:, None]
        groups = self.tensor("groups", image.device)[classes.to(image.device)]
        density = self._log_density(image, classes, groups)
        mine = density.gather(1, answer).squeeze(1)
        others = (
            density.masked_fill(groups == ABSENT, -math.inf)
            .scatter(1, answer, -math.inf)
            .logsumexp(dim=1)
        )
        return others.masked_fill(others == -math.inf, 0.0) - mine

    def _log_density(self, image: Tensor, classes: Tensor, groups: Tensor) -> Tensor:
        """(B, K) float64 log N_c up to a constant, class by class of equal covariance."""
        z = (image - self.tensor("centre", image.device)) @ self.tensor("projection", image.device)
        means = self.tensor("means", image.device)[classes.to(image.device)]
        whiteners, log_dets = (
            self.tensor(name, image.device) for name in ("whiteners", "log_dets")
        )
        density = z.new_empty(len(z), len(groups))
        for group in groups.unique().tolist():
            member = groups == group
            squares = squared_distances(z @ whiteners[group], means[member] @ whiteners[group])
            density[:, member] = -(squares + log_dets[group]) / 2
        return density


def mean_of_both(batch: Batch, odds: Tensor) -> Tensor:
    """(B,) float64 1 - (p_max + s_d) / 2, s_d the share of the answer's density, from its log-odds (B,)."""
    return (batch.others.doubt.to(odds.device) + torch.sigmoid(odds)) / 2


@dataclasses.dataclass
class ClassGaussians(ClassDensity):
    """Zero-shot probability and class-conditional density of the image, averaged; or the density's log-odds alone.

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

    def _learn(self, train: Rows, failure: Tensor, validation: EmbeddingSource | None) -> Learnt:  # noqa: ARG002
        return Learnt(self._densities(train, self.components, self.ridge))

    def _score(self, batch: Batch) -> Tensor:
        odds = self._log_odds(batch, float64(batch.image))
        return odds if self.score == "log_odds" else mean_of_both(batch, odds)


@dataclasses.dataclass
class ICPE(ClassDensity):
    """ICPE as released: zero-shot probability averaged with the share that the answer's Gaussian has of the density.

    u = 1 - (p_max + softmax_c(log N_c(x))_t̂) / 2, N_c the Gaussian of class c: mean and sample
    covariance (divisor n_c - 1) plus ``ridge`` of the training images of the class, in the first
    principal components of all of them. x is what the image encoder puts out *before* it is brought
    to unit norm, P phi of the columns ``features`` and ``image_projection``. Where the data do not
    carry both, x is the unit-norm embedding: that is another method, and the label of the results
    says so.

    Args:
        features: Use the two columns where the data carry them.
        components: Most principal components; fewer where there are fewer images.
        ridge: Added to the diagonal of every covariance; at least 1e-11 of the largest mean
            variance.

    Source: "ICPE", WACV 2026, and its notebook (zhenxianglin/ICPE): PCA with 128 components, 1e-8,
    float64 densities. Differs from it where it is not defined: with fewer images than components
    there are fewer of these; a class of one image takes the mean covariance within classes; one
    without images is in no sum, and where it is the prediction, its density is that of all training
    images. FPR95 is there at the vertex whose rate is nearest to 0.95 (``vilu.metrics``). With
    fewer images in a class than components the covariance is singular up to 1e-8, so that s_d is 0
    or 1 nearly everywhere: it wants hundreds of images a class.

    Examples:
        >>> import numpy as np, vilu
        >>> image = [[1.0, 0.0], [0.8, 0.6], [0.6, 0.8], [0.0, 1.0]]  # at 0, 37, 53 and 90 degrees
        >>> train = vilu.Embeddings(image, np.eye(2), [0, 1, 1, 1])
        >>> new = vilu.Embeddings([[0.96, 0.28], [0.8, 0.6]], np.eye(2))  # at 16 and 37 degrees
        >>> vilu.PREDICTORS["icpe"]().fit(train).predict_uncertainty(new).round(3)
        array([0.015, 0.5  ])
    """

    name: ClassVar[str] = "icpe"
    summary: ClassVar[str] = (
        "zero-shot probability averaged with the density of the predicted class (ICPE, WACV 2026)"
    )
    reference: ClassVar[str] = "ICPE, WACV 2026"
    optional_columns: ClassVar[tuple[str, ...]] = ("features", "image_projection")
    _forms: ClassVar[str] = f"{ClassDensity._forms} on_features:?"

    features: bool = True
    components: Count = 128
    ridge: Ridge = 1e-8

    @property
    def label(self) -> str:
        """The name, and which embeddings were fitted on, once there is a fit."""
        return (
            self.name if self.columns_to_score or not self.learned_ else f"{self.name} (unit norm)"
        )

    def columns_to_fit(self, train: EmbeddingSource) -> tuple[str, ...]:
        """Both columns, where wanted and there."""
        return (
            self.optional_columns
            if self.features and train.columns.issuperset(self.optional_columns)
            else ()
        )

    @property
    def columns_to_score(self) -> tuple[str, ...]:
        """What the fit used."""
        return self.optional_columns if self.learned_ and bool(self.learned_["on_features"]) else ()

    def _learn(self, train: Rows, failure: Tensor, validation: EmbeddingSource | None) -> Learnt:  # noqa: ARG002
        on_features = set(self.optional_columns) <= set(train.columns)
        found = self._densities(
            train, self.components, self.ridge, encoded if on_features else image_blocks, floor=0.0
        )
        return Learnt(found | {"on_features": torch.tensor(on_features)})

    def _score(self, batch: Batch) -> Tensor:
        image = before_norm(batch) if self.columns_to_score else float64(batch.image)
        return mean_of_both(batch, self._log_odds(batch, image))


def before_norm(batch: Batch) -> Tensor:
    """(B, D) float64 images as the encoder puts them out, before they are brought to unit norm."""
    phi, _ = last_layer(batch, "features", "image_projection", batch.image)
    return float64(phi) @ float64(batch.columns["image_projection"]).T


def encoded(train: Rows) -> Iterator[tuple[slice, Tensor]]:
    """Positions and images (b, D) as ``before_norm``, block by block."""
    start = 0
    for batch in train.batches(SCORING_BATCH):
        yield slice(start, start + len(batch.index)), before_norm(batch).cpu()
        start += len(batch.index)


def principal_components(train: Rows, most: int, blocks: Blocks) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (D,), the first components (D, R) and their variances (R,); as many as there are images less one, or one."""
    everything = torch.zeros_like(train.index)
    mean, _ = class_means(train, everything, 1, blocks)
    matrix, _ = scatter(train, everything, mean, blocks)
    n = len(everything)
    rank = max(min(most, len(matrix), n - 1), 1)
    variance, components = torch.linalg.eigh(matrix / max(n - 1, 1))
    return (
        mean[0],
        components.flip(1)[:, :rank].contiguous(),
        variance.flip(0)[:rank].clamp(min=0).contiguous(),
    )


def class_scatters(
    train: Rows, label: Tensor, means: Tensor, count: Tensor, basis: Tensor, blocks: Blocks
) -> tuple[Tensor, Tensor]:
    """Projected scatter (G, R, R) of each class of two images or more, and the covariance (K,) of every class."""
    several = (count > 1).nonzero().squeeze(1)
    groups = torch.where(count > 0, POOLED, ABSENT)
    groups[several] = torch.arange(len(several)) + POOLED + 1
    members = label.argsort(stable=True).split(count.tolist())
    found = basis.new_zeros(len(several), basis.shape[1], basis.shape[1])
    for total, c in zip(found, several.tolist(), strict=True):
        for _, image in blocks(dataclasses.replace(train, index=train.index[members[c]])):
            projected = (image.double() - means[c]) @ basis
            total.add_(projected.T @ projected)
    return found, groups
