"""Methods that know their classes from labelled images: what they share, and those that fit one thing per class."""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from vilu.embeddings.rows import Rows
from vilu.embeddings.similarity import float64, nearest
from vilu.embeddings.source import SAME_TEXT, Batch, EmbeddingSource
from vilu.errors import ProvenanceError
from vilu.predictors.bank.search import Count, draw_rows, gather, labels
from vilu.predictors.base import CLASSES, FailurePredictor, Learnt
from vilu.predictors.labelled import class_texts, failure_log_odds


@dataclasses.dataclass
class ClosedSet(FailurePredictor):
    """A method that learns what it knows class by class, and scores those classes only."""

    closed_set: ClassVar[bool] = True
    no_captions: ClassVar[str | None] = (
        "it compares images of one class, and captions have no classes"
    )

    seed: int = 0
    device: str = "auto"

    def classes_of(self, text: Tensor) -> Tensor:
        """(K,) position of every candidate (K, D) among the learned ``classes``, found by the text's embedding."""
        cosine, match = nearest(text, self.tensor(CLASSES, text.device))
        unknown, twice = int((cosine < SAME_TEXT).sum()), len(match) - len(match.unique())
        if unknown or twice:
            why = (
                f"{unknown} are others"
                if unknown
                else f"{twice} are nearest to one that is there already"
            )
            raise ProvenanceError(
                f"{self.name} scores the {len(self.learned_[CLASSES])} classes that it was fitted on. Of the "
                f"{len(text)} candidates here {why}. Fit it on these classes, or take a method that works on any (see "
                "`vilu list predictors`)."
            )
        return match

    def answer_of(self, batch: Batch) -> Tensor:
        """(B,) zero-shot answers among the learned classes."""
        return self.classes_of(batch.text)[batch.prediction]


@dataclasses.dataclass
class LinearProbe(ClosedSet):
    """Logistic regression of the classes on image embeddings: u = 1 - P(t̂ | z), P its softmax.

    u is computed as sigmoid(log sum_{c != t̂} exp l_c - l_t̂) in float64, so that confident images
    do not tie. A class without training images has P = 0, hence u = 1; with images of one class
    only, P of that class is 1.

    Args:
        C: Inverse strength of the L2 penalty, as in scikit-learn.
        max_iter: Most steps of L-BFGS; scikit-learn warns where they do not suffice.
        max_bank: Most training images to fit on; of more, so many are drawn with ``seed``.

    Source: the linear probe of Radford et al., ICML 2021, read at the class that the VLM predicts.
    The regression runs in float32 on centred embeddings: with its free intercept that has the same
    optimum, reached in fewer steps. Its time grows with the number of images times that of classes.

    Examples:
        >>> import numpy as np, vilu
        >>> angle = np.linspace(
        ...     0, np.pi / 2, 100
        ... )  # the answer is class 0 up to 45 degrees, the truth up to 63
        >>> train = vilu.Embeddings(
        ...     np.c_[np.cos(angle), np.sin(angle)], np.eye(2), np.repeat([0, 1], [70, 30])
        ... )
        >>> new = vilu.Embeddings(
        ...     [[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]], np.eye(2)
        ... )  # at 0, 53 and 90 degrees
        >>> vilu.PREDICTORS["linear_probe"]().fit(train).predict_uncertainty(new).round()
        array([0., 1., 0.])
    """

    name: ClassVar[str] = "linear_probe"
    summary: ClassVar[str] = (
        "logistic regression on image embeddings, at the predicted class (Radford et al. 2021)"
    )
    reference: ClassVar[str] = "Radford et al., ICML 2021"
    cost: ClassVar[str] = "fit: logistic regression; score: one product with K weights"
    is_probability: ClassVar[bool] = True
    _forms: ClassVar[str] = "weight:dKD bias:dK classes:fKD"

    C: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 100.0
    max_iter: Count = 500
    max_bank: Count = 100_000

    def _learn(self, train: Rows, failure: Tensor, validation: EmbeddingSource | None) -> Learnt:  # noqa: ARG002
        from sklearn.linear_model import LogisticRegression

        kept, _ = draw_rows(train, self.max_bank, self.seed)
        label = labels(kept)
        weight = torch.zeros(
            train.source.n_candidates, train.source.space.embed_dim, dtype=torch.float64
        )
        bias = torch.full((len(weight),), -math.inf, dtype=torch.float64)
        known = label.unique()
        bias[known] = 0.0
        if len(known) > 1:
            # Of two classes scikit-learn gives one logit, that of the second.
            fitted = known if len(known) > 2 else known[1:]
            image = gather(kept)
            centre = image.mean(dim=0)
            model = LogisticRegression(C=self.C, max_iter=self.max_iter)
            with warnings.catch_warnings():
                warnings.filterwarnings(
                    "ignore", message="The number of unique classes"
                )  # few images a class are fine
                model.fit((image - centre).numpy(), label.numpy())
            weight[fitted] = torch.from_numpy(model.coef_).double()
            bias[fitted] = (
                torch.from_numpy(model.intercept_).double() - weight[fitted] @ centre.double()
            )
        return Learnt({"weight": weight, "bias": bias, CLASSES: class_texts(train)})

    def _score(self, batch: Batch) -> Tensor:
        classes = self.classes_of(batch.text)
        image = float64(batch.image)
        weight, bias = (
            self.tensor(name, image.device)[classes.to(image.device)] for name in ("weight", "bias")
        )
        unknown = (
            bias[batch.prediction.to(bias.device)] == -math.inf
        )  # where all are, their softmax is 0 / 0
        return torch.sigmoid(failure_log_odds(image @ weight.T + bias, batch)).masked_fill(
            unknown, 1.0
        )


@dataclasses.dataclass
class TrustVLM(ClosedSet):
    """TrustVLM: zero-shot probability plus similarity to the predicted class's images in a second encoder.

    u = (1 - p_max) + weight * (1 - cos(f, P_t̂)), f the image's features in a second encoder
    (column ``features``; the VLM's own features make another method) and P_c the mean of the
    features of up to ``shots`` training images of class c, drawn with ``seed``. A class without
    training images has the prototype 0, hence the cosine 0.

    Args:
        weight: Of the similarity.
        shots: Most training images per class.

    Source: TrustVLM, arXiv:2505.23745, and its code (weight 1, 0.1 on Oxford Pets; 16 shots; DINOv2
    features averaged over tokens). Its starred variant answers anew, and is no score of the VLM's
    own answer.

    Examples:
        >>> import numpy as np, vilu
        >>> features = {"features": [[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]}  # a second encoder's
        >>> data = vilu.Embeddings(np.eye(2)[[0, 0, 1]], np.eye(2), [0, 0, 1], columns=features)
        >>> new = vilu.Embeddings(
        ...     np.eye(2)[[0, 0]], np.eye(2), columns={"features": [[1.0, 0.0], [0.0, 1.0]]}
        ... )
        >>> vilu.PREDICTORS["trustvlm"]().fit(data).predict_uncertainty(new).round(2)
        array([0.11, 0.55])
    """

    name: ClassVar[str] = "trustvlm"
    summary: ClassVar[str] = (
        "zero-shot probability plus similarity to class prototypes of a second encoder (TrustVLM)"
    )
    reference: ClassVar[str] = "TrustVLM, arXiv 2505.23745"
    cost: ClassVar[str] = "fit: 16 images a class; score: one product with K prototypes"
    columns: ClassVar[tuple[str, ...]] = ("features",)
    _forms: ClassVar[str] = "prototypes:fKF classes:fKD"

    weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    shots: Count = 16

    def _learn(self, train: Rows, failure: Tensor, validation: EmbeddingSource | None) -> Learnt:  # noqa: ARG002
        label = labels(train)
        kept = few_per_class(label, self.shots, self.seed)
        features = train.source.column("features", train.index[kept])
        total = features.new_zeros(train.source.n_candidates, features.shape[1])
        prototypes = normalize(total.index_add_(0, label[kept], features), dim=1)
        return Learnt({"prototypes": prototypes, CLASSES: class_texts(train)})

    def _score(self, batch: Batch) -> Tensor:
        answer = self.answer_of(batch)
        features = normalize(batch.columns["features"], dim=1)
        prototypes = self.tensor("prototypes", features.device)
        if features.shape[1] != prototypes.shape[1]:
            raise ProvenanceError(
                f"{self.name} was fitted on features of width {prototypes.shape[1]}, and those to score have "
                f"{features.shape[1]}. Embed both with the same second encoder."
            )
        similarity = (features * prototypes[answer]).sum(dim=1)
        return batch.others.doubt + self.weight * (1 - float64(similarity))


def few_per_class(label: Tensor, most: int, seed: int) -> Tensor:
    """Sorted positions of at most so many rows of each class, drawn at random."""
    order = torch.randperm(len(label), generator=torch.Generator().manual_seed(seed))
    order = order[label[order].argsort(stable=True)]
    first = torch.bincount(label).cumsum(0) - torch.bincount(label)
    rank = torch.arange(len(label)) - first[label[order]]
    return order[rank < most].sort().values
