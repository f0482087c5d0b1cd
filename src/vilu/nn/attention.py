"""The two published forms of ViLU's cross-attention, image (query) over candidate texts (keys, values).

Keys and values are the texts themselves: matrices move to the side where they are multiplied with fewer rows, and what
is learned reaches the weights through the query alone. Shapes: B images, K candidate texts, D embedding width.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vilu.similarity import TILE_CELLS, row_blocks


class CrossAttention(nn.Module, ABC):
    """Texts averaged by how much an image attends to them."""

    def forward(self, image: Tensor, text: Tensor, logit_scale: float, after: Tensor) -> Tensor:
        """(B, H): sum_j alpha_j W_V t_j, times a matrix that follows. The weights alpha are computed in float32.

        Up to ``TILE_CELLS`` weights the chain weights @ text @ W_V.T @ after.T is multiplied in its cheapest order:
        with K candidates fewer than B rows nothing of size (B, D) has to be projected at all, and the weights are kept
        for the gradient. More are never there together, so that a pool of N pairs takes no N x N matrix: texts are
        averaged by ``attend``, which computes the weights again for the gradient, and the averages are projected.

        Args:
            image: (B, D) unit-norm embeddings.
            text: (K, D) unit-norm embeddings, without gradient.
            logit_scale: The VLM's own multiplier of the cosine.
            after: (H, D) matrix that is applied to the attended text.
        """
        with torch.autocast(image.device.type, enabled=False):
            query, key, scale = self.bilinear(logit_scale)
            if len(image) * len(text) > TILE_CELLS:
                chain = [attend(torch.linalg.multi_dot([image, query.T, key]), text, scale)]
            else:
                logits = scale * torch.linalg.multi_dot([image, query.T, key, text.T])
                chain = [torch.softmax(logits, dim=-1), text]
        attended: Tensor = torch.linalg.multi_dot([*chain, self.value.T, after.T])
        return attended

    @abstractmethod
    def bilinear(self, logit_scale: float) -> tuple[Tensor, Tensor, float]:
        """Query and key matrices (D, D) and the multiplier of their product."""

    @property
    @abstractmethod
    def value(self) -> Tensor:
        """(D, D) projection of the values."""


def attend(query: Tensor, text: Tensor, scale: float) -> Tensor:
    """softmax(scale * query @ text.T) @ text, (B, D), without a (B, K) tensor, forward or backward.

    Args:
        query: (B, D) float32.
        text: (K, D) float32, without gradient.
        scale: Multiplier of the products.

    Raises:
        ValueError: If the texts want a gradient.
    """
    if text.requires_grad:
        raise ValueError("an attention over so many texts gives them no gradient. Detach them.")
    apply: Callable[[Tensor, Tensor, float], Tensor] = _Attend.apply  # torch gives it no type
    return apply(query, text, scale)


class _Attend(torch.autograd.Function):
    """Forward torch's ``scaled_dot_product_attention``, backward three products of B x K x D operations, not its five.

    Its backward would compute gradients of keys and values too, and the encoders are frozen. The query's alone is

        P = softmax(scale * query @ text.T), dP = gradient @ text.T, d query = scale * P (dP - (P * dP).sum) @ text,

    made here in blocks of rows with ``TILE_CELLS`` weights.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, text: Tensor, scale: float) -> Tensor:  # noqa: ANN401 - torch gives it no type
        """Row blocks bound the memory also where torch has only its plain kernel."""
        # heads and batches of one: the fused kernels want four dimensions
        keys = text[None, None]
        parts = [query[None, None, part] for part in row_blocks(len(query), len(text), len(query))]
        attended = [functional.scaled_dot_product_attention(part, keys, keys, scale=scale) for part in parts]
        result = torch.cat(attended, dim=2)[0, 0]
        ctx.save_for_backward(query, text, result)
        ctx.scale = scale
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401 - torch gives it no type
        """Of the query; (P * dP).sum is gradient . result."""
        query, text, result = ctx.saved_tensors
        change, rows = torch.empty_like(query), max(TILE_CELLS // len(text), 1)
        blocks = (x.split(rows) for x in (query, gradients[0], result, change))
        with torch.autocast(query.device.type, enabled=False):
            for part, gradient, average, out in zip(*blocks, strict=True):
                weights = torch.softmax((part @ text.T).mul_(ctx.scale), dim=-1)
                towards = (gradient @ text.T).sub_((gradient * average).sum(dim=1, keepdim=True))
                torch.mm(towards.mul_(weights), text, out=out)
        return change.mul_(ctx.scale), None, None


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
