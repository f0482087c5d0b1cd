"""The failure head: attention over the candidates, and a perceptron."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from vilu.embeddings.source import Batch
from vilu.errors import DataError
from vilu.predictors.nn.layers import dropout_mask, linear
from vilu.predictors.nn.processes import current_world


class Dropout(nn.Module):
    """In training, a unit is zero with probability ``rate``, else multiplied by 1 / (1 - rate).

    Outside training nothing happens. Masks are drawn on the CPU from a generator of their own: a
    seed gives the same ones on every device, and the global generators are left alone. One instance
    may serve several layers. Where several processes train together, each draws the masks of all
    their rows and takes its own, so that their number does not matter.

    Source: Srivastava et al., JMLR 2014.
    """

    def __init__(self, rate: float, seed: int) -> None:
        super().__init__()
        self.rate = rate
        self.generator = torch.Generator().manual_seed(seed)

    def forward(self, hidden: Tensor) -> Tensor:
        """A mask per row in training, else the input."""
        if not self.training:
            return hidden
        # every process draws the masks of all rows, so that all generators stay in step
        world = current_world()
        n_rows = world.total(len(hidden))
        masks = self.mask((n_rows, *hidden.shape[1:]), self.generator)
        mask = masks[world.mine(n_rows)]
        return hidden * mask.to(hidden.device)

    def mask(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """A mask on the CPU, zeros and 1 / (1 - rate)."""
        return dropout_mask(shape, self.rate, generator)


class CrossAttention(nn.Module, ABC):
    """Texts averaged by how much an image attends to them."""

    def forward(self, image: Tensor, text: Tensor, logit_scale: float, after: Tensor) -> Tensor:
        """(B, H) ``after`` applied to the average sum_j alpha_j W_V t_j of the texts.

        It is computed in float32, and for many texts without a (B, K) tensor.

        Args:
            image: (B, D) unit-norm embeddings.
            text: (K, D) unit-norm embeddings.
            logit_scale: The VLM's own multiplier of the cosine.
            after: (H, D) weights of the layer that takes the average.
        """
        query, key, value, scale = self.projections(logit_scale)
        with torch.autocast(image.device.type, enabled=False):
            if has_few(text, image):
                # All of this is linear in the texts. So few texts are projected in place of many
                # images: a step with 10 texts and 128 images takes three quarters of the time.
                keys = (text @ key.T) @ query
                values = (text @ value.T) @ after.T
                return attend(image, keys, values, scale)
            attended = attend((image @ query.T) @ key, text, text, scale)
            return (attended @ value.T) @ after.T

    @abstractmethod
    def projections(self, logit_scale: float) -> tuple[Tensor, Tensor, Tensor, float]:
        """Query, key and value matrices (D, D), and the multiplier of queries times keys."""


def has_few(text: Tensor, image: Tensor) -> bool:
    """Whether there are at most half as many texts as images; a graph has one form for all."""
    return not torch.compiler.is_exporting() and 2 * len(text) <= len(image)


def attend(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """(B, D) softmax(scale * queries @ keys.T) @ values."""
    # heads and batches of one: the fused kernels want four dimensions
    attended = functional.scaled_dot_product_attention(
        queries[None, None], keys[None, None], values[None, None], scale=scale
    )
    return attended[0, 0]


class OfficialAttention(CrossAttention):
    """As in the released code: projections start as identity, keys and values have one matrix.

    With the VLM's logit scale s,

        alpha = softmax_j(s (W_v z_v) . (W_t z_tj)),
        attended text = sum_j alpha_j W_t z_tj.

    At initialisation alpha is the zero-shot posterior.
    """

    def __init__(self, dim: int, generator: torch.Generator | None = None) -> None:  # noqa: ARG002
        super().__init__()
        # torch.eye would import torch's compiler on the meta device
        self.image = nn.Parameter(torch.zeros(dim, dim, dtype=torch.float32).fill_diagonal_(1))
        self.text = nn.Parameter(torch.zeros(dim, dim, dtype=torch.float32).fill_diagonal_(1))

    def projections(self, logit_scale: float) -> tuple[Tensor, Tensor, Tensor, float]:
        """W_v, W_t for keys and values, and the VLM's logit scale."""
        return self.image, self.text, self.text, logit_scale


class PaperAttention(CrossAttention):
    """As written in the paper: W_Q, W_K, W_V and the temperature 1/sqrt(d).

        alpha = softmax_j((W_Q z_v) . (W_K z_tj) / sqrt(d)),
        attended text = sum_j alpha_j W_V z_tj.

    The paper states no initialisation; torch's own attention uses Xavier-uniform.
    """

    def __init__(self, dim: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.query = xavier(dim, generator)
        self.key = xavier(dim, generator)
        self.value_projection = xavier(dim, generator)

    def projections(
        self,
        logit_scale: float,  # noqa: ARG002
    ) -> tuple[Tensor, Tensor, Tensor, float]:
        """W_Q, W_K, W_V and 1/sqrt(d); the paper has no use for the VLM's scale."""
        return self.query, self.key, self.value_projection, 1 / math.sqrt(len(self.query))


ATTENTION: dict[str, type[OfficialAttention] | type[PaperAttention]] = {
    "official": OfficialAttention,
    "paper": PaperAttention,
}
"""Attention forms by name."""


HIDDEN = (512, 256, 128)
"""Hidden widths of the published head (supplement, A.2)."""


def normal(
    n_rows: int, n_columns: int, std: float, generator: torch.Generator | None
) -> nn.Parameter:
    """A matrix of numbers of N(0, std^2)."""
    weight = torch.empty(n_rows, n_columns, dtype=torch.float32)
    if not weight.is_meta:  # there are no numbers on that device
        weight.normal_(0, std, generator=generator)
    return nn.Parameter(weight)


def xavier(dim: int, generator: torch.Generator | None) -> nn.Parameter:
    """A square matrix, Xavier-uniform."""
    weight = torch.empty(dim, dim, dtype=torch.float32)
    if not weight.is_meta:
        nn.init.xavier_uniform_(weight, generator=generator)
    return nn.Parameter(weight)


class FailureHead(nn.Module):
    """Failure logit g of the joint embedding z = (z_v, attended text, z_t̂, MCM).

    Each part but z_v is optional. g(z) = MLP(z) with ReLU; the probability of failure is
    sigmoid(g). With every optional part left out this is the visual-only head (LVU).

    Args:
        dim: Embedding width D.
        hidden: Hidden widths of the MLP; its depth is ``len(hidden) + 1``.
        attention: "official", "paper", or None to leave the attended text out.
        predicted_caption: Whether z_t̂, the embedding of the zero-shot answer, is an input.
        mcm: Whether max_j p_j of the zero-shot posterior is an input (supplement, B.2).
        dropout: Applied to every hidden activation; None for none, as published.
        generator: Of the first weights; None for torch's own, as in ``torch.nn.init``.

    The order of the parts is that of the released code, not of the paper, so that its weights fit.
    Its output is a confidence; ours is its negative.

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
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        widths = {"image": dim}
        if attention is not None:
            widths["attended"] = dim
        if predicted_caption:
            widths["caption"] = dim
        if mcm:
            widths["mcm"] = 1
        outputs = [*hidden, 1]  # there may be no hidden layer
        self.first = first_weights(widths, generator, n_outputs=outputs[0], dim=dim)
        self.first_bias = nn.Parameter(torch.zeros(outputs[0], dtype=torch.float32))
        self.rest = perceptron(outputs, dropout, generator)
        self.attention: CrossAttention | None = None
        if attention is not None:
            self.attention = ATTENTION[attention](dim, generator)

    def forward(self, batch: Batch) -> Tensor:
        """(B,) failure logits in float32."""
        return cast("Tensor", self.rest(self.first_layer(batch))).squeeze(-1).float()

    def first_layer(self, batch: Batch) -> Tensor:
        """(B, H) first hidden layer before its activation.

        It is all of the head that sees more than the MLP's input.
        """
        total: Tensor = self.first_bias
        for added in self.parts(batch).values():
            total = total + added
        return total

    def parts(self, batch: Batch) -> dict[str, Tensor]:
        """(B, H) what each part of z adds to the first hidden layer, beside the bias."""
        parts = {"image": functional.linear(batch.image, self.first["image"])}
        if self.attention is not None:
            parts["attended"] = self.attention(
                batch.image, batch.text, batch.logit_scale, self.first["attended"]
            )
        if "caption" in self.first:
            parts["caption"] = self._caption(batch)
        if "mcm" in self.first:
            parts["mcm"] = functional.linear(batch.answer_probability[:, None], self.first["mcm"])
        return parts

    def _caption(self, batch: Batch) -> Tensor:
        """(B, H) what the text of the answer adds to the first hidden layer."""
        weight = self.first["caption"]
        if has_few(batch.text, batch.image):  # each text is projected once, for all its images
            return functional.linear(batch.text, weight)[batch.prediction]
        return functional.linear(batch.text[batch.prediction], weight)


def first_weights(
    widths: Mapping[str, int], generator: torch.Generator | None, *, n_outputs: int, dim: int
) -> nn.ParameterDict:
    """(H, width) first weights of each part of z, initialised for embeddings of width D."""
    # He initialisation for inputs of unit norm, whose coordinates have a second moment of 1/D,
    # not of one: torch's default start makes the first activations so small that a run spends
    # most of its steps on growing them.
    std = math.sqrt(2 * dim / sum(widths.values()))
    weights = {part: normal(n_outputs, width, std, generator) for part, width in widths.items()}
    return nn.ParameterDict(weights)


def perceptron(
    widths: Sequence[int], dropout: Dropout | None, generator: torch.Generator | None
) -> nn.Sequential:
    """All layers behind the first one: ReLU, dropout where wanted, and a linear layer each."""
    # all are built before any is initialised: a seed must draw the same numbers as it always did
    linears = [linear(*ends, generator) for ends in itertools.pairwise(widths)]
    for layer in linears:
        he_std = math.sqrt(2 / layer.in_features)
        layer.weight = normal(layer.out_features, layer.in_features, he_std, generator)
        nn.init.zeros_(layer.bias)
    layers: list[nn.Module] = []
    for layer in linears:
        layers.append(nn.ReLU(inplace=True))
        if dropout is not None:
            layers.append(dropout)
        layers.append(layer)
    return nn.Sequential(*layers)


def with_weights(network: nn.Module, state: dict[str, Tensor], method: str) -> nn.Module:
    """The network with a copy of saved weights, ready to score.

    Weights of other names, shapes or types are refused.
    """
    expected = _kinds(network.state_dict())
    actual = _kinds(state)
    if actual != expected:
        differing = sorted({*actual.items()} ^ {*expected.items()}, key=str)[:4]
        raise DataError(
            f"the weights do not fit a {method} with these parameters; they differ in {differing}."
        )
    copies = {}
    for name, tensor in state.items():
        copies[name] = tensor.clone(memory_format=torch.contiguous_format)
    # assigned: a network on the meta device has no memory to copy into
    network.load_state_dict(copies, assign=True)
    return network.eval()


def _kinds(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int | torch.dtype, ...]]:
    """Shape and type of each tensor."""
    return {name: (*tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


class Graph(nn.Module):
    """A function of a batch as a module, with the network that it uses as a part of the graph."""

    def __init__(self, score: Callable[[Batch], Tensor], network: nn.Module | None = None) -> None:
        super().__init__()
        self.score = score
        self.network = network

    def forward(self, batch: Batch) -> Tensor:
        """(N,)."""
        return self.score(batch)
