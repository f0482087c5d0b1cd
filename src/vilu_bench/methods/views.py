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
    """u = 1/(R + 1) sum_r d_r over the original input (r = 0) and R variants of it.

    d_r measures how much variant r disagrees with the original answer t̂:

    - statistic="mean": d_r = 1 - p_r(t̂), where p_r is the zero-shot posterior of the variant. u is
      one minus the mean probability.
    - statistic="vote": d_r = 1 if variant r has another answer than t̂, else 0. u is the share of
      variants that disagree. It has only R + 1 possible values, so many rows tie.

    The variants are scored one after the other: the logits of only one variant are in memory at a
    time.

    Args:
        statistic: "mean" or "vote".
    """

    is_probability: ClassVar[bool] = True
    varied: ClassVar[str]  # field of a batch that a variant replaces: "image" or "text"

    statistic: Statistic = "mean"

    def _score(self, batch: Batch) -> Tensor:
        doubt = DOUBT[self.statistic]
        answer = batch.prediction[:, None]
        variants = batch.columns[self.columns[0]].unbind(dim=1)
        total = doubt(batch.logits, answer)
        for variant in variants:
            changes: dict[str, Any] = {self.varied: variant}
            total = total + doubt(replace(batch, **changes).logits, answer)
        return total / (1 + len(variants))


def improbability(logits: Tensor, answer: Tensor) -> Tensor:
    """One minus the probability of the answers (B, 1): (B,) float64.

    Computed without cancellation for probabilities near one.
    """
    logits = float64(logits)
    answer = answer.to(logits.device)
    over_answer = logits - logits.gather(1, answer)
    rivals = over_answer.scatter(1, answer, -math.inf)
    return torch.sigmoid(torch.logsumexp(rivals, dim=1))


def dissent(logits: Tensor, answer: Tensor) -> Tensor:
    """1 where the largest logit is not that of ``answer`` (B, 1), else 0: (B,) float64."""
    return float64(logits.argmax(dim=1) != answer.squeeze(1))


DOUBT: dict[Statistic, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": improbability,
    "vote": dissent,
}


@dataclass
class TTA(Disagreement):
    """Test-time augmentation: how much V augmented views disagree with the image's own answer.

    The variants (see ``Disagreement``) are the augmented views in the column ``views`` (B, V, D),
    with the same candidates.

    Source: Ayhan and Berens, MIDL 2018, use the spread of the predictions; Ashukha et al., ICLR
    2020, use their mean. Here u uses the mean probability of the original answer, because the
    failure of the original answer is predicted. The largest mean probability may be that of another
    candidate.

    Examples:
        >>> import numpy as np, vilu
        >>> # the last view of the first image looks like the other class
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
    """Prompt disagreement: how much other wordings of the candidates disagree with the answer.

    The variants (see ``Disagreement``) are the P prompts in the column ``prompts`` (K, P, D). It
    also works on captions, where the column holds P paraphrases of each caption.

    Source: Wightman et al., TrustNLP 2023, use the agreement of prompts as a confidence of language
    models. The prompts are CLIP's ensemble of templates (Radford et al., ICML 2021), kept separate
    where CLIP averages them.

    Examples:
        >>> import numpy as np, vilu
        >>> # one more wording per class; with the second class's wording, p = 1/2
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
