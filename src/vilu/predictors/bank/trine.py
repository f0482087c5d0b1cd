"""TRINE."""

from __future__ import annotations

import dataclasses
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from vilu.nn.train import Rows
from vilu.predictors.bank.search import BankPredictor, Count, draw_rows, gather, labels, nearest
from vilu.predictors.labelled import ClosedSetPredictor
from vilu.types import Batch


@dataclasses.dataclass
class TRINE(BankPredictor, ClosedSetPredictor):
    """TRINE: margin of the support that the nearest training images and the texts give the predicted class.

    Neighbour r = 0 ... k-1 of class y_r has the weight
    w_r = exp(-decay r) * (1 + cos(z, z_r)) / 2 * (1 + cos(z_t̂, z_{t_{y_r}})) / 2,
    a class the support S_c = sum_{r: y_r = c} w_r / sum_r w_r, and u = 1 - (S_t̂ - max_{c != t̂} S_c), in [0, 2].
    A class without training images has no support, so that a prediction of it gets u > 1. With fewer than k training
    images all of them count.

    Args:
        k: Number of neighbours.
        decay: How fast a neighbour's weight falls with its rank.

    Source: the repository sgchr273/TRINE (2026), its support margin. Differs from it: a bank smaller than k is used
    whole instead of refused.
    """

    name: ClassVar[str] = "trine"
    summary: ClassVar[str] = "margin of rank-weighted neighbours of the predicted class, with their texts (TRINE)"
    reference: ClassVar[str] = "sgchr273/TRINE, 2026"
    cost: ClassVar[str] = "fit: copies the images; score: one product with the bank"
    tensors: ClassVar[tuple[str, ...]] = ("bank", "labels")

    k: Count = 20
    decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1

    def _fit_tensors(self, train: Rows, failure: Tensor) -> dict[str, Tensor]:  # noqa: ARG002
        kept, _ = draw_rows(train, self.max_bank, self.seed)
        return {"bank": gather(kept), "labels": labels(kept)}

    def _class_uncertainty(self, batch: Batch, classes: Tensor) -> Tensor:
        similarity, index = nearest(batch.image, self.learned_["bank"], self.k)
        label = self._tensor("labels", index.device)[index]
        text = self._tensor("classes", index.device)
        answer = classes[batch.prediction]
        text_similarity = (text[answer] @ text.T).gather(1, label)
        rank = torch.arange(similarity.shape[1], device=index.device)
        weight = torch.exp(-self.decay * rank) * (1 + similarity) / 2 * (1 + text_similarity) / 2
        support = text.new_zeros(len(label), len(text))
        for one in range(label.shape[1]):  # one neighbour a time: sums in one order on every device
            support.scatter_add_(1, label[:, one : one + 1], weight[:, one : one + 1])
        support = support / weight.sum(dim=1, keepdim=True)
        mine = support.gather(1, answer[:, None]).squeeze(1)
        rival = support.scatter(1, answer[:, None], -1.0).amax(dim=1)
        return 1 - (mine - rival)
