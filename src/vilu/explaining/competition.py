"""What an answer competes with: the candidates that a method gives weight to."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vilu.errors import UsageError
from vilu.explaining.pooled import pooled
from vilu.nn.attention import CrossAttention
from vilu.predictors.bank.search import leaders
from vilu.predictors.base import FailurePredictor
from vilu.predictors.free.posterior import log_posterior
from vilu.predictors.heads.deep_ensemble import DeepEnsemble
from vilu.predictors.heads.head import HeadPredictor
from vilu.predictors.heads.vilu_plus import ViLUPlus
from vilu.types import UNKNOWN, Batch, EmbeddingSource


class Weights(NamedTuple):
    """Weights of candidates.

    Attributes:
        meaning: What they are, in words.
        of: A batch to its (B, K) weights, each row of sum one.
    """

    meaning: str
    of: Callable[[Batch], Tensor]


def weights_of(predictor: FailurePredictor) -> Weights:
    """The weights that a method has for candidates.

    Methods with a trained attention: alpha_j = softmax_j(scale (W_Q z_v) . (W_K z_tj)), averaged over the members of an
    ensemble. ``vilu_plus``: the posterior q of its pooled experts. All others: the zero-shot posterior p.
    """
    attentions = trained_attentions(predictor)
    if attentions:
        members = f", mean of {len(attentions)} members" if len(attentions) > 1 else ""
        return Weights(f"weights of the trained attention{members}", lambda batch: _attention(attentions, batch))
    if isinstance(predictor, ViLUPlus):
        return Weights("posterior of the pooled experts", lambda batch: pooled(predictor, batch).logits.softmax(dim=1))
    return Weights("zero-shot posterior", lambda batch: log_posterior(batch).exp())


def trained_attentions(predictor: FailurePredictor) -> list[CrossAttention]:
    """The attention of every head of a method; none where it has no head, or one without attention."""
    if not isinstance(predictor, HeadPredictor) or predictor.constant_ is not None:
        return []
    members = list(predictor.members_.values()) if isinstance(predictor, DeepEnsemble) else [predictor]
    heads = [member.head_ for member in members]
    return [head.attention for head in heads if head is not None and head.attention is not None]


def _attention(attentions: list[CrossAttention], batch: Batch) -> Tensor:
    """(B, K) mean of the attentions' weights."""
    total = torch.zeros(len(batch.image), len(batch.text), device=batch.image.device)
    with torch.no_grad(), torch.autocast(batch.image.device.type, enabled=False):
        for attention in attentions:
            query, key, scale = attention.to(batch.image.device).bilinear(batch.logit_scale)
            total += torch.softmax(scale * torch.linalg.multi_dot([batch.image, query.T, key, batch.text.T]), dim=-1)
    return total / len(attentions)


def leading(weights: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The ``n`` largest weights (B, n) of (B, K), falling, and their candidates; of equal ones the lowest first."""
    return leaders(weights, min(n, weights.shape[1]))


def strongest_competitor(predictor: FailurePredictor, data: EmbeddingSource) -> NDArray[np.int64]:
    """(N,) candidate of the largest weight beside the zero-shot answer, -1 for rows that cannot be scored.

    Raises:
        UsageError: If the candidates are captions of a pool, which have no number outside it.
    """
    if data.pool_size is not None:
        raise UsageError("captions have no classes, so an answer's competitors have no common name. Give class data.")
    weights = weights_of(predictor)
    found = np.full(len(data), UNKNOWN, dtype=np.int64)
    with torch.no_grad():
        for batch, _ in predictor.scored(data):  # its answers are those of ``vilu.score``
            given = weights.of(batch)
            # equal texts are one answer, whatever their number
            answer = batch.first_equal[None] == batch.first_equal[batch.prediction][:, None]
            best = given.masked_fill(answer.to(given.device), -1.0).argmax(dim=1)
            found[batch.index.numpy(force=True)] = best.cpu().numpy()
    return found
