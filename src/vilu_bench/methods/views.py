"""Disagreement between the answer and the answers on augmented images or with other prompts."""

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
    """Mean disagreement of an input and its variants with the original answer.

    u = 1/(R + 1) sum_r d_r over the original input (r = 0) and the R variants. d_r measures how
    much variant r disagrees with the original answer t̂:

    - statistic="mean": d_r = 1 - p_r(t̂), where p_r is the variant's zero-shot posterior. u is
      one minus the mean probability.
    - statistic="vote": d_r = 1 if variant r has another answer than t̂, else 0. u is the share of
      the R + 1 inputs that disagree. Since u has only R + 1 possible values, many rows tie.

    The variants are scored in turn, so only a single variant's logits are in memory.

    Args:
        statistic: "mean" or "vote".
    """

    is_probability: ClassVar[bool] = True
    varied_field: ClassVar[str]  # field of a batch that a variant replaces: "image" or "text"

    statistic: Statistic = "mean"

    def _score(self, batch: Batch) -> Tensor:
        disagreement = DISAGREEMENT_FUNCTIONS[self.statistic]
        answer = batch.prediction[:, None]
        (column,) = self.columns  # the only column has all R variants, (B, R, D) or (K, R, D)
        variants = batch.columns[column].unbind(dim=1)
        total = disagreement(batch.logits, answer)  # the original input, r = 0
        for variant in variants:
            changes: dict[str, Any] = {self.varied_field: variant}
            varied_batch = replace(batch, **changes)
            total = total + disagreement(varied_batch.logits, answer)
        return total / (1 + len(variants))


def improbability(logits: Tensor, answer: Tensor) -> Tensor:
    """Compute one minus the probability (B,) of the answers (B, 1), float64.

    The difference is computed without cancellation for probabilities near 1.
    """
    logits = float64(logits)
    answer = answer.to(logits.device)
    relative_logits = logits - logits.gather(1, answer)  # the answer has the logit 0
    rivals = relative_logits.scatter(1, answer, -math.inf)
    log_odds = torch.logsumexp(rivals, dim=1)
    return torch.sigmoid(log_odds)


def has_other_answer(logits: Tensor, answer: Tensor) -> Tensor:
    """Compare the candidate with the largest logit to ``answer`` (B, 1).

    Return (B,) float64: 1 if another candidate has the largest logit, else 0.
    """
    is_other = logits.argmax(dim=1) != answer.squeeze(1)
    return float64(is_other)


DISAGREEMENT_FUNCTIONS: dict[Statistic, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": improbability,
    "vote": has_other_answer,
}
"""Functions for d_r (B,), from a variant's logits and the original answers (B, 1)."""


@dataclass
class TTA(Disagreement):
    """Test-time augmentation: how much V augmented views disagree with the image's own answer.

    The variants of ``Disagreement`` are the augmented views in the column ``views`` (B, V, D), with
    the same candidates.

    Source: Ayhan and Berens, MIDL 2018, use the spread of the predictions. Ashukha et al., ICLR
    2020, use the mean of the predictions. Here u uses the original answer's mean probability,
    because the original answer's failure is predicted. Another candidate may have the largest
    mean probability.

    Examples:
        >>> import numpy as np, vilu
        >>> image = text = np.eye(2)  # the answers are 0 and 1
        >>> class_of_view = [[0, 0, 1], [1, 1, 1]]  # the last view of the first image disagrees
        >>> views = text[class_of_view]
        >>> data = vilu.Embeddings(image, text, columns={"views": views})
        >>> vilu.PREDICTORS["tta"](statistic="vote").predict_uncertainty(data)  # 1 of 4, 0 of 4
        array([0.25, 0.  ])
    """

    name: ClassVar[str] = "tta"
    summary: ClassVar[str] = "test-time augmentation: doubt of augmented views about the answer"
    reference: ClassVar[str] = "Ayhan and Berens, MIDL 2018"
    cost: ClassVar[str] = "embed: V passes per image; score: V products with the classes"
    columns: ClassVar[tuple[str, ...]] = ("views",)
    varied_field: ClassVar[str] = "image"


@dataclass
class PromptDisagreement(Disagreement):
    """Prompt disagreement: how much other wordings of the candidates disagree with the answer.

    The variants of ``Disagreement`` are the P prompts in the column ``prompts`` (K, P, D). The
    method also works on captions if the column has P paraphrases of each caption.

    Source: Wightman et al., TrustNLP 2023, use the agreement between prompts as a confidence for
    language models. The prompts are CLIP's template ensemble (Radford et al., ICML 2021), without
    CLIP's averaging over templates.

    Examples:
        >>> import numpy as np, vilu
        >>> image = text = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]  # with logit scale ln 3, p = 3/4
        >>> prompts = [[[1.0, 0.0, 0.0]], [[0.0, 0.0, 1.0]]]  # one more prompt for each class
        >>> data = vilu.Embeddings(image, text, logit_scale=np.log(3), columns={"prompts": prompts})
        >>> # with the new prompts p is 1/2 for answer 1, so u is the mean of 1/4 and 1/2
        >>> vilu.PREDICTORS["prompt_disagreement"]().predict_uncertainty(data).round(3)
        array([0.25 , 0.375])
    """

    name: ClassVar[str] = "prompt_disagreement"
    summary: ClassVar[str] = "doubt of other prompts about the answer"
    reference: ClassVar[str] = "Wightman et al., TrustNLP 2023"
    cost: ClassVar[str] = "score: P products with the classes"
    columns: ClassVar[tuple[str, ...]] = ("prompts",)
    varied_field: ClassVar[str] = "text"
