"""Linear probe."""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from vilu.embeddings.similarity import float64
from vilu.embeddings.source import Batch, EmbeddingSource
from vilu.predictors.bank.search import NO_CLASSES, Count, draw_rows, gather, labels
from vilu.predictors.base import CLASSES, FailurePredictor, Learnt
from vilu.predictors.labelled import class_texts
from vilu.predictors.nn.train import Rows


@dataclasses.dataclass
class LinearProbe(FailurePredictor):
    """Logistic regression of the classes on image embeddings: u = 1 - P(t̂ | z), P its softmax.

    u is computed as sigmoid(log sum_{c != t̂} exp l_c - l_t̂) in float64, so that confident images do not tie. A class
    without training images has P = 0, hence u = 1; with images of one class only, P of that class is 1.

    Args:
        C: Inverse strength of the L2 penalty, as in scikit-learn.
        max_iter: Most steps of L-BFGS; scikit-learn warns where they do not suffice.
        max_bank: Most training images to fit on; of more, so many are drawn with ``seed``.

    Source: the linear probe of Radford et al., ICML 2021, read at the class that the VLM predicts. The regression runs
    in float32 on centred embeddings: with its free intercept that has the same optimum, reached in fewer steps. Its
    time grows with the number of images times that of classes.
    """

    name: ClassVar[str] = "linear_probe"
    summary: ClassVar[str] = "logistic regression on image embeddings, at the predicted class (Radford et al. 2021)"
    reference: ClassVar[str] = "Radford et al., ICML 2021"
    cost: ClassVar[str] = "fit: logistic regression; score: one product with K weights"
    is_probability: ClassVar[bool] = True
    closed_set: ClassVar[bool] = True
    no_captions: ClassVar[str | None] = NO_CLASSES
    tensors: ClassVar[tuple[str, ...]] = ("weight", "bias", CLASSES)

    seed: int = 0
    device: str = "auto"
    C: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 100.0
    max_iter: Count = 500
    max_bank: Count = 100_000

    def _learn(self, train: Rows, failure: Tensor, validation: EmbeddingSource | None) -> Learnt:  # noqa: ARG002
        kept, _ = draw_rows(train, self.max_bank, self.seed)
        label = labels(kept)
        weight = torch.zeros(train.source.n_candidates, train.source.space.embed_dim, dtype=torch.float64)
        bias = torch.full((len(weight),), -math.inf, dtype=torch.float64)
        known = label.unique()
        bias[known] = 0.0
        if len(known) > 1:
            # Of two classes scikit-learn gives one logit, that of the second.
            fitted = known if len(known) > 2 else known[1:]
            image = gather(kept)
            centre = image.mean(dim=0)
            weight[fitted], intercept = self._regress(image - centre, label)
            bias[fitted] = intercept - weight[fitted] @ centre.double()
        return Learnt({"weight": weight, "bias": bias, CLASSES: class_texts(train)})

    def _regress(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (C, D) and biases (C,), float64."""
        from sklearn.linear_model import LogisticRegression

        model = LogisticRegression(C=self.C, max_iter=self.max_iter)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The number of unique classes")  # few images a class are fine
            model.fit(image.numpy(), label.numpy())
        return torch.from_numpy(model.coef_).double(), torch.from_numpy(model.intercept_).double()

    def _score(self, batch: Batch) -> Tensor:
        classes = self.classes_of(batch.text)
        image = float64(batch.image)
        weight, bias = (self.tensor(name, image.device)[classes.to(image.device)] for name in ("weight", "bias"))
        logits = image @ weight.T + bias
        answer = batch.prediction.to(image.device)[:, None]
        others = logits.scatter(1, answer, -math.inf).logsumexp(dim=1)
        return torch.sigmoid(others - logits.gather(1, answer).squeeze(1))
