"""Delta methods: distance to rightly answered images, minus distance to wrongly answered images."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from vilu.embeddings.rows import Rows
from vilu.embeddings.similarity import float64
from vilu.embeddings.source import Batch, EmbeddingSource
from vilu.predictors.bank.class_gaussians import class_means, squared_distances, whitener
from vilu.predictors.bank.closed_set import ClosedSet
from vilu.predictors.bank.search import (
    Count,
    class_labels,
    draw_rows,
    nearest_in_bank,
    read_images,
    squared_distance_of_cosine,
)
from vilu.predictors.contract.labelled import Needs, class_texts
from vilu.predictors.contract.predictor import CLASSES, Learnt
from vilu_bench.methods.mahalanobis import fit_gaussian, shared_covariance

MarginWeight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
# end of a message: why a delta method does not work on captions
NO_CAPTIONS = (
    "it compares images answered rightly and wrongly, "
    "and with other captions other images would be answered wrongly"
)


def cosine_margin(batch: Batch) -> Tensor:
    """Compute the gap (B,), float64, between an image's two largest cosines with candidates."""
    top_logits = batch.logits.topk(2, dim=1).values
    two_largest_logits = float64(top_logits)
    largest, second_largest = two_largest_logits.unbind(dim=1)
    # a logit is the scale times the cosine plus a bias, and the bias cancels in the difference
    return (largest - second_largest) / batch.logit_scale


LOG_OFFSET = 1e-6  # added to squared distances before the logarithm, as in the released code


@dataclasses.dataclass
class DeltaKNN(ClosedSet):
    """Delta-KNN: log-distance to images with right answers, minus log-distance to the others.

    u = mean_{i <= k} log(d_i^2 + 1e-6) - mean_{j <= k} log(e_j^2 + 1e-6)
        - margin_weight * (cos_(1) - cos_(2))

    There are two banks: the rightly answered and the wrongly answered training images. d_i are the
    distances to the k nearest images in the right bank, and e_j to the k nearest images in the
    wrong bank. The distances are Euclidean, between unit vectors. cos_(1) and cos_(2) are the two
    largest cosines with the candidates.

    Each bank gives a k-NN density estimate in D dimensions. Without the cosine term, u is 2/D times
    the log-likelihood ratio, wrong over right, up to constants. If a bank has fewer than k images,
    all its images are used. For an empty bank the mean is zero, as for a flat density.

    Args:
        k: Number of neighbours per bank.
        margin_weight: Weight lambda of the gap between the two largest cosines. 0 leaves the gap
            out. The paper chooses lambda so that both terms have a similar magnitude.

    Source: Heng and Soh, ICLR 2026, eq. 6 averaged over k neighbours (k = 25 in the paper). As in
    the released code, the logarithm is of squared distances. This is twice the logarithm in the
    paper. As in the released code, lambda multiplies cosines without the logit scale. So lambda
    does not depend on a model's logit scale.

    Examples:
        >>> import numpy as np, vilu
        >>> image = [[1.0, 0.0], [0.8, 0.6], [0.6, 0.8], [0.0, 1.0]]  # at 0, 37, 53 and 90 degrees
        >>> text = np.eye(2)  # class 0 at 0 degrees, class 1 at 90 degrees
        >>> train = vilu.Embeddings(image, text, target=[0, 1, 1, 1])  # the answer at 37 is wrong
        >>> new = vilu.Embeddings([[0.96, 0.28], [0.28, 0.96]], text)  # at 16 and 74 degrees
        >>> # below zero: a rightly answered image is nearer than the wrongly answered image
        >>> vilu.PREDICTORS["delta_knn"](k=1).fit(train).predict_uncertainty(new).round(2)
        array([-0.47, -1.61])
    """

    name: ClassVar[str] = "delta_knn"
    summary: ClassVar[str] = (
        "nearer to images answered wrongly than to those answered rightly (Heng and Soh 2026)"
    )
    reference: ClassVar[str] = "Heng and Soh, ICLR 2026"
    cost: ClassVar[str] = "fit: copies the images; score: one product with the bank"
    no_captions: ClassVar[str | None] = NO_CAPTIONS
    # name, type (f float32, d float64, i int64, ? bool) and sizes for each learned tensor
    _forms: ClassVar[str] = "bank:fND n_right:i classes:fKD"
    needs: ClassVar[Needs] = "failure"

    max_bank: Count = 100_000
    k: Count = 25
    margin_weight: MarginWeight = 0.0

    def _learn(
        self,
        train: Rows,
        failure: Tensor,
        validation: EmbeddingSource | None,  # noqa: ARG002
    ) -> Learnt:
        bank_rows, positions = draw_rows(train, self.max_bank, self.seed)
        bank_failure = failure[positions]
        # failure is 0 for right answers and 1 for wrong answers
        right_first_order = bank_failure.argsort(stable=True)
        sorted_rows = dataclasses.replace(bank_rows, index=bank_rows.index[right_first_order])
        bank = read_images(sorted_rows)
        n_right = (bank_failure == 0).sum()
        text = class_texts(train)
        tensors = {"bank": bank, "n_right": n_right, CLASSES: text}
        return Learnt(tensors, {"n_bank": len(bank)})

    def _score(self, batch: Batch) -> Tensor:
        # this call raises an error for an unknown class: with other classes, other training images
        # would be answered wrongly
        self.classes_of(batch.text)
        bank = self.learned_["bank"]
        n_right = int(self.learned_["n_right"])
        log_distance_to_right = self._mean_log_distance(batch.image, bank[:n_right])
        log_distance_to_wrong = self._mean_log_distance(batch.image, bank[n_right:])
        difference = log_distance_to_right - log_distance_to_wrong
        return difference - self.margin_weight * cosine_margin(batch)

    def _mean_log_distance(self, image: Tensor, bank: Tensor) -> Tensor:
        """Average the log squared distances (B,), float64, to the bank's k nearest images.

        Return zeros if the bank is empty.
        """
        if not len(bank):
            zeros = image.new_zeros(len(image))
            return float64(zeros)
        similarity, _ = nearest_in_bank(image, bank, self.k)
        cosine = float64(similarity)
        squares = squared_distance_of_cosine(cosine)
        log_squares = torch.log(squares + LOG_OFFSET)
        return log_squares.mean(dim=1)


@dataclasses.dataclass
class DeltaKNNMargin(DeltaKNN):
    """``DeltaKNN`` with the margin term, which is the paper's Delta-KNN-RLog.

    lambda = 10 is the paper's value for CLIP (table 6).

    Examples:
        >>> import numpy as np, vilu
        >>> image = [[1.0, 0.0], [0.8, 0.6], [0.6, 0.8], [0.0, 1.0]]  # at 0, 37, 53 and 90 degrees
        >>> text = np.eye(2)  # class 0 at 0 degrees, class 1 at 90 degrees
        >>> train = vilu.Embeddings(image, text, target=[0, 1, 1, 1])  # the answer at 37 is wrong
        >>> new = vilu.Embeddings([[0.96, 0.28], [0.28, 0.96]], text)  # at 16 and 74 degrees
        >>> # the scores of delta_knn, minus 10 times the cosine gap 0.96 - 0.28
        >>> vilu.PREDICTORS["delta_knn_margin"](k=1).fit(train).predict_uncertainty(new).round(2)
        array([-7.27, -8.41])
    """

    name: ClassVar[str] = "delta_knn_margin"
    summary: ClassVar[str] = (
        "delta_knn plus the margin of the two largest cosines (Heng and Soh 2026)"
    )

    margin_weight: MarginWeight = 10.0


@dataclasses.dataclass
class DeltaMDS(ClosedSet):
    """Delta-MDS: distance to rightly answered images, minus distance to wrongly answered images.

    The distances are squared Mahalanobis distances.

    u = min_c (z - m_c)^T R^-1 (z - m_c) - min_c (z - n_c)^T W^-1 (z - n_c)
        - margin_weight * (cos_(1) - cos_(2))

    There are two banks: the rightly answered and the wrongly answered training images. For the
    rightly answered images, m_c is the mean in class c, and R is the covariance around these means.
    For the wrongly answered images, these are n_c and W. Each minimum is over the candidates that
    have images in the bank. Without such a candidate the term is zero. cos_(1) and cos_(2) are the
    two largest cosines with the candidates.

    If no class in a bank has two different images, the bank uses the covariance within classes over
    all training images. If no class has two different training images at all, the covariance is
    the mean variance of a coordinate times the identity.

    Args:
        margin_weight: Weight lambda of the gap between the two largest cosines. 0 leaves the gap
            out. The paper chooses lambda so that both terms have a similar magnitude. The distances
            grow with D, and are larger with less shrinkage.

    Source: Heng and Soh, ICLR 2026, eq. 5. There are two differences from the released code. Here
    embeddings have unit norm. Covariances are Ledoit-Wolf estimates, because plain covariances from
    few images are singular. As in the released code, lambda multiplies cosines without the logit
    scale. So lambda does not depend on a model's logit scale.

    Examples:
        >>> import numpy as np, vilu
        >>> image = [[1.0, 0.0], [0.8, 0.6], [0.6, 0.8], [0.0, 1.0]]  # at 0, 37, 53 and 90 degrees
        >>> text = np.eye(2)  # class 0 at 0 degrees, class 1 at 90 degrees
        >>> train = vilu.Embeddings(image, text, target=[0, 1, 1, 1])  # the answer at 37 is wrong
        >>> new = vilu.Embeddings([[0.96, 0.28], [0.28, 0.96]], text)  # at 16 and 74 degrees
        >>> # above zero: the wrongly answered image is nearer than the rightly answered images
        >>> vilu.PREDICTORS["delta_mds"]().fit(train).predict_uncertainty(new).round(2)
        array([ 0.65, -2.59])
    """

    name: ClassVar[str] = "delta_mds"
    summary: ClassVar[str] = (
        "Mahalanobis distance to rightly answered images less that to others (Heng and Soh 2026)"
    )
    reference: ClassVar[str] = "Heng and Soh, ICLR 2026"
    cost: ClassVar[str] = "fit: two passes, D x D; score: 2 D (D + K) per row"
    no_captions: ClassVar[str | None] = NO_CAPTIONS
    # name, type (f float32, d float64, i int64, ? bool) and sizes for each learned tensor
    _forms: ClassVar[str] = (
        "right_means:dKD right_counts:iK right_whitener:dDD "
        "wrong_means:dKD wrong_counts:iK wrong_whitener:dDD classes:fKD"
    )

    margin_weight: MarginWeight = 0.0

    def _learn(
        self,
        train: Rows,
        failure: Tensor,
        validation: EmbeddingSource | None,  # noqa: ARG002
    ) -> Learnt:
        label = class_labels(train)
        right_tensors = self._fit_bank("right", train, label, failure == 0)
        wrong_tensors = self._fit_bank("wrong", train, label, failure == 1)
        text = class_texts(train)
        return Learnt(right_tensors | wrong_tensors | {CLASSES: text})

    def _fit_bank(
        self, bank_name: str, train: Rows, label: Tensor, is_member: Tensor
    ) -> dict[str, Tensor]:
        """Compute a bank's whitened class means, image counts per class, and whitening matrix.

        ``is_member`` (N,) is true for the training images in the bank. The tensors' names begin
        with ``bank_name``, which is "right" or "wrong".
        """
        n_classes = train.source.n_candidates
        members = dataclasses.replace(train, index=train.index[is_member])
        member_label = label[is_member]
        means, counts = class_means(members, member_label, n_classes)
        covariance = shared_covariance(members, member_label, means)
        if covariance is None:  # no class in the bank has two different images
            whitening = fit_gaussian(train, label, n_classes)["whitener"]
        else:
            whitening = whitener(covariance)
        return {
            f"{bank_name}_means": means @ whitening,
            f"{bank_name}_counts": counts,
            f"{bank_name}_whitener": whitening,
        }

    def _score(self, batch: Batch) -> Tensor:
        image = float64(batch.image)
        classes = self.classes_of(batch.text)
        class_of_candidate = classes.to(image.device)
        distance_to_right = self._distance(image, class_of_candidate, "right")
        distance_to_wrong = self._distance(image, class_of_candidate, "wrong")
        difference = distance_to_right - distance_to_wrong
        return difference - self.margin_weight * cosine_margin(batch)

    def _distance(self, image: Tensor, class_of_candidate: Tensor, bank_name: str) -> Tensor:
        """Compute squared distances (B,) to the nearest candidate's class mean in a bank.

        If no candidate has images in the bank, the distances are zero.
        """
        means = self.tensor(f"{bank_name}_means", image.device)[class_of_candidate]
        counts = self.tensor(f"{bank_name}_counts", image.device)[class_of_candidate]
        whitened = image @ self.tensor(f"{bank_name}_whitener", image.device)
        squares = squared_distances(whitened, means)
        has_no_images = counts == 0  # (K,)
        smallest = squares.masked_fill(has_no_images, math.inf).amin(dim=1)
        is_bank_empty = smallest == math.inf
        return torch.where(is_bank_empty, 0.0, smallest)


@dataclasses.dataclass
class DeltaMDSMargin(DeltaMDS):
    """``DeltaMDS`` with the margin term, which is the paper's Delta-MDS-RLog.

    lambda = 10,000 is the paper's value for CLIP (table 6).

    Examples:
        >>> import numpy as np, vilu
        >>> image = [[1.0, 0.0], [0.8, 0.6], [0.6, 0.8], [0.0, 1.0]]  # at 0, 37, 53 and 90 degrees
        >>> text = np.eye(2)  # class 0 at 0 degrees, class 1 at 90 degrees
        >>> train = vilu.Embeddings(image, text, target=[0, 1, 1, 1])  # the answer at 37 is wrong
        >>> new = vilu.Embeddings([[0.96, 0.28], [0.28, 0.96]], text)  # at 16 and 74 degrees
        >>> method = vilu.PREDICTORS["delta_mds_margin"](margin_weight=10.0)
        >>> # the scores of delta_mds, minus 10 times the cosine gap 0.96 - 0.28
        >>> method.fit(train).predict_uncertainty(new).round(2)
        array([-6.15, -9.39])
    """

    name: ClassVar[str] = "delta_mds_margin"
    summary: ClassVar[str] = (
        "delta_mds plus the margin of the two largest cosines (Heng and Soh 2026)"
    )

    margin_weight: MarginWeight = 10_000.0
