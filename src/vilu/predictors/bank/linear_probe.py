"""The method ``linear_probe``: logistic regression from image embeddings to classes."""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from vilu.embeddings.rows import Rows
from vilu.embeddings.similarity import float64
from vilu.embeddings.source import Batch, EmbeddingSource
from vilu.predictors.bank.closed_set import ClosedSet
from vilu.predictors.bank.search import Count, class_labels, draw_rows, read_images
from vilu.predictors.contract.labelled import class_texts, failure_log_odds
from vilu.predictors.contract.predictor import CLASSES, Learnt


def fit_regression(
    image: Tensor, label: Tensor, n_classes: int, inverse_penalty: float, max_iter: int
) -> tuple[Tensor, Tensor]:
    """Fit a logistic regression from images to labels. Return weight (K, D), bias (K,) float64.

    Args:
        image: Images (N, D), float32.
        label: Image classes (N,).
        n_classes: Class count K. A class without images has the bias minus infinity.
        inverse_penalty: Inverse strength C of the L2 penalty, as in scikit-learn.
        max_iter: Maximum number of L-BFGS steps.
    """
    from sklearn.linear_model import LogisticRegression

    weight = torch.zeros(n_classes, image.shape[1], dtype=torch.float64)
    # the logit of a class without training images is -inf
    bias = torch.full((n_classes,), -math.inf, dtype=torch.float64)
    seen_classes = label.unique()
    bias[seen_classes] = 0.0
    if len(seen_classes) == 1:
        return weight, bias
    # Every image is largely the mean of all images. If the mean were not subtracted, L-BFGS would
    # converge slowly.
    centre = image.mean(dim=0)
    model = LogisticRegression(C=inverse_penalty, max_iter=max_iter)
    with warnings.catch_warnings():
        # the warning is about classes with few images, and such classes are expected here
        warnings.filterwarnings("ignore", message="The number of unique classes")
        model.fit((image - centre).numpy(), label.numpy())
    # For two classes scikit-learn has only the second class's logit. The first class's logit stays
    # 0.
    fitted_classes = seen_classes if len(seen_classes) > 2 else seen_classes[1:]
    weight[fitted_classes] = torch.tensor(model.coef_, dtype=torch.float64)
    intercept = torch.tensor(model.intercept_, dtype=torch.float64)
    bias[fitted_classes] = intercept - weight[fitted_classes] @ centre.double()
    return weight, bias


@dataclasses.dataclass
class ClassRegression(ClosedSet):
    """A method that scores answers by a softmax of logits. The logits are linear in the image."""

    is_probability: ClassVar[bool] = True
    # Weight (K, D) and bias (K,) make the logits, and the classes (K, D) are texts. "d" means
    # float64 and "f" float32 (see ``require_forms``).
    _forms: ClassVar[str] = "weight:dKD bias:dK classes:fKD"

    def _logits(self, batch: Batch) -> Tensor:
        """Compute the logits (B, K) float64. A class without training images has the logit -inf."""
        image = float64(batch.image)
        class_index = self.classes_of(batch.text)
        classes = class_index.to(image.device)
        weight = self.tensor("weight", image.device)[classes]
        bias = self.tensor("bias", image.device)[classes]
        return image @ weight.T + bias

    def log_posterior(self, batch: Batch) -> Tensor:
        """Compute the log-posterior (B, K) float64: -inf for a class without training images."""
        logits = self._logits(batch)
        return logits.log_softmax(dim=-1)

    def _score(self, batch: Batch) -> Tensor:
        logits = self._logits(batch)
        log_odds = failure_log_odds(logits, batch)
        # An answer without training images gets the uncertainty 1. The 1 is set directly, because
        # the softmax would be 0 / 0 if no candidate has training images.
        answer_column = batch.prediction.to(logits.device)[:, None]
        answer_logit_column = logits.gather(1, answer_column)
        answer_logit = answer_logit_column.squeeze(1)
        uncertainty = torch.sigmoid(log_odds)
        return uncertainty.masked_fill(answer_logit == -math.inf, 1.0)


@dataclasses.dataclass
class LinearProbe(ClassRegression):
    """Logistic regression from image embeddings to classes.

    The uncertainty of a prediction t̂ is

        u = 1 - P(t̂ | z) = sigmoid(log sum_{c != t̂} exp l_c - l_t̂)

    l_c are the regression logits, and P is the softmax of l. u is computed from the logits in
    float64, so confident images still have different u. If a class has no training images, P = 0
    and u = 1. If only one class has training images, this class has P = 1.

    Args:
        C: Inverse strength of the L2 penalty, as in scikit-learn.
        max_iter: Maximum number of L-BFGS steps. scikit-learn warns if more steps are needed.
        max_bank: Maximum number of training images. From a larger set, ``max_bank`` images are
            drawn at random with ``seed``.

    Source: the linear probe by Radford et al., ICML 2021, evaluated at the class predicted by the
    VLM. The regression runs in float32 on centred embeddings. Centring saves steps. Centring does
    not change the optimum, because the intercept has no penalty. The fitting time grows with the
    image count times the class count.

    Examples:
        >>> import numpy as np, vilu
        >>> angle = np.linspace(0, np.pi / 2, 100)
        >>> image = np.c_[np.cos(angle), np.sin(angle)]
        >>> text = np.eye(2)  # class 0 is at 0 degrees, class 1 at 90 degrees
        >>> target = np.repeat([0, 1], [70, 30])  # truth: 0 up to 63 degrees, answer: 0 up to 45
        >>> train = vilu.Embeddings(image, text, target=target)
        >>> new = vilu.Embeddings([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]], text)  # 0, 53, 90 degrees
        >>> method = vilu.PREDICTORS["linear_probe"]()
        >>> method.fit(train).predict_uncertainty(new).round()  # the second answer is wrong
        array([0., 1., 0.])
    """

    name: ClassVar[str] = "linear_probe"
    summary: ClassVar[str] = (
        "logistic regression on image embeddings, at the predicted class (Radford et al. 2021)"
    )
    reference: ClassVar[str] = "Radford et al., ICML 2021"
    cost: ClassVar[str] = "fit: logistic regression; score: one product with K weights"
    looks_at: ClassVar[frozenset[str]] = frozenset({"logits", "image"})

    C: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 100.0
    max_iter: Count = 500
    max_bank: Count = 100_000

    def _learn(
        self,
        train: Rows,
        failure: Tensor,  # noqa: ARG002
        validation: EmbeddingSource | None,  # noqa: ARG002
    ) -> Learnt:
        bank, _ = draw_rows(train, self.max_bank, self.seed)
        weight, bias = fit_regression(
            image=read_images(bank),
            label=class_labels(bank),
            n_classes=train.source.n_candidates,
            inverse_penalty=self.C,
            max_iter=self.max_iter,
        )
        class_text = class_texts(train)
        return Learnt({"weight": weight, "bias": bias, CLASSES: class_text})
