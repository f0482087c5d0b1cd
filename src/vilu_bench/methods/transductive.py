"""Baselines that adapt the zero-shot posterior to images without labels.

Shapes: N images to learn from, B rows to score, K classes, D embedding width.

In the papers both methods are transductive: a method learns from the images that it judges. Here
the methods are fitted like all methods, and may also judge new images. For transduction, fit a
method on the images to judge, without labels.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from vilu.embeddings.rows import SCORING_BATCH, Rows
from vilu.embeddings.similarity import float64
from vilu.embeddings.source import Batch, EmbeddingSource
from vilu.predictors.bank.closed_set import ClosedSet
from vilu.predictors.bank.search import Count, draw_rows, read_images
from vilu.predictors.contract.labelled import class_texts, failure_log_odds
from vilu.predictors.contract.predictor import CLASSES, Learnt


@dataclasses.dataclass
class AdaptedToImages(ClosedSet):
    """A method with a posterior q learned from images without labels.

    u = 1 - q_t̂ for the answer t̂.
    """

    is_probability: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False
    no_captions: ClassVar[str | None] = (
        "it learns which classes occur, and captions have no classes"
    )

    max_bank: Count = 20_000

    def _score(self, batch: Batch) -> Tensor:
        log_p = self.log_posterior(batch)
        log_odds = failure_log_odds(log_p, batch)
        return torch.sigmoid(log_odds)

    def _rows_to_learn_from(self, train: Rows) -> Rows:
        """Choose the rows to learn from."""
        rows, _ = draw_rows(train, self.max_bank, self.seed)
        return rows


def zero_shot_logits(rows: Rows) -> Tensor:
    """Compute the rows' zero-shot logits (N, K) float64."""
    batches = rows.batches(SCORING_BATCH)
    return torch.cat([float64(batch.logits) for batch in batches])


@dataclasses.dataclass
class OTTER(AdaptedToImages):
    """OTTER: the posterior is changed to make all classes equally frequent.

    u = 1 - q_t̂ for the answer t̂, with q = softmax(l + v). l are the zero-shot logits. The offsets
    v (K,) are chosen so that every class has the mean q of 1/K over the N images.

    Let p be the zero-shot posterior. Then this is optimal transport between images and classes,
    with the cost -log p and an entropy term of weight 1. v are the dual potentials for the classes.
    New images use the same v.

    Args:
        passes: Maximum number of passes in Sinkhorn's algorithm.
        max_bank: Maximum number of images to learn from. If there are more, ``seed`` draws a
            sample.

    Source: Shin et al., "OTTER: Effortless Label Distribution Adaptation of Zero-shot Models",
    NeurIPS 2024. The original solves the transport without an entropy term (``ot.emd``), and so
    gives answers without probabilities. As the entropy term's weight goes to 0, this method
    approaches the original. The original gets the true class frequencies, or estimates the
    frequencies from labels. Here no label is used, so equal frequencies are assumed. If some
    classes do not occur, this makes the posterior worse.

    Examples:
        >>> import numpy as np, vilu
        >>> text = np.eye(2)
        >>> angle = np.radians(np.tile([10, 20, 30, 70], 10))  # three of four are answered 0
        >>> image = np.c_[np.cos(angle), np.sin(angle)]
        >>> data = vilu.Embeddings(image, text, logit_scale=5.0)
        >>> vilu.MCM().predict_uncertainty(data)[:4].round(2)
        array([0.02, 0.05, 0.14, 0.05])
        >>> vilu.PREDICTORS["otter"]().fit(data).predict_uncertainty(data)[:4].round(2)
        array([0.13, 0.3 , 0.58, 0.01])
    """

    name: ClassVar[str] = "otter"
    summary: ClassVar[str] = "zero-shot posterior matched to equal class frequencies"
    reference: ClassVar[str] = "Shin et al., NeurIPS 2024"
    cost: ClassVar[str] = "fit: passes over 20,000 rows; score: K sums"
    looks_at: ClassVar[frozenset[str]] = frozenset({"logits"})
    # name, type (f float32, d float64, i int64, ? bool) and sizes for each learned tensor
    _forms: ClassVar[str] = "offset:dK classes:fKD"

    passes: Count = 1_000

    def _learn(
        self,
        train: Rows,
        failure: Tensor,  # noqa: ARG002
        validation: EmbeddingSource | None,  # noqa: ARG002
    ) -> Learnt:
        rows = self._rows_to_learn_from(train)
        logits = zero_shot_logits(rows)
        offset = torch.zeros(logits.shape[1], dtype=torch.float64)
        for _ in range(self.passes):
            mean = (logits + offset).softmax(dim=1).mean(dim=0)
            # Sinkhorn's step: raise the logits of classes with a share below 1/K, and lower the
            # logits of classes with a share above 1/K
            relative_share = (mean * len(mean)).clamp(min=MIN_SHARE)
            step = -relative_share.log()
            offset = offset + step
            if float(step.abs().max()) < MAX_CONVERGED_STEP:
                break
        offset = offset - offset.mean()
        text = class_texts(train)
        return Learnt({"offset": offset, CLASSES: text})

    def log_posterior(self, batch: Batch) -> Tensor:
        """Compute log q (B, K) float64, with equally frequent classes in the fit."""
        logits = float64(batch.logits)
        classes = self.classes_of(batch.text)
        class_of_candidate = classes.to(logits.device)
        offset = self.tensor("offset", logits.device)
        return (logits + offset[class_of_candidate]).log_softmax(dim=1)


MIN_SHARE = 1e-12
"""Smallest product of a class's share and K. With 0, the logarithm would be infinite."""
MAX_CONVERGED_STEP = 1e-6
"""Sinkhorn's algorithm ends after a step with all entries smaller than this number."""


class Gaussians(NamedTuple):
    """StatA's fit: a Gaussian with diagonal covariance per class, and posteriors."""

    mean: Tensor  # (K, D), unit norm
    variance: Tensor  # (K, D)
    posterior: Tensor  # (N, K) posteriors for the images to learn from


@dataclasses.dataclass
class StatA(AdaptedToImages):
    """StatA: one Gaussian per class, with mean and variance kept near the class text.

        u = 1 - q_t̂, with q_c ~ p_c exp(-1/100 sum_d (z_d - m_cd)^2 / s_cd)

    z is the image, t̂ is the answer, and p is the zero-shot posterior. The class means m_c and
    variances s_c are fitted to images without labels (``fit_gaussians``). The factor 1/100 is the
    Gaussian's 1/2, divided by the temperature 50.

    During the fit, each image's posterior is also drawn towards the posteriors of the nearest
    images. For new images, q has no such term.

    Args:
        anchor: Weight of the class text in mean and variance, as a number of images.
        neighbours: Number of nearest images for every image in the fit.
        passes: Number of updates of the Gaussians.
        max_bank: Maximum number of images to learn from. If there are more, ``seed`` draws a
            sample.

    Source: Zanella et al., "Realistic Test-Time Adaptation of Vision-Language Models", CVPR 2025,
    and the released code (MaxZanella/StatA) with the same defaults. One difference: the code
    divides the initial covariance by N anew for each block of 2,500 images. Here the covariance is
    divided once.

    Examples:
        >>> import numpy as np, vilu
        >>> rng = np.random.default_rng(0)
        >>> text = np.eye(8)
        >>> image = text[rng.integers(4, size=400)] + rng.normal(size=(400, 8)) / 4
        >>> image = image / np.linalg.norm(image, axis=1, keepdims=True)
        >>> predictor = vilu.PREDICTORS["stata"]().fit(vilu.Embeddings(image[:200], text))
        >>> predictor.predict_uncertainty(vilu.Embeddings(image[200:], text)).shape
        (200,)
    """

    name: ClassVar[str] = "stata"
    summary: ClassVar[str] = "Gaussians of the classes, fitted to images and anchored at texts"
    reference: ClassVar[str] = "Zanella et al., CVPR 2025"
    cost: ClassVar[str] = "fit: about 66 passes and N x N similarities; score: 2 products with K"
    # name, type (f float32, d float64, i int64, ? bool) and sizes for each learned tensor
    _forms: ClassVar[str] = "mean:dKD variance:dKD classes:fKD"

    anchor: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    neighbours: Count = 3
    passes: Count = 10

    def _learn(
        self,
        train: Rows,
        failure: Tensor,  # noqa: ARG002
        validation: EmbeddingSource | None,  # noqa: ARG002
    ) -> Learnt:
        rows = self._rows_to_learn_from(train)
        text = class_texts(train)
        image = read_images(rows).double()
        logits = zero_shot_logits(rows)
        gaussians = fit_gaussians(
            image=image,
            logits=logits,
            text=text.double(),
            anchor=self.anchor,
            n_neighbours=self.neighbours,
            passes=self.passes,
        )
        return Learnt({"mean": gaussians.mean, "variance": gaussians.variance, CLASSES: text})

    def log_posterior(self, batch: Batch) -> Tensor:
        """Compute the log posterior (B, K) float64 from zero-shot logits and Gaussians."""
        image = float64(batch.image)
        classes = self.classes_of(batch.text)
        class_of_candidate = classes.to(image.device)
        mean = self.tensor("mean", image.device)[class_of_candidate]
        variance = self.tensor("variance", image.device)[class_of_candidate]
        exponents = gaussian_likelihood(image, mean, variance)
        logits = float64(batch.logits) + exponents / TEMPERATURE
        return logits.log_softmax(dim=1)


TEMPERATURE = 50.0
"""Log-likelihoods are divided by this number, as in the code for TransCLIP and StatA."""
INNER_PASSES = 5
"""Number of times that the posteriors are updated before the Gaussians are updated."""
MIN_VARIANCE = 1e-12
"""Smallest variance of a Gaussian. So equal images have a finite likelihood."""


def fit_gaussians(
    image: Tensor, logits: Tensor, text: Tensor, anchor: float, n_neighbours: int, passes: int
) -> Gaussians:
    """Fit StatA's Gaussians to images (N, D) with zero-shot logits (N, K) and texts (K, D).

    t_c is the text for class c, n_c is the number of images whose largest posterior is for class c,
    b_c is n_c / (n_c + anchor), and s_0 is the variance of all images about the class texts. A pass
    updates the images' posteriors, and then each class's mean m_c and variance s_c:

        m_c ~ b_c (mean of the images) + (1 - b_c) t_c
        s_c = b_c (variance of the images about m_c) + (1 - b_c) (s_0 + (t_c - m_c)^2)

    Both averages over the images have the posterior for class c as weights. The mean of the images
    and m_c are scaled to unit norm.
    """
    log_zero_shot = logits.log_softmax(dim=1)
    posterior = log_zero_shot.exp()
    mean = text
    # s_0 is the mean of the classes' variances, weighted by the posterior sums
    class_weight = posterior.sum(dim=0)[:, None]  # (K, 1)
    weighted_variance = variance_about(image, posterior, text) * class_weight
    first_variance = weighted_variance.sum(dim=0) / len(image)  # (D,)
    variance = first_variance.clamp(min=MIN_VARIANCE).expand_as(text)
    affinity = nearest_affinity(image, n_neighbours)
    for pass_number in range(passes + 1):
        exponents = gaussian_likelihood(image, mean, variance)
        for _ in range(INNER_PASSES):
            # images a and b are drawn to each other if a is among the nearest images of b, or b
            # among the nearest images of a
            neighbour_posteriors = affinity.T @ posterior + affinity @ posterior
            # TEMPERATURE cancels below, so the neighbours have the weight 1 / (2 n_neighbours)
            pull = TEMPERATURE / (2 * max(n_neighbours, 1)) * neighbour_posteriors
            posterior = (log_zero_shot + (exponents + pull) / TEMPERATURE).softmax(dim=1)
        if pass_number == passes:
            break  # the last pass only updates the posteriors
        likeliest_class = posterior.argmax(dim=1)
        count = torch.bincount(likeliest_class, minlength=len(text)).double()
        image_weight = (count / (count + anchor))[:, None]  # b_c
        text_weight = 1 - image_weight
        image_mean = normalize(posterior.T @ image, dim=1)
        mean = normalize(image_weight * image_mean + text_weight * text, dim=1)
        image_variance = variance_about(image, posterior, mean)
        text_variance = first_variance + (text - mean).square()
        variance = image_weight * image_variance + text_weight * text_variance
        variance = variance.clamp(min=MIN_VARIANCE)
    return Gaussians(mean, variance, posterior)


def variance_about(image: Tensor, posterior: Tensor, mean: Tensor) -> Tensor:
    """Compute every class's variance (K, D) about ``mean`` (K, D).

    This is (z - mean_c)^2, averaged over the images z (N, D) with the posteriors (N, K) as weights.
    """
    class_weight = posterior.sum(dim=0)
    total_weight = class_weight.clamp(min=1e-300)[:, None]  # a divisor, so never 0
    mean_image = posterior.T @ image / total_weight
    mean_square = posterior.T @ image.square() / total_weight
    # the square is expanded, so that no array (N, K, D) is needed
    variance = mean_square - 2 * mean_image * mean + mean.square()
    return variance.clamp(min=0)


def gaussian_likelihood(image: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Compute the exponents (B, K) of the class Gaussians at images (B, D).

    An exponent is -1/2 sum_d (z_d - m_cd)^2 / s_cd. The square is expanded, so that no array
    (B, K, D) is needed.
    """
    precision = 1 / variance
    image_terms = image.square() @ precision.T - 2 * image @ (mean * precision).T
    mean_term = (mean.square() * precision).sum(dim=1)
    return -(image_terms + mean_term) / 2


def nearest_affinity(image: Tensor, n_neighbours: int) -> Tensor:
    """Make a sparse matrix (N, N) of cosines between each image and the nearest other images.

    Row i has the cosines for image i.
    """
    n = len(image)
    n_neighbours = min(n_neighbours, n - 1)
    rows = torch.arange(n).repeat_interleave(n_neighbours)
    cosines = []
    columns = []
    for start in range(0, n, SCORING_BATCH):
        block = image[start : start + SCORING_BATCH]
        cosine = block @ image.T
        row_in_block = torch.arange(len(block))
        # an image is no neighbour of itself
        own_column = start + row_in_block
        cosine[row_in_block, own_column] = -torch.inf
        top_cosine, top_column = cosine.topk(n_neighbours, dim=1)
        cosines.append(top_cosine.flatten())
        columns.append(top_column.flatten())
    positions = torch.stack([rows, torch.cat(columns)])
    affinity = torch.cat(cosines)
    return torch.sparse_coo_tensor(positions, affinity, (n, n), check_invariants=True)
