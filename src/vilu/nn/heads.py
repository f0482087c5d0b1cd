"""The failure head: ViLU's three-part embedding and its MLP."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vilu.nn.attention import ATTENTION, CrossAttention
from vilu.types import Batch

HIDDEN = (512, 256, 128)
"""Hidden widths of the published head (supplement, A.2)."""


class FailureHead(nn.Module):
    """Failure logit g of the joint embedding z = (z_v, attended text, z_t̂, MCM), each part but z_v optional.

    g(z) = MLP(z) with ReLU; the probability of failure is sigmoid(g). With every optional part left out this is the
    visual-only head (LVU).

    Args:
        dim: Embedding width D.
        hidden: Hidden widths of the MLP; its depth is ``len(hidden) + 1``.
        attention: "official", "paper", or None to leave the attended text out.
        predicted_caption: Whether z_t̂, the embedding of the zero-shot answer, is an input.
        mcm: Whether max_j p_j of the zero-shot posterior is an input (supplement, B.2).

    The order of the parts is that of the released code, not of the paper, so that its weights fit. Its output is a
    confidence; ours is its negative.

    Source: ViLU (ICCV 2025), Sec. 4 and supplement A.2, B.1, B.2.
    """

    def __init__(
        self,
        dim: int,
        hidden: Sequence[int] = HIDDEN,
        *,
        attention: str | None = "official",
        predicted_caption: bool = True,
        mcm: bool = False,
    ) -> None:
        super().__init__()
        self.parts = [dim, dim * (attention is not None), dim * predicted_caption, int(mcm)]
        self.attention: CrossAttention | None = ATTENTION[attention](dim) if attention else None
        widths = [*hidden, 1]
        self.first = nn.Linear(sum(self.parts), widths[0])
        layers = [layer for pair in itertools.pairwise(widths) for layer in (nn.ReLU(), nn.Linear(*pair))]
        self.rest = nn.Sequential(*layers)
        self._initialise(dim)

    @torch.no_grad()
    def _initialise(self, dim: int) -> None:
        """He initialisation for inputs of unit norm, whose coordinates have a second moment of 1/D, not of one.

        torch's default start makes the first activations so small that the published learning rates spend most of a run
        on growing them.
        """
        self.first.weight.normal_(std=math.sqrt(2 * dim / self.first.in_features))
        for layer in self.rest:
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.first.bias)

    def forward(self, batch: Batch) -> Tensor:
        """(B,) failure logits in float32."""
        for_image, for_attended, for_caption, for_mcm = self.first.weight.split(self.parts, dim=1)
        hidden = torch.addmm(self.first.bias, batch.image, for_image.T)
        # The first layer is a sum over the parts of z. Texts are projected before they are gathered or averaged over:
        # K rows instead of B.
        if self.attention is not None:
            alpha = self.attention.weights(batch.image, batch.text, batch.logit_scale)
            hidden = hidden + torch.linalg.multi_dot([alpha, batch.text, self.attention.value.T, for_attended.T])
        if self.parts[2]:
            hidden = hidden + project_rows(batch.text, batch.prediction, for_caption)
        if self.parts[3]:
            hidden = hidden + max_probability(batch)[:, None] * for_mcm.T
        logit: Tensor = self.rest(hidden)
        return logit.squeeze(-1).float()


def project_rows(text: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """(B, H): ``text[rows] @ weight.T``, projecting each of K texts once when they are fewer than the rows."""
    return (text @ weight.T)[rows] if len(text) <= len(rows) else text[rows] @ weight.T


def max_probability(batch: Batch) -> Tensor:
    """(B,) max_j p_j of the zero-shot posterior, float32."""
    with torch.autocast(batch.image.device.type, enabled=False):
        return torch.softmax(batch.logits, dim=-1).amax(dim=-1)
