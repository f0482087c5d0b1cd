"""The failure head: ViLU's three-part embedding and its MLP."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from vilu.nn.attention import ATTENTION, CrossAttention
from vilu.nn.dropout import Dropout
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
        dropout: Applied to every hidden activation; None for none, as published.

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
        dropout: Dropout | None = None,
    ) -> None:
        super().__init__()
        widths = {
            "image": dim,
            "attended": dim * (attention is not None),
            "caption": dim * predicted_caption,
            "mcm": +mcm,
        }
        used = {part: width for part, width in widths.items() if width}
        outputs = [*hidden, 1]
        # He initialisation for inputs of unit norm, whose coordinates have a second moment of 1/D, not of one: torch's
        # default start makes the first activations so small that a run spends most of its steps on growing them.
        std = math.sqrt(2 * dim / sum(used.values()))
        self.first = nn.ParameterDict({part: torch.randn(outputs[0], width) * std for part, width in used.items()})
        self.first_bias = nn.Parameter(torch.zeros(outputs[0]))
        linears = [nn.Linear(*pair) for pair in itertools.pairwise(outputs)]
        for linear in linears:
            nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
            nn.init.zeros_(linear.bias)
        between = [] if dropout is None else [dropout]
        self.rest = nn.Sequential(*(layer for linear in linears for layer in (nn.ReLU(), *between, linear)))
        self.attention: CrossAttention | None = ATTENTION[attention](dim) if attention else None

    def forward(self, batch: Batch) -> Tensor:
        """(B,) failure logits in float32."""
        logit: Tensor = self.rest(self.first_layer(batch))
        return logit.squeeze(-1).float()

    def first_layer(self, batch: Batch) -> Tensor:
        """(B, H) first hidden layer before its activation: all of the head that sees more than the MLP's input."""
        # The first layer is a sum over the parts of z, each with a matrix of its own. Texts are projected before they
        # are averaged over or picked: K rows instead of B.
        hidden = torch.addmm(self.first_bias, batch.image, self.first["image"].T)
        if self.attention is not None:
            hidden = hidden + self.attention(batch.image, batch.text, batch.logit_scale, self.first["attended"])
        if "caption" in self.first:
            hidden = hidden + project_rows(batch.text, batch.prediction, self.first["caption"])
        if "mcm" in self.first:
            hidden = hidden + batch.zero_shot.max_probability[:, None] * self.first["mcm"].T
        return hidden


def project_rows(text: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """(B, H): ``text[rows] @ weight.T``, projecting each of K texts once where that takes fewer operations.

    They are then picked by a product with one-hot rows, since the gradient of an indexing is many times slower.
    """
    if len(text) * (1 + len(rows) / text.shape[1]) > len(rows):
        return text[rows] @ weight.T
    return functional.one_hot(rows, len(text)).to(text.dtype) @ (text @ weight.T)
