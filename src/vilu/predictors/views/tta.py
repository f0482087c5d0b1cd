"""Test-time augmentation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from vilu.predictors.views.disagreement import Disagreement
from vilu.types import Batch


@dataclass
class TTA(Disagreement):
    """Test-time augmentation: how much V augmented views of the image doubt the answer on the image itself.

    The looks (see ``Disagreement``) are the logits of the column ``views`` (B, V, D) against the same candidates.

    Source: Ayhan and Berens, MIDL 2018, who take the spread of the predictions; their mean instead is Ashukha et al.,
    ICLR 2020. Here it is the mean of the original answer's probability, since that is the answer whose failure is
    predicted: the mean of all may prefer another.
    """

    name: ClassVar[str] = "tta"
    summary: ClassVar[str] = "test-time augmentation: doubt of augmented views about the answer"
    reference: ClassVar[str] = "Ayhan and Berens, MIDL 2018"
    cost: ClassVar[str] = "embed: V passes an image; score: V products with the classes"
    columns: ClassVar[tuple[str, ...]] = ("views",)

    def _looks(self, batch: Batch) -> Iterator[Tensor]:
        for view in batch.columns["views"].unbind(dim=1):
            yield replace(batch, image=view).logits
