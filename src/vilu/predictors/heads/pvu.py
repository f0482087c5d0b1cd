"""Pretrained visual uncertainties."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from vilu.predictors.free.posterior import log_posterior
from vilu.predictors.heads.head import Count
from vilu.predictors.heads.network import NetworkPredictor, perceptron
from vilu.similarity import float64
from vilu.types import Batch

MARGIN = 0.1
FLOOR = 1e-6


@dataclasses.dataclass
class PVU(NetworkPredictor):
    """Pretrained visual uncertainties: u = softplus(g(z_v)) + 1e-6, trained on the VLM's own loss L = -log p_target.

    g is an MLP D -> 512 -> 512 -> 1 with leaky ReLUs on the image embedding alone. With loss="ranking" it learns only
    the order of the losses: over consecutive pairs of a shuffled batch the mean of
    max(0, -sign(L_1 - L_2) (u_1 - u_2) + 0.1); an odd last row is left out. With loss="mse" it learns the values, the
    mean of (u - L)^2. Labels are needed, failures are not. Captions: the loss is that of the pool drawn.

    Args:
        hidden: Hidden widths of the MLP.
        loss: "ranking" or "mse".

    Source: Kirchhof et al., "Pretrained Visual Uncertainties", 2024. Pretrained there on ImageNet-21k, here fitted to
    the rows at hand: about 6,000 steps instead of 32 passes over 200,000 images, with the same AdamW (learning rate
    1e-3, betas 0.8 and 0.95, decay 1e-4) and cosine. Embeddings have unit norm and go in times sqrt(D), so that their
    coordinates have the size of features. The losses are float64, which keeps sure rows apart.
    """

    name: ClassVar[str] = "pvu"
    summary: ClassVar[str] = "image-only head that ranks the VLM's own losses (Pretrained Visual Uncertainties)"
    reference: ClassVar[str] = "Kirchhof et al., 2024"
    cost: ClassVar[str] = "fit: 6,000 steps of an MLP; score: 1 MFLOP a row"

    hidden: tuple[Count, ...] = (512, 512)
    loss: Literal["ranking", "mse"] = "ranking"

    def _build(self, dim: int) -> nn.Module:
        return ImageNetwork(dim, self.hidden)

    def _loss(self, batch: Batch, output: Tensor) -> Tensor:
        backbone = -batch.log_probability(log_posterior(batch), batch.target)
        return LOSSES[self.loss](functional.softplus(output) + FLOOR, backbone.to(output.device))

    def _score(self, batch: Batch, output: Tensor) -> Tensor:  # noqa: ARG002 - the network saw the image
        return functional.softplus(float64(output)) + FLOOR


class ImageNetwork(nn.Module):
    """An MLP on the image embedding."""

    def __init__(self, dim: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.scale = math.sqrt(dim)
        self.layers = perceptron([dim, *hidden, 1])

    def forward(self, batch: Batch) -> Tensor:
        """(B,) float32."""
        output: Tensor = self.layers(batch.image * self.scale)
        return output.squeeze(-1)


def ranking_loss(uncertainty: Tensor, backbone: Tensor) -> Tensor:
    """Mean hinge of the consecutive pairs of (B,) uncertainties, against the order of the backbone's losses (B,)."""
    pairs = len(backbone) // 2
    (u_1, u_2), (loss_1, loss_2) = (part[: 2 * pairs].view(pairs, 2).unbind(dim=1) for part in (uncertainty, backbone))
    sign = torch.sign(loss_1 - loss_2).to(uncertainty.dtype)
    return functional.relu(MARGIN - sign * (u_1 - u_2)).sum() / max(pairs, 1)


def regression_loss(uncertainty: Tensor, backbone: Tensor) -> Tensor:
    """Mean squared difference of the uncertainties (B,) from the backbone's losses (B,)."""
    return functional.mse_loss(uncertainty, backbone.to(uncertainty.dtype))


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"ranking": ranking_loss, "mse": regression_loss}
"""Of uncertainties and the backbone's losses, by name."""
