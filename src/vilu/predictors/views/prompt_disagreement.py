"""Disagreement of prompts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from vilu.predictors.views.disagreement import Disagreement
from vilu.types import Batch


@dataclass
class PromptDisagreement(Disagreement):
    """Prompt disagreement: how much other wordings of the candidates doubt the answer.

    The looks (see ``Disagreement``) are the logits of the image against the column ``prompts`` (K, P, D), one prompt at
    a time. Captions work too, where the column holds P paraphrases of each.

    Source: the agreement of prompts as a confidence is that of Wightman et al., TrustNLP 2023, for language models; the
    prompts are CLIP's ensemble of templates (Radford et al., ICML 2021), apart instead of averaged.
    """

    name: ClassVar[str] = "prompt_disagreement"
    summary: ClassVar[str] = "doubt of other prompts about the answer"
    reference: ClassVar[str] = "Wightman et al., TrustNLP 2023"
    cost: ClassVar[str] = "score: P products with the classes"
    columns: ClassVar[tuple[str, ...]] = ("prompts",)

    def _looks(self, batch: Batch) -> Iterator[Tensor]:
        for text in batch.columns["prompts"].unbind(dim=1):
            yield replace(batch, text=text).logits
