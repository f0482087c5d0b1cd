"""Methods that compare an image with its nearest labelled training images."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from vilu.embeddings.rows import Rows
from vilu.embeddings.source import Batch, EmbeddingSource
from vilu.predictors.bank.closed_set import ClosedSet
from vilu.predictors.bank.search import (
    AllowedPairs,
    Count,
    class_labels,
    distance_of_cosine,
    draw_rows,
    nearest_in_bank,
    read_images,
)
from vilu.predictors.contract.labelled import class_texts
from vilu.predictors.contract.predictor import CLASSES, FailurePredictor, Learnt

MAX_DISTANCE = 2.0  # largest distance between two unit vectors
TINY = 1e-6
"""This number is added to distances, and 1 + cos is at least this number. So no ratio is 0 / 0."""


@dataclasses.dataclass
class LabelledBank(ClosedSet):
    """A method that stores training images (the bank) and the images' classes."""

    cost: ClassVar[str] = "fit: copies the images; score: one product with the bank"
    # name, type (f float32, d float64, i int64, ? bool) and sizes for each learned tensor.
    # iN<K: integers (N,) from 0 to K - 1.
    _forms: ClassVar[str] = "bank:fND classes:fKD labels:iN<K"

    max_bank: Count = 100_000

    def _learn(
        self,
        train: Rows,
        failure: Tensor,  # noqa: ARG002
        validation: EmbeddingSource | None,  # noqa: ARG002
    ) -> Learnt:
        drawn_rows, _ = draw_rows(train, self.max_bank, self.seed)
        drawn_images = read_images(drawn_rows)
        bank, label = self._choose_images(drawn_images, class_labels(drawn_rows))
        text = class_texts(train)
        tensors = {"bank": bank, "labels": label, CLASSES: text}
        return Learnt(tensors, {"n_bank": len(bank)})

    def _choose_images(self, bank: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images in ``bank`` (N, D) to keep, and their classes. By default keep all."""
        return bank, label


@dataclasses.dataclass
class KNNVote(LabelledBank):
    """Share of the k nearest training images outside the predicted class.

    u = 1 - sum_{i <= k, y_i = t̂} w_i / sum_{i <= k} w_i

    Neighbour i is the training image z_i in class y_i, and t̂ is the predicted class. The weight
    w_i is 1 or (1 + cos(z, z_i)) / 2, where 1 + cos is taken as at least 1e-6. If the predicted
    class has no training images, u = 1. If there are fewer than k training images, all of them
    vote.

    With weights of 1, u has only k + 1 possible values, so many images tie. If all training images
    vote with weights of 1, u is the same for all images with the same answer.

    Args:
        k: Number of neighbours.
        weighting: "uniform", or "similarity" for votes weighted by cosine.

    Source: the confidence of a k-nearest-neighbour classifier (Cover and Hart, IEEE Trans. Inf.
    Theory 1967) in the class predicted by the VLM.

    Examples:
        >>> import numpy as np, vilu
        >>> image = [[1.0, 0.0], [0.8, 0.6], [0.6, 0.8], [0.0, 1.0]]  # at 0, 37, 53 and 90 degrees
        >>> text = np.eye(2)  # class 0 at 0 degrees, class 1 at 90 degrees
        >>> train = vilu.Embeddings(image, text, target=[0, 1, 1, 1])  # the answer at 37 is wrong
        >>> new = vilu.Embeddings([[0.96, 0.28], [0.28, 0.96]], text)  # at 16 and 74 degrees
        >>> # for answer 0 one of two neighbours has another class, for answer 1 neither
        >>> vilu.PREDICTORS["knn_vote"](k=2).fit(train).predict_uncertainty(new).round(2)
        array([0.5, 0. ])
    """

    name: ClassVar[str] = "knn_vote"
    summary: ClassVar[str] = "share of the nearest training images not of the predicted class"
    reference: ClassVar[str] = "Cover and Hart, IEEE Trans. Inf. Theory 1967"
    looks_at: ClassVar[frozenset[str]] = frozenset({"logits", "image"})

    k: Count = 20
    weighting: Literal["uniform", "similarity"] = "uniform"

    def _score(self, batch: Batch) -> Tensor:
        similarity, index = nearest_in_bank(batch.image, self.learned_["bank"], self.k)
        label = self.tensor("labels", index.device)[index]  # (B, k) the neighbours' classes
        is_other_class = label != self.answer_of(batch)[:, None]
        weight = torch.ones_like(similarity)
        if self.weighting == "similarity":
            weight = (1 + similarity).clamp(min=TINY) / 2
        weight_of_others = (weight * is_other_class).sum(dim=1)
        return weight_of_others / weight.sum(dim=1)


@dataclasses.dataclass
class KNNDistance(FailurePredictor):
    """Distance to the k-th nearest training image: u = ||z - z_(k)||, z of unit norm.

    The distance measures how unusual an image is. u depends only on the image, not on the
    candidates or the answer. The fit uses no class labels, so the method also works on captions. If
    there are fewer than k training images, u is the distance to the farthest training image.

    Args:
        k: Rank of the neighbour. 1 is the nearest.

    Source: Sun et al., ICML 2022. Failure-prediction benchmarks search only the first 1,000
    training images. Here all training images are searched, up to ``max_bank``.

    Examples:
        >>> import numpy as np, vilu
        >>> image = [[1.0, 0.0], [0.8, 0.6], [0.6, 0.8], [0.0, 1.0]]  # at 0, 37, 53 and 90 degrees
        >>> text = np.eye(2)  # class 0 at 0 degrees, class 1 at 90 degrees
        >>> train = vilu.Embeddings(image, text, target=[0, 1, 1, 1])  # the answer at 37 is wrong
        >>> new = vilu.Embeddings([[0.96, 0.28], [0.0, 1.0]], text)  # at 16 and 90 degrees
        >>> # the image at 90 degrees is also a training image
        >>> vilu.PREDICTORS["knn_distance"](k=1).fit(train).predict_uncertainty(new).round(2)
        array([0.28, 0.  ])
    """

    name: ClassVar[str] = "knn_distance"
    summary: ClassVar[str] = "distance to the k-th nearest training image (Sun et al. 2022)"
    reference: ClassVar[str] = "Sun et al., ICML 2022"
    cost: ClassVar[str] = "fit: copies the images; score: one product with the bank"
    looks_at: ClassVar[frozenset[str]] = frozenset({"image"})
    depends_on_answer: ClassVar[bool] = False
    # name, type (f float32, d float64, i int64, ? bool) and sizes for each learned tensor
    _forms: ClassVar[str] = "bank:fND"

    seed: int = 0
    device: str = "auto"
    max_bank: Count = 100_000
    k: Count = 50

    def _learn(
        self,
        train: Rows,
        failure: Tensor,  # noqa: ARG002
        validation: EmbeddingSource | None,  # noqa: ARG002
    ) -> Learnt:
        bank_rows, _ = draw_rows(train, self.max_bank, self.seed)
        bank = read_images(bank_rows)
        return Learnt({"bank": bank}, {"n_bank": len(bank)})

    def _score(self, batch: Batch) -> Tensor:
        similarity, _ = nearest_in_bank(batch.image, self.learned_["bank"], self.k)
        cosine_of_kth = similarity[:, -1]  # the cosines are descending
        return distance_of_cosine(cosine_of_kth)


@dataclasses.dataclass
class TRINE(LabelledBank):
    """TRINE: the predicted class's margin in a weighted vote by the nearest training images.

    The neighbours z_r have the ranks r = 0 ... k-1 and the classes y_r. text_c is the embedding of
    class c's text, and t̂ is the predicted class. Neighbour r has the weight w_r, and class c has
    the support S_c:

        w_r = exp(-decay r) * (1 + cos(z, z_r)) / 2 * (1 + cos(text_t̂, text_{y_r})) / 2,
        S_c = sum_{r: y_r = c} w_r / sum_r w_r,
        u = 1 - (S_t̂ - max_{c != t̂} S_c), in [0, 2].

    A class without training images has the support 0, so u > 1 if this class is the answer. If
    there are fewer than k training images, all training images vote. 1 + cos is taken as at least
    1e-6. So no ratio is 0 / 0, even for opposite texts.

    Args:
        k: Number of neighbours.
        decay: Rate at which a neighbour's weight decays with the neighbour's rank r.

    Source: the support margin in the repository sgchr273/TRINE (2026). The repository refuses a
    bank with fewer than k images. Here the whole bank is used.

    Examples:
        >>> import numpy as np, vilu
        >>> image = [[1.0, 0.0], [0.8, 0.6], [0.6, 0.8], [0.0, 1.0]]  # at 0, 37, 53 and 90 degrees
        >>> text = np.eye(2)  # class 0 at 0 degrees, class 1 at 90 degrees
        >>> train = vilu.Embeddings(image, text, target=[0, 1, 1, 1])  # the answer at 37 is wrong
        >>> new = vilu.Embeddings([[0.96, 0.28], [0.28, 0.96]], text)  # at 16 and 74 degrees
        >>> # for answer 0 one of two neighbours has another class, for answer 1 neither
        >>> vilu.PREDICTORS["trine"](k=2).fit(train).predict_uncertainty(new).round(2)
        array([0.62, 0.  ])
    """

    name: ClassVar[str] = "trine"
    summary: ClassVar[str] = (
        "margin of rank-weighted neighbours of the predicted class, with their texts (TRINE)"
    )
    reference: ClassVar[str] = "sgchr273/TRINE, 2026"

    k: Count = 20
    decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1

    def _score(self, batch: Batch) -> Tensor:
        answer = self.answer_of(batch)
        similarity, index = nearest_in_bank(batch.image, self.learned_["bank"], self.k)
        label = self.tensor("labels", index.device)[index]  # (B, k) the neighbours' classes
        text = self.tensor("classes", index.device)
        # (B, k) cosines between the answer's text and the texts of the neighbours' classes
        text_similarity = (text[answer] @ text.T).gather(1, label)
        n_neighbours = similarity.shape[1]
        rank = torch.arange(n_neighbours, dtype=torch.float32, device=index.device)
        image_factor = (1 + similarity).clamp(min=TINY)
        text_factor = (1 + text_similarity).clamp(min=TINY)
        weight = torch.exp(-self.decay * rank) * image_factor / 2 * text_factor / 2
        support = text.new_zeros(len(label), len(text))
        # One neighbour is added at a time. A single scatter_add_ would add in different orders on
        # different devices.
        for rank_index in range(n_neighbours):
            neighbour = slice(rank_index, rank_index + 1)
            support.scatter_add_(1, label[:, neighbour], weight[:, neighbour])
        support = support / weight.sum(dim=1, keepdim=True)
        support_of_answer = support.gather(1, answer[:, None]).squeeze(1)
        # the answer is no rival: its support is replaced by -1, which is never the largest
        support_of_rival = support.scatter(1, answer[:, None], -1.0).amax(dim=1)
        return 1 - (support_of_answer - support_of_rival)


@dataclasses.dataclass
class TrustScore(LabelledBank):
    """Inverse trust score: distance to the predicted class / distance to the nearest other class.

    u = (d(z, H_t̂) + 1e-6) / (min_{c != t̂} d(z, H_c) + 1e-6)

    t̂ is the predicted class. d(z, H) is the Euclidean distance from z to the nearest image in H,
    between unit vectors. H_c are the training images in class c, without the share ``alpha`` of
    images in the sparsest regions. An image is in a sparse region if the k-th nearest image in the
    same class is far. The image itself counts as the first. The distance to a class without images
    is 2, the largest possible distance.

    Args:
        alpha: Share of each class to leave out. 0: no image is left out.
        k: Rank of the neighbour whose distance measures sparsity. In a class with fewer images, it
            is the farthest image.

    Source: Jiang et al., NeurIPS 2018, algorithms 1 and 2, with alpha = 0 and k = 10 as in the
    released code. As in the paper, distances are to the nearest image. The released code takes the
    second nearest.

    Examples:
        >>> import numpy as np, vilu
        >>> image = [[1.0, 0.0], [0.8, 0.6], [0.6, 0.8], [0.0, 1.0]]  # at 0, 37, 53 and 90 degrees
        >>> text = np.eye(2)  # class 0 at 0 degrees, class 1 at 90 degrees
        >>> train = vilu.Embeddings(image, text, target=[0, 1, 1, 1])  # the answer at 37 is wrong
        >>> new = vilu.Embeddings([[0.96, 0.28], [0.28, 0.96]], text)  # at 16 and 74 degrees
        >>> # the image at 16 degrees has the distances 0.28 to class 0 and 0.36 to class 1
        >>> vilu.PREDICTORS["trust_score"]().fit(train).predict_uncertainty(new).round(2)
        array([0.79, 0.24])
    """

    name: ClassVar[str] = "trust_score"
    summary: ClassVar[str] = (
        "distance to the predicted class over that to the nearest other (Jiang et al. 2018)"
    )
    reference: ClassVar[str] = "Jiang et al., NeurIPS 2018"
    looks_at: ClassVar[frozenset[str]] = frozenset({"logits", "image"})
    cost: ClassVar[str] = "fit: copies the images; score: two products with the bank"

    alpha: Annotated[float, Field(ge=0, lt=1)] = 0.0
    k: Count = 10

    def _choose_images(self, bank: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Leave out the share ``alpha`` of each class that lies in the class's sparsest regions."""
        if self.alpha == 0:
            return bank, label
        dense_members = []
        for class_label in label.unique():
            members = (label == class_label).nonzero().squeeze(1)
            similarity, _ = nearest_in_bank(bank[members], bank[members], self.k)
            # each member's distance to the k-th nearest member
            distance = distance_of_cosine(similarity[:, -1])
            radius = distance.double()
            is_dense = radius <= radius.quantile(1 - self.alpha)
            dense_members.append(members[is_dense])
        dense_rows_by_class = torch.cat(dense_members)
        dense_rows = dense_rows_by_class.sort().values
        return bank[dense_rows], label[dense_rows]

    def _score(self, batch: Batch) -> Tensor:
        answer = self.answer_of(batch)
        label = self.tensor("labels", answer.device)

        # Both functions return a mask (queries, bank images). It is true if the search may find
        # the bank image for the query.
        def is_of_answer(queries: slice, bank_images: slice) -> Tensor:
            return answer[queries, None] == label[bank_images]

        def is_of_rival(queries: slice, bank_images: slice) -> Tensor:
            return answer[queries, None] != label[bank_images]

        distance_to_answer = self._distance(batch.image, is_of_answer)
        distance_to_rival = self._distance(batch.image, is_of_rival)
        return (distance_to_answer + TINY) / (distance_to_rival + TINY)

    def _distance(self, image: Tensor, allowed_pairs: AllowedPairs) -> Tensor:
        """Compute each image's distance (B,) to the nearest allowed image in the bank."""
        bank = self.learned_["bank"]
        similarity, index = nearest_in_bank(image, bank, k=1, allowed_pairs=allowed_pairs)
        nearest_index = index[:, 0].cpu()
        nearest_image = bank[nearest_index].to(image.device)
        # the distance is computed from the coordinates, because for near duplicates the squared
        # distance 2 - 2 cos loses all digits
        difference = normalize(image, dim=1) - nearest_image
        distance_to_nearest = torch.linalg.vector_norm(difference, dim=1)
        has_no_allowed_image = similarity[:, 0] == -math.inf
        return torch.where(has_no_allowed_image, MAX_DISTANCE, distance_to_nearest)
