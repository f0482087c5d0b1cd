"""What the pooled logits of ViLU+ are made of."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from vilu.errors import DataError
from vilu.nn.experts import Experts
from vilu.nn.supervised import FEATURES
from vilu.predictors.heads.vilu_plus import ViLUPlus
from vilu.similarity import float64
from vilu.types import Batch


class Pooled(NamedTuple):
    """Three parts whose sum is sum_m w_m l_m, the pooled logits, up to a constant of every row.

    Attributes:
        zero_shot: (B, K) float64 tempered zero-shot logits, times sum_m w_m.
        texts: (1, K) float64 what was learned about the candidates whatever the image: the residual of the experts at
            the mean training image.
        image: (B, K) float64 what the image adds to that residual.
    """

    zero_shot: Tensor
    texts: Tensor
    image: Tensor

    @property
    def logits(self) -> Tensor:
        """(B, K) their sum."""
        return self.zero_shot + self.texts + self.image


def pooled(predictor: ViLUPlus, batch: Batch) -> Pooled:
    """The pooled logits of a batch in their parts.

    l_m = a l0 + r_m(x) for every expert m: l0 the zero-shot logits, a their temperature, r_m the expert's residual, x
    the standardised image, which is zero at the training mean. So sum_m w_m l_m = (sum_m w_m) a l0 + R(0) +
    (R(x) - R(0)) with R = sum_m w_m r_m.

    Raises:
        DataError: If the predictor holds no experts.
    """
    if predictor.experts_ is None or predictor.pool_ is None:
        raise DataError(f"this {predictor.name} holds no experts; its file is damaged.")
    experts = predictor.experts_.to(batch.image.device)
    offset, logits = _experts(experts, batch)
    mean_offset, mean_logits = _experts(experts, _mean_image(experts, batch))
    weights = predictor.pool_.to(logits.device) if logits.shape[1] > 1 else torch.ones_like(logits[0, :1, 0])
    texts = torch.einsum("m,bmk->bk", weights, mean_logits - mean_offset[:, None])
    residual = torch.einsum("m,bmk->bk", weights, logits - offset[:, None])
    return Pooled(weights.sum() * offset, texts, residual - texts)


def _experts(experts: Experts, batch: Batch) -> tuple[Tensor, Tensor]:
    """(B, K) offset that all experts share, and their (B, M, K) logits, float64."""
    offset = experts.attention.offset(batch, experts.attention.match(batch.text))
    return float64(offset), float64(experts(batch))


def _mean_image(experts: Experts, batch: Batch) -> Batch:
    """One row, the mean training image, against the candidates of a batch."""
    inputs = experts.attention.inputs
    columns = dict(batch.columns) | ({FEATURES: inputs.features.mean[None]} if inputs.on_features else {})
    one = batch.rows(slice(0, 1))
    return dataclasses.replace(one, image=inputs.image.mean[None], columns=columns)
