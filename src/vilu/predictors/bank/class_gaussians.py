"""Methods that fit a Gaussian to every class, and score an image by the answer's class density."""

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
from vilu.predictors.bank.search import Count, class_labels, image_blocks
from vilu.predictors.contract.labelled import class_texts
from vilu.predictors.contract.predictor import CLASSES, Learnt

BlockReader = Callable[[Rows], Iterator[tuple[slice, Tensor]]]
"""Function that reads rows in blocks: it yields a block's positions (a slice) and images (b, D).

``image_blocks`` is such a function, with images of unit norm.
"""

NEGLIGIBLE_VARIANCE = 1e-12
"""Unit vectors count as equal if their variance is at most this number."""
RELATIVE_RIDGE = 1e-9
"""``whitener`` adds the mean variance times this number to a covariance's diagonal.

Without this addition, a covariance could not be inverted if the embeddings span only a subspace.
"""
MIN_RIDGE = 1e-11
"""The ridge is at least this share of the largest of the covariances' mean variances.

A smaller ridge would be lost in rounding.
"""


def class_means(
    train: Rows, label: Tensor, n_classes: int, read_blocks: BlockReader = image_blocks
) -> tuple[Tensor, Tensor]:
    """Compute mean (K, D) and image count (K,) for each class, from class labels (M,).

    If a class has no images, the mean of all images replaces the class mean.
    """
    total = torch.zeros(n_classes, train.source.space.embed_dim, dtype=torch.float64)
    for block, image in read_blocks(train):
        total.index_add_(0, label[block], image.double())
    count = torch.bincount(label, minlength=n_classes)
    count_column = count.clamp(min=1)[:, None]
    mean = total / count_column
    mean_of_all = total.sum(dim=0) / max(len(label), 1)
    mean[count == 0] = mean_of_all
    return mean, count


def scatter_within_classes(
    train: Rows, label: Tensor, mean: Tensor, read_blocks: BlockReader = image_blocks
) -> tuple[Tensor, float]:
    """Sum x x^T (D, D) and |x|^4 over all images, where x = image - class mean.

    ``label`` (M,) are the image classes, and ``mean`` (K, D) are the class means.
    """
    dim = mean.shape[1]
    scatter = torch.zeros(dim, dim, dtype=torch.float64)
    fourth_power_sum = 0.0
    for block, image in read_blocks(train):
        x = image.double() - mean[label[block]]
        scatter += x.T @ x
        squared_norms = x.square().sum(dim=1)
        fourth_powers = squared_norms.square()
        fourth_power_sum += float(fourth_powers.sum())
    return scatter, fourth_power_sum


def whitener(covariance: Tensor, relative_ridge: float = RELATIVE_RIDGE) -> Tensor:
    """Compute the whitening matrix W (D, D) of a covariance: |x W|^2 = x^T covariance^-1 x.

    First ``relative_ridge`` times the mean variance is added to the covariance's diagonal.
    """
    identity = torch.eye(len(covariance), dtype=covariance.dtype)
    variances = covariance.diagonal()
    ridge = relative_ridge * variances.mean()
    raised_covariance = covariance + ridge * identity
    lower_triangle = torch.linalg.cholesky(raised_covariance)
    inverse: Tensor = torch.linalg.solve_triangular(lower_triangle, identity, upper=False)
    return inverse.T.contiguous()


Ridge = Annotated[float, Field(gt=0, allow_inf_nan=False)]

# There are several covariances, and every class uses one. The index of this covariance is the
# class's group.
ABSENT_GROUP = 0
"""Covariance index for classes without images. The covariance is over all images."""
POOLED_GROUP = 1
"""Index of the mean covariance within classes, for classes with one image.

Every class with two or more images has a separate covariance, with a higher index.
"""


@dataclasses.dataclass
class ClassDensity(ClosedSet):
    """A method with a Gaussian N_c for every class c.

    The Gaussians are in the space spanned by the centred images' first principal components.
    """

    cost: ClassVar[str] = "fit: four passes, one covariance per class; score: K x 128^2 per row"
    # types and sizes of the tensors, for R principal components and G covariances. For example,
    # "centre:dD" is a float64 tensor (D,). ``require_forms`` explains the notation.
    _forms: ClassVar[str] = (
        "centre:dD projection:dDR means:dKR whiteners:dGRR log_dets:dG groups:iK<G classes:fKD"
    )

    def _fit_densities(
        self,
        train: Rows,
        max_components: int,
        ridge: float,
        read_blocks: BlockReader = image_blocks,
        relative_ridge: float = RELATIVE_RIDGE,
    ) -> dict[str, Tensor]:
        """Fit the Gaussians in at most ``max_components`` principal components.

        Return the learned tensors by name. ``ridge`` is added to every covariance's diagonal.
        ``relative_ridge`` is as in ``whitener``.
        """
        label = class_labels(train)
        means, count = class_means(train, label, train.source.n_candidates, read_blocks)
        centre, projection, variance = principal_components(train, max_components, read_blocks)
        scatters, groups = class_scatters(train, label, means, count, projection, read_blocks)
        identity = torch.eye(len(variance), dtype=torch.float64)
        covariance_of_all = variance.diag()
        pooled_covariance = _covariance_within_classes(scatters, count, variance)
        has_own_covariance = groups > POOLED_GROUP
        degrees_of_freedom = count[has_own_covariance] - 1
        own_covariances = scatters / degrees_of_freedom[:, None, None]
        # in index order: ABSENT_GROUP, POOLED_GROUP, and then single classes
        covariances = torch.stack([covariance_of_all, pooled_covariance, *own_covariances])
        variances = covariances.diagonal(dim1=1, dim2=2)
        mean_variances = variances.mean(dim=1)
        ridge = max(ridge, MIN_RIDGE * float(mean_variances.amax()))
        covariances += ridge * identity
        whiteners = [whitener(covariance, relative_ridge) for covariance in covariances]
        return {
            "centre": centre,
            "projection": projection,
            "means": (means - centre) @ projection,
            "whiteners": torch.stack(whiteners),
            "log_dets": torch.linalg.slogdet(covariances).logabsdet,
            "groups": groups,
            CLASSES: class_texts(train),
        }

    def _log_odds(self, batch: Batch, image: Tensor) -> Tensor:
        """Compute the log-odds (B,) float64 that the answer a is wrong, for images (B, D).

        log-odds = log sum_{c != a} N_c - log N_a

        The sum is over classes with training images.
        """
        answer_column = batch.prediction.to(image.device)[:, None]
        log_density, is_seen = self._log_densities(batch, image)
        answer_log_density_column = log_density.gather(1, answer_column)
        answer_log_density = answer_log_density_column.squeeze(1)
        # Only classes with training images count. A class without training images has the density
        # of all images. This density would be the largest for every image that differs slightly
        # from its true class.
        log_density_of_seen = log_density.masked_fill(~is_seen, -math.inf)
        # the answer itself does not count
        log_density_of_rivals = log_density_of_seen.scatter(1, answer_column, -math.inf)
        log_sum_of_rivals = log_density_of_rivals.logsumexp(dim=1)
        # If no rival has images, log sum_{c != a} N_c is minus infinity. This value is replaced by
        # 0, and so the scores of different images still differ.
        has_no_rival = log_sum_of_rivals == -math.inf
        return log_sum_of_rivals.masked_fill(has_no_rival, 0.0) - answer_log_density

    def _log_densities(self, batch: Batch, image: Tensor) -> tuple[Tensor, Tensor]:
        """Compute log N_c (B, K) float64 up to a constant, and a mask (K,) of the classes.

        The mask is true for classes with training images.
        """
        classes = self.classes_of(batch.text)
        groups = self.tensor("groups", image.device)[classes.to(image.device)]
        return self._log_densities_of(image, classes, groups), groups != ABSENT_GROUP

    def _log_densities_of(self, image: Tensor, classes: Tensor, groups: Tensor) -> Tensor:
        """Compute log N_c (B, K) float64 up to a constant, for classes (K,) in groups (K,).

        Classes with the same covariance are computed together.
        """
        centred = image - self.tensor("centre", image.device)
        z = centred @ self.tensor("projection", image.device)
        means = self.tensor("means", image.device)[classes.to(image.device)]
        whiteners = self.tensor("whiteners", image.device)
        log_dets = self.tensor("log_dets", image.device)
        log_density = z.new_empty(len(z), len(groups))
        distinct_groups = groups.unique()
        for group in distinct_groups.tolist():
            is_in_group = groups == group
            whitener_of_group = whiteners[group]
            # In whitened coordinates the Mahalanobis distance is the Euclidean distance. A single
            # matrix product then gives the distances to all classes in the group.
            squares = squared_distances(
                z @ whitener_of_group, means[is_in_group] @ whitener_of_group
            )
            log_density[:, is_in_group] = -(squares + log_dets[group]) / 2
        return log_density


def _covariance_within_classes(scatters: Tensor, count: Tensor, variance: Tensor) -> Tensor:
    """Compute the mean covariance (R, R) within classes, from scatters (G, R, R) and counts (K,).

    If no class has two different images, the result is the identity times the mean ``variance``.
    """
    n_images = int(count.sum())
    n_classes_with_images = int((count > 0).sum())
    covariance = scatters.sum(dim=0) / max(n_images - n_classes_with_images, 1)
    if float(covariance.trace()) <= NEGLIGIBLE_VARIANCE:
        identity = torch.eye(len(variance), dtype=torch.float64)
        covariance = identity * variance.mean()
    return covariance


def average_with_zero_shot(batch: Batch, log_odds: Tensor) -> Tensor:
    """Return the mean u (B,) float64 of two uncertainties: zero-shot, and by class densities.

    Let p be the answer's zero-shot probability. Let s_d be the answer's class density, divided by
    the sum of all class densities. Then

        u = ((1 - p) + (1 - s_d)) / 2

    ``log_odds`` (B,) is log((1 - s_d) / s_d).
    """
    doubt_of_zero_shot = batch.judged_rivals.total_probability.to(log_odds.device)
    doubt_of_density = torch.sigmoid(log_odds)
    return (doubt_of_zero_shot + doubt_of_density) / 2


@dataclasses.dataclass
class ClassGaussians(ClassDensity):
    """Average of two probabilities: zero-shot, and the answer's share in the class densities.

    For an image z, the predicted class t̂ has the share

        s_d = N_t̂(z) / sum_c N_c(z)

    N_c is a Gaussian with the mean and covariance of class c, where ``ridge`` is added to the
    covariance's diagonal. The Gaussians are fitted on unit-norm image embeddings, centred and
    projected on the first principal components. p is the answer's zero-shot probability. The
    uncertainty is

        u = 1 - (p + s_d) / 2                                       with score="probability"
        u = -log(s_d / (1 - s_d)) = log sum_{c != t̂} N_c - log N_t̂  with score="log_odds"

    s_d is often 0 or 1 up to many digits. The log-odds do not saturate there, but do not depend on
    p.

    Classes with few images:

    - A class with one image uses the mean covariance within classes. If no class has two different
      images, this covariance is the identity times the mean variance per coordinate.
    - A class without images is left out from every sum. If such a class is the prediction, N_t̂ has
      the covariance and the mean over all training images.
    - If only the predicted class has images, log sum_{c != t̂} N_c is set to 0.

    Args:
        score: "probability" or "log_odds".
        components: Maximum number of principal components. With n training images there are at
            most n - 1.
        ridge: Number added to every covariance's diagonal.

    Source: the idea behind ICPE (``icpe``) as implemented in sgchr273/TRINE. Here the embeddings
    have unit norm, and the ridge is not small compared with the variances. Unlike TRINE,
    ``class_gaussians`` also uses classes with one image.

    Examples:
        >>> import numpy as np, vilu
        >>> text = np.eye(2)  # class 0 is at 0 degrees, class 1 at 90 degrees
        >>> image = [[1.0, 0.0], [0.8, 0.6], [0.6, 0.8], [0.0, 1.0]]  # at 0, 37, 53 and 90 degrees
        >>> train = vilu.Embeddings(image, text, target=[0, 1, 1, 1])
        >>> new = vilu.Embeddings([[0.96, 0.28], [0.8, 0.6]], text)  # at 16 and 37 degrees
        >>> # Both answers are class 0, with p = 1. But at 37 degrees class 1 has a training image:
        >>> # s_d is 0 there, so u is 1 / 2. At 16 degrees s_d is 0.97.
        >>> vilu.PREDICTORS["class_gaussians"]().fit(train).predict_uncertainty(new).round(3)
        array([0.017, 0.5  ])
    """

    name: ClassVar[str] = "class_gaussians"
    summary: ClassVar[str] = (
        "zero-shot probability averaged with the density of the predicted class, regularised"
    )
    reference: ClassVar[str] = "after ICPE, WACV 2026"
    looks_at: ClassVar[frozenset[str]] = frozenset({"logits", "image"})

    score: Literal["probability", "log_odds"] = "probability"
    components: Count = 128
    ridge: Ridge = 1e-4

    def _learn(
        self,
        train: Rows,
        failure: Tensor,  # noqa: ARG002
        validation: EmbeddingSource | None,  # noqa: ARG002
    ) -> Learnt:
        tensors = self._fit_densities(train, self.components, self.ridge)
        return Learnt(tensors)

    def log_posterior(self, batch: Batch) -> Tensor:
        """Compute the log-posterior log q_c (B, K) float64 of every class c.

            q_c = (p_c + s_c) / 2    with score="probability"
            q_c = s_c                with score="log_odds"

        p_c is the zero-shot probability of class c. s_c is the class's share in the density. If the
        class has no training images, s_c is 0.
        """
        log_density, is_seen = self._log_densities(batch, float64(batch.image))
        log_share = log_density.masked_fill(~is_seen, -math.inf).log_softmax(dim=-1)
        if self.score == "log_odds":
            return log_share
        log_p = zero_shot_log_posterior(batch).to(log_share.device)
        return torch.logaddexp(log_p, log_share) - math.log(2)

    def _score(self, batch: Batch) -> Tensor:
        log_odds = self._log_odds(batch, float64(batch.image))
        if self.score == "log_odds":
            return log_odds
        return average_with_zero_shot(batch, log_odds)


def class_scatters(
    train: Rows,
    label: Tensor,
    means: Tensor,
    count: Tensor,
    basis: Tensor,
    read_blocks: BlockReader,
) -> tuple[Tensor, Tensor]:
    """Compute scatters (G, R, R) of projected images, and every class's covariance index (K,).

    There is a scatter matrix for each class with two or more images, G in total. The index is
    ``ABSENT_GROUP`` for a class without images, and ``POOLED_GROUP`` for a class with one image.

    ``label`` (M,) are the image classes. ``means`` (K, D) and ``count`` (K,) are the results from
    ``class_means``. The images are projected on the columns of ``basis`` (D, R).
    """
    large_classes = (count > 1).nonzero().squeeze(1)
    groups = torch.where(count > 0, POOLED_GROUP, ABSENT_GROUP)
    groups[large_classes] = torch.arange(len(large_classes)) + POOLED_GROUP + 1  # one group each
    # The row positions are sorted by class. Then they are split into one tensor per class.
    positions_of_class = label.argsort(stable=True).split(count.tolist())
    rank = basis.shape[1]
    scatters = basis.new_zeros(len(large_classes), rank, rank)
    for class_scatter, class_index in zip(scatters, large_classes.tolist(), strict=True):
        index_of_rows = train.index[positions_of_class[class_index]]
        rows_of_class = dataclasses.replace(train, index=index_of_rows)
        for _, image in read_blocks(rows_of_class):
            projected_image = (image.double() - means[class_index]) @ basis
            class_scatter.add_(projected_image.T @ projected_image)  # a view of ``scatters``
    return scatters, groups


def squared_distances(queries: Tensor, means: Tensor) -> Tensor:
    """Compute squared distances (B, K) from whitened queries (B, D) to whitened means (K, D)."""
    query_squares = queries.square().sum(dim=1, keepdim=True)
    mean_squares = means.square().sum(dim=1)
    # |a|^2 + |b|^2 - 2 a.b may be slightly negative for near points, because of rounding
    return (query_squares + mean_squares - 2 * queries @ means.T).clamp(min=0)


def principal_components(
    train: Rows, max_components: int, read_blocks: BlockReader
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute mean (D,), first R principal components (D, R) and variances (R,) of the images.

    R = min(max_components, D, number of images - 1), but at least 1.
    """
    one_label = torch.zeros_like(train.index)  # all images are in the same class
    mean, _ = class_means(train, one_label, n_classes=1, read_blocks=read_blocks)
    scatter, _ = scatter_within_classes(train, one_label, mean, read_blocks)
    n = len(one_label)
    rank = max(min(max_components, len(scatter), n - 1), 1)
    # ``eigh`` sorts by ascending variance, but principal components by descending variance
    rising_variances, rising_components = torch.linalg.eigh(scatter / max(n - 1, 1))
    falling_components = rising_components.flip(1)
    falling_variances = rising_variances.flip(0)
    components = falling_components[:, :rank].contiguous()
    variances = falling_variances[:rank].clamp(min=0)
    return mean.squeeze(0), components, variances
