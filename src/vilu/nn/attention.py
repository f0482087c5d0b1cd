"""The two published forms of ViLU's cross-attention, image (query) over candidate texts (keys, values).

Both return the attention weights and leave the value projection to the caller as a matrix, so that the chain
weights @ text @ value.T @ next_layer.T can be multiplied in its cheapest order: with K candidates fewer than B
rows nothing of size (B, D) has to be projected at all.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class CrossAttention(nn.Module, ABC):
    """Attention weights (B, K) of images over texts, and the matrix that projects the values."""

    def weights(self, image: Tensor, text: Tensor, logit_scale: float) -> Tensor:
        """(B, K) rows that sum to one, always computed in float32.

        Args:
            image: (B, D) unit-norm embeddings.
            text: (K, D) unit-norm embeddings.
            logit_scale: The VLM's own multiplier of the cosine.
        """
        with torch.autocast(image.device.type, enabled=False):
            query, key, scale = self.bilinear(logit_scale)
            return torch.softmax(scale * torch.linalg.multi_dot([image, query.T, key, text.T]), dim=-1)

    @abstractmethod
    def bilinear(self, logit_scale: float) -> tuple[Tensor, Tensor, float]:
        """Query and key matrices (D, D) and the multiplier of their product."""

    @property
    @abstractmethod
    def value(self) -> Tensor:
        """(D, D) projection of the values."""


class OfficialAttention(CrossAttention):
    """As in the released code: identity-initialised projections, one matrix for keys and values, scale s.

    alpha = softmax_j(s (W_v z_v) . (W_t z_tj)), attended text = sum_j alpha_j W_t z_tj. At initialisation alpha is
    the zero-shot posterior.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.image = nn.Parameter(torch.eye(dim))
        self.text = nn.Parameter(torch.eye(dim))

    def bilinear(self, logit_scale: float) -> tuple[Tensor, Tensor, float]:
        """W_v, W_t and the VLM's logit scale."""
        return self.image, self.text, logit_scale

    @property
    def value(self) -> Tensor:
        """W_t, shared with the keys."""
        return self.text


class PaperAttention(CrossAttention):
    """As written in the paper: W_Q, W_K, W_V and the temperature 1/sqrt(d).

    alpha = softmax_j((W_Q z_v) . (W_K z_tj) / sqrt(d)), attended text = sum_j alpha_j W_V z_tj. The paper states no
    initialisation; Xavier-uniform is what torch's own attention uses.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query = nn.Parameter(nn.init.xavier_uniform_(torch.empty(dim, dim)))
        self.key = nn.Parameter(nn.init.xavier_uniform_(torch.empty(dim, dim)))
        self.value_projection = nn.Parameter(nn.init.xavier_uniform_(torch.empty(dim, dim)))

    def bilinear(self, logit_scale: float) -> tuple[Tensor, Tensor, float]:  # noqa: ARG002 - the paper's form ignores it
        """W_Q, W_K and 1/sqrt(d)."""
        return self.query, self.key, 1 / math.sqrt(len(self.query))

    @property
    def value(self) -> Tensor:
        """W_V."""
        return self.value_projection


ATTENTION: dict[str, type[OfficialAttention] | type[PaperAttention]] = {
    "official": OfficialAttention,
    "paper": PaperAttention,
}
"""Attention forms by name."""
