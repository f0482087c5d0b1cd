"""ViLU with Monte-Carlo dropout."""

from __future__ import annotations

import dataclasses
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from vilu.nn.dropout import Dropout
from vilu.nn.heads import FailureHead
from vilu.predictors.heads.head import Count
from vilu.predictors.heads.vilu import ViLU
from vilu.types import Batch


@dataclasses.dataclass
class MCDropout(ViLU):
    """ViLU's head with dropout, which stays on at scoring: u = 1/M sum_m sigmoid(g_m(z)), g_m the head under mask m.

    Dropout follows every hidden activation of the MLP. The M masks are drawn from the seed and are the same for every
    row, that is M thinned heads: a row has the same score in any company. Selection sees the head without dropout.

    Args:
        dropout: Share of units that is dropped.
        passes: M.

    Source: Gal and Ghahramani, ICML 2016, Eq. 6, where every input meets masks of its own.
    """

    name: ClassVar[str] = "mc_dropout"
    summary: ClassVar[str] = "ViLU with dropout, mean over thinned heads"
    reference: ClassVar[str] = "Gal and Ghahramani, ICML 2016"
    cost: ClassVar[str] = "fit: as vilu; score: M passes of the MLP"

    dropout: Annotated[float, Field(gt=0, lt=1)] = 0.1
    passes: Count = 20

    def _build_head(self, dim: int) -> FailureHead:
        return FailureHead(
            dim,
            self.hidden,
            attention=self.attention,
            predicted_caption=self.predicted_caption,
            mcm=self.mcm_input,
            dropout=Dropout(self.dropout, self.seed),
        )

    def _failure_probability(self, head: FailureHead, batch: Batch) -> Tensor:
        first, generator = head.first_layer(batch), torch.Generator().manual_seed(self.seed)
        total = torch.zeros(len(first), dtype=torch.float64)
        for _ in range(self.passes):
            hidden = first
            for layer in head.rest:
                if isinstance(layer, Dropout):
                    hidden = hidden * layer.mask(hidden.shape[1:], generator).to(hidden.device)
                else:
                    hidden = layer(hidden)
            total += torch.sigmoid(hidden.squeeze(-1).cpu().double())
        return total / self.passes
