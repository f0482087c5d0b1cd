"""Distance to the k-th nearest training image."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import Tensor

from vilu.nn.train import Rows
from vilu.predictors.bank.search import BankPredictor, Count, distance, draw_rows, gather, nearest
from vilu.types import Batch


@dataclasses.dataclass
class KNNDistance(BankPredictor):
    """Distance to the k-th nearest training image: u = ||z - z_(k)||, z of unit norm.

    It says how unusual an image is, whatever the candidates are and whatever was answered: it uses no class labels and
    works on captions. With fewer than k training images it is the distance to the farthest of them.

    Args:
        k: Which neighbour.

    Source: Sun et al., ICML 2022. Failure-prediction benchmarks search only the first 1,000 training images; here all
    of them, up to ``max_bank``.
    """

    name: ClassVar[str] = "knn_distance"
    summary: ClassVar[str] = "distance to the k-th nearest training image (Sun et al. 2022)"
    reference: ClassVar[str] = "Sun et al., ICML 2022"
    cost: ClassVar[str] = "fit: copies the images; score: one product with the bank"
    tensors: ClassVar[tuple[str, ...]] = ("bank",)

    k: Count = 50

    def _fit_tensors(self, train: Rows, failure: Tensor) -> dict[str, Tensor]:  # noqa: ARG002
        return {"bank": gather(draw_rows(train, self.max_bank, self.seed)[0])}

    def _uncertainty(self, batch: Batch) -> Tensor:
        similarity, _ = nearest(batch.image, self.learned_["bank"], self.k)
        return distance(similarity[:, -1])
