"""Rel-U: a learned penalty for confusing two classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from vilu.embeddings.rows import SCORING_BATCH, Rows
from vilu.embeddings.source import Batch, EmbeddingSource, log_posterior
from vilu.errors import UsageError
from vilu.predictors.bank.closed_set import ClosedSet
from vilu.predictors.contract.labelled import Needs, class_texts
from vilu.predictors.contract.predictor import CLASSES, Learnt

MAX_CLASSES = 10_000  # the penalties for all pairs take 800 MB in float64


@dataclass
class RelU(ClosedSet):
    """Relative uncertainty: u = p D p^T, with a learned penalty for confusing two classes.

    p = softmax(l / T) is a row vector, with l the logits. D (K, K) holds the penalties, and
    maximises

        trade_off * E[p D p^T over failures] - (1 - trade_off) * E[p D p^T over successes]

    over symmetric matrices without negative entries, with zeros on the diagonal and a Frobenius
    norm of at most 1. E is the mean. This objective is the inner product <M, D> with

        M = trade_off * E[p^T p over failures] - (1 - trade_off) * E[p^T p over successes].

    Therefore D is the positive part of M off the diagonal, divided by its norm. M is summed batch
    by batch as products (K, B) x (B, K), so no array has N K^2 entries.

    Without successes, M has only the failure term. Without failures, no entry of M is positive. If
    no entry of M off the diagonal is positive, every D has an objective <= 0. In this case D is
    taken as constant off the diagonal. Then u is proportional to the Gini impurity, so the row
    order is the same as by ``doctor`` at this temperature.

    Args:
        trade_off: Weight lambda of the failures. The successes have the weight 1 - lambda.
        temperature: Number T by which the logits are divided. The logits already contain the VLM's
            logit scale.

    Source: Dadalto et al., "A Data-Driven Measure of Relative Uncertainty for Misclassification
    Detection", ICLR 2024. The defaults are from ViLU, supplement A.3. The code by Dadalto et al.
    drops the last class if K is odd, stores p^T p for every row, and scores through an N x N
    matrix. None of this is done here. Rows and columns of D are matched with the candidates by the
    class texts. So the candidates may be in any order, and some may be missing.

    Examples:
        >>> import numpy as np, vilu
        >>> image = [[0.8, 0.6, 0.0], [0.8, 0.0, 0.6]]  # both are answered 0
        >>> text = np.eye(3)
        >>> target = [1, 0]  # the first image is class 1 but answered 0: a confusion
        >>> data = vilu.Embeddings(image, text, target=target, logit_scale=5.0)
        >>> vilu.PREDICTORS["rel_u"]().fit(data).predict_uncertainty(data).round(2)
        array([0.15, 0.  ])
    """

    name: ClassVar[str] = "rel_u"
    summary: ClassVar[str] = (
        "posterior under a learned penalty of confusing two classes (Rel-U, ICLR 2024)"
    )
    reference: ClassVar[str] = "Dadalto et al., ICLR 2024"
    cost: ClassVar[str] = "fit: one pass; score: K^2 products per row"
    looks_at: ClassVar[frozenset[str]] = frozenset({"logits"})
    # name, type (f float32, d float64, i int64, ? bool) and sizes for each learned tensor
    _forms: ClassVar[str] = "penalty:dKK classes:fKD"
    no_captions: ClassVar[str | None] = (
        "its penalty is one of confusing two classes, and captions have no classes"
    )

    needs: ClassVar[Needs] = "failure"

    trade_off: Annotated[float, Field(ge=0, le=1)] = 0.15
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.5

    def _learn(
        self,
        train: Rows,
        failure: Tensor,
        validation: EmbeddingSource | None,  # noqa: ARG002
    ) -> Learnt:
        if train.source.n_candidates > MAX_CLASSES:
            raise UsageError(
                f"{self.name} keeps a penalty for every pair of classes, "
                f"so it takes at most {MAX_CLASSES:,} of them. "
                f"Got {train.source.n_candidates:,}. "
                "Take another method (see `vilu list predictors`)."
            )
        n_failures = int(failure.sum())
        n_successes = len(failure) - n_failures
        weight_of_failure = self.trade_off / max(n_failures, 1)
        weight_of_success = (1 - self.trade_off) / max(n_successes, 1)
        moment = torch.zeros((), dtype=torch.float32)  # M, which is (K, K) after the first batch
        for batch in train.batches(SCORING_BATCH):
            batch_on_device = batch.to(self.device_)
            log_p = log_posterior(batch_on_device, self.temperature)
            p = log_p.exp()
            signed_weight = torch.where(
                batch_on_device.failure == 1, weight_of_failure, -weight_of_success
            )
            weight = signed_weight.float().to(p)
            moment = moment.to(p) + p.T @ (weight[:, None] * p)
        penalty = best_penalty(moment).cpu()
        text = class_texts(train)
        return Learnt({"penalty": penalty, CLASSES: text})

    def _score(self, batch: Batch) -> Tensor:
        log_p = log_posterior(batch, self.temperature)
        p = log_p.exp()
        classes = self.classes_of(batch.text)
        class_of_candidate = classes.to(p.device)
        penalty_of_classes = self.tensor("penalty", p.device)
        penalty = penalty_of_classes[class_of_candidate][:, class_of_candidate]
        return (p @ penalty * p).sum(dim=-1)


def best_penalty(moment: Tensor) -> Tensor:
    """Find penalties D (K, K) with the largest inner product <moment, D>.

    D is symmetric, has zeros on the diagonal and has the Frobenius norm 1. If no entry of
    ``moment`` off the diagonal is positive, D is constant off the diagonal.
    """
    positive_part = (moment + moment.T).relu().fill_diagonal_(0)
    if not positive_part.any():
        positive_part = torch.ones_like(moment).fill_diagonal_(0)
    penalty: Tensor = positive_part / torch.linalg.matrix_norm(positive_part)
    return penalty
