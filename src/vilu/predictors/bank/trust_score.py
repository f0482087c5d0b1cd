"""Trust score."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from vilu.nn.train import Rows
from vilu.predictors.bank.search import (
    Allowed,
    BankPredictor,
    Count,
    distance,
    draw_rows,
    gather,
    labels,
    nearest,
)
from vilu.predictors.labelled import ClosedSetPredictor
from vilu.types import Batch

FARTHEST = 2.0
"""Largest distance of two unit vectors."""
TINY = 1e-6


@dataclasses.dataclass
class TrustScore(BankPredictor, ClosedSetPredictor):
    """Inverse trust score: distance to the predicted class over distance to the nearest other class.

    u = (d(z, H_t̂) + 1e-6) / (min_{c != t̂} d(z, H_c) + 1e-6), d the Euclidean distance of unit vectors to the nearest
    of a set, and H_c the training images of class c without the share ``alpha`` whose k-th nearest image of their class
    (they count themselves first) is farthest. The distance to a class without images is 2, the largest there is.

    Args:
        alpha: Share of each class left out as its sparsest; 0 keeps all.
        k: Neighbour whose distance tells how sparse the surroundings of an image are; at most the size of the class.

    Source: Jiang et al., NeurIPS 2018, algorithms 1 and 2 (alpha = 0 and k = 10 as in its released code). Differs from
    that code: distances are to the nearest image, as in the paper; the code takes the second nearest.
    """

    name: ClassVar[str] = "trust_score"
    summary: ClassVar[str] = "distance to the predicted class over that to the nearest other (Jiang et al. 2018)"
    reference: ClassVar[str] = "Jiang et al., NeurIPS 2018"
    cost: ClassVar[str] = "fit: copies the images; score: two products with the bank"
    tensors: ClassVar[tuple[str, ...]] = ("bank", "labels")

    alpha: Annotated[float, Field(ge=0, lt=1)] = 0.0
    k: Count = 10

    def _fit_tensors(self, train: Rows, failure: Tensor) -> dict[str, Tensor]:  # noqa: ARG002
        kept, _ = draw_rows(train, self.max_bank, self.seed)
        bank, label = gather(kept), labels(kept)
        if self.alpha > 0:
            dense = self._dense(bank, label)
            bank, label = bank[dense], label[dense]
        return {"bank": bank, "labels": label}

    def _dense(self, bank: Tensor, label: Tensor) -> Tensor:
        """Sorted positions of the images that are kept."""
        kept = []
        for c in label.unique():
            members = (label == c).nonzero().squeeze(1)
            radius = distance(nearest(bank[members], bank[members], self.k)[0][:, -1]).double()
            kept.append(members[radius <= radius.quantile(1 - self.alpha)])
        return torch.cat(kept).sort().values

    def _class_uncertainty(self, batch: Batch, classes: Tensor) -> Tensor:
        answer = classes[batch.prediction]
        label = self._tensor("labels", answer.device)
        mine = self._distance(batch.image, lambda queries, rows: answer[queries, None] == label[rows])
        rival = self._distance(batch.image, lambda queries, rows: answer[queries, None] != label[rows])
        return (mine + TINY) / (rival + TINY)

    def _distance(self, image: Tensor, allowed: Allowed) -> Tensor:
        """(B,) distance to the nearest image that counts."""
        similarity, index = (found[:, 0] for found in nearest(image, self.learned_["bank"], 1, allowed))
        closest = self.learned_["bank"][index.cpu()].to(image.device)
        # From the coordinates: 2 - 2 cos has no digits left for near duplicates.
        found = torch.linalg.vector_norm(normalize(image, dim=1) - closest, dim=1)
        return torch.where(similarity == -math.inf, FARTHEST, found)
