"""Disagreement of augmented images and of rephrased prompts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from vilu.embeddings.similarity import float64
from vilu.embeddings.source import Batch
from vilu.predictors.contract.predictor import FailurePredictor

Statistic = Literal["mean", "vote"]


@dataclass
class Disagreement(FailurePredictor):
    """u = 1/(R + 1) sum_r d_r over the original question (r = 0) and R other looks at it.

    d_r is how much look r doubts the original answer t̂:

    - statistic="mean": 1 - p_r(t̂), p_r the zero-shot posterior of the look. u is one minus the
      mean probability.
    - statistic="vote": 1 where the answer of look r is another than t̂, else 0. u is the share of
      looks that disagree; it has R + 1 values, so it ranks coarsely.

    A look is one product with K candidates: R looks of a batch never exist at the same time.

    Args:
        statistic: "mean" or "vote".
    """

    is_probability: ClassVar[bool] = True
    varied: ClassVar[str]  # the part of a batch that the column has other versions of

    statistic: Statistic = "mean"

    def _score(self, batch: Batch) -> Tensor:
        doubt = DOUBT[self.statistic]
        answer = batch.prediction[:, None]
        looks = batch.columns[self.columns[0]].unbind(dim=1)
        total = doubt(batch.logits, answer)
        for look in looks:
            changes: dict[str, Any] = {self.varied: look}
            total = total + doubt(replace(batch, **changes).logits, answer)
        return total / (1 + len(looks))


def improbability(logits: Tensor, answer: Tensor) -> Tensor:
    """(B,) float64 one minus the probability of the answer (B, 1).

    There is no cancellation where that probability is nearly one.
    """
    logits = float64(logits)
    answer = answer.to(logits.device)
    over_answer = logits - logits.gather(1, answer)
    rivals = over_answer.scatter(1, answer, -math.inf)
    return torch.sigmoid(torch.logsumexp(rivals, dim=1))


def dissent(logits: Tensor, answer: Tensor) -> Tensor:
    """(B,) float64: 1 where the logits have another answer than (B, 1)."""
    return float64(logits.argmax(dim=1) != answer.squeeze(1))


DOUBT: dict[Statistic, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": improbability,
    "vote": dissent,
}


@dataclass
class TTA(Disagreement):
    """Test-time augmentation: how much V augmented views of the image doubt the answer.

    The answer is that on the image itself.

    The looks (see ``Disagreement``) are the logits of the column ``views`` (B, V, D) against the
    same candidates.

    Source: Ayhan and Berens, MIDL 2018, who take the spread of the predictions; their mean instead
    is Ashukha et al., ICLR 2020. Here it is the mean of the original answer's probability, since
    that is the answer whose failure is predicted: the mean of all may prefer another.

    Examples:
        >>> import numpy as np, vilu
        >>> # the last view of the first image is like the other class
        >>> views = np.eye(2)[[[0, 0, 1], [1, 1, 1]]]
        >>> data = vilu.Embeddings(np.eye(2), np.eye(2), columns={"views": views})
        >>> vilu.PREDICTORS["tta"](statistic="vote").predict_uncertainty(data)
        array([0.25, 0.  ])
    """

    name: ClassVar[str] = "tta"
    summary: ClassVar[str] = "test-time augmentation: doubt of augmented views about the answer"
    reference: ClassVar[str] = "Ayhan and Berens, MIDL 2018"
    cost: ClassVar[str] = "embed: V passes an image; score: V products with the classes"
    columns: ClassVar[tuple[str, ...]] = ("views",)
    varied: ClassVar[str] = "image"


@dataclass
class PromptDisagreement(Disagreement):
    """Prompt disagreement: how much other wordings of the candidates doubt the answer.

    The looks (see ``Disagreement``) are the logits of the image against the column ``prompts`` (K,
    P, D), one prompt at a time. Captions work too, where the column holds P paraphrases of each.

    Source: the agreement of prompts as a confidence is that of Wightman et al., TrustNLP 2023, for
    language models; the prompts are CLIP's ensemble of templates (Radford et al., ICML 2021), apart
    instead of averaged.

    Examples:
        >>> import numpy as np, vilu
        >>> # one more wording a class; in that of the second p is 1/2
        >>> prompts = np.eye(3)[[[0], [2]]]
        >>> data = vilu.Embeddings(
        ...     np.eye(3)[:2], np.eye(3)[:2], logit_scale=np.log(3), columns={"prompts": prompts}
        ... )
        >>> vilu.PREDICTORS["prompt_disagreement"]().predict_uncertainty(data).round(3)
        array([0.25 , 0.375])
    """

    name: ClassVar[str] = "prompt_disagreement"
    summary: ClassVar[str] = "doubt of other prompts about the answer"
    reference: ClassVar[str] = "Wightman et al., TrustNLP 2023"
    cost: ClassVar[str] = "score: P products with the classes"
    columns: ClassVar[tuple[str, ...]] = ("prompts",)
    varied: ClassVar[str] = "text"
