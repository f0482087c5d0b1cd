"""ViLU, the published method."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from vilu.nn.heads import FailureHead
from vilu.nn.losses import FailureWeight
from vilu.nn.train import Loss
from vilu.predictors.heads.head import HeadPredictor
from vilu.predictors.heads.lvu import LOSSES


@dataclasses.dataclass
class ViLU(HeadPredictor):
    """ViLU: cross-attention over all candidates + the predicted caption + the image, an MLP, weighted BCE.

    u = sigmoid(g(z_v, sum_j alpha_j W z_tj, z_t̂)), g an MLP [512, 256, 128, 1] with ReLU; L = weighted BCE on the
    failure of the zero-shot answer, with weight log(1 + N_s / N_f) on failures.

    Args:
        attention: "official" (released code: identity start, shared key/value, logit scale), "paper" (W_Q, W_K, W_V,
            1/sqrt(d)), or None.
        predicted_caption: Whether the embedding of the zero-shot answer is an input.
        mcm_input: Whether max_j p_j is an input (supplement, B.2: used for all transfer experiments).
        loss: "bce", or the regression "mse" of the true class's probability (the paper's ablation; as ``LVU``).

    Source: ViLU, ICCV 2025. Differs from the released code: labels, similarities and losses are in float32; the frozen
    attention really is frozen; the weight is bounded; selection never sees the test set; the output is the failure, not
    the confidence.
    """

    name: ClassVar[str] = "vilu"
    summary: ClassVar[str] = "cross-attention over all texts + predicted caption + image (ViLU, ICCV 2025)"
    reference: ClassVar[str] = "Lafon et al., ICCV 2025"
    cost: ClassVar[str] = "fit: 6,000 steps of an MLP; score: 1 MFLOP a row"

    attention: Literal["official", "paper"] | None = "official"
    predicted_caption: bool = True
    mcm_input: bool = False
    loss: Literal["bce", "mse"] = "bce"

    def _build_head(self, dim: int) -> FailureHead:
        return FailureHead(
            dim, self.hidden, attention=self.attention, predicted_caption=self.predicted_caption, mcm=self.mcm_input
        )

    @property
    def learns_failure(self) -> bool:
        """Whether the loss is weighted BCE."""
        return self.loss == "bce"

    def _loss(self, weight: FailureWeight) -> Loss:
        return LOSSES[self.loss](weight)
