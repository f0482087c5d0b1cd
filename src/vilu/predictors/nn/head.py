"""The failure head: cross-attention over the candidates, and a multilayer perceptron."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from vilu.embeddings.source import Batch
from vilu.errors import DataError
from vilu.predictors.nn.layers import dropout_mask, linear
from vilu.predictors.nn.processes import current_world


class Dropout(nn.Module):
    """Dropout with masks from a separate generator.

    In training, a unit becomes 0 with probability ``rate``, and is otherwise multiplied by
    1 / (1 - rate). Outside training, the input is returned unchanged.

    Masks are drawn on the CPU, so a seed gives the same masks on every device. torch's global
    generators are not used. The same instance may be used for several layers. If several
    processes train together, each process draws the masks for all rows in the step, and uses the
    masks for its own rows. So the result does not depend on the number of processes.

    Source: Srivastava et al., JMLR 2014.
    """

    def __init__(self, rate: float, seed: int) -> None:
        super().__init__()
        self.rate = rate
        self.generator = torch.Generator().manual_seed(seed)

    def forward(self, hidden: Tensor) -> Tensor:
        """Multiply activations (B, H) by a mask in training. Otherwise return the input."""
        if not self.training:
            return hidden
        world = current_world()
        n_rows = world.total(len(hidden))
        masks = self.mask((n_rows, *hidden.shape[1:]), self.generator)
        mask = masks[world.process_slice(n_rows)]
        return hidden * mask.to(hidden.device)

    def mask(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Draw a mask on the CPU, with entries 0 or 1 / (1 - rate)."""
        return dropout_mask(shape, self.rate, generator)


class CrossAttention(nn.Module, ABC):
    """Average of the candidate texts, weighted by the image's attention to each text."""

    def forward(
        self, image: Tensor, text: Tensor, logit_scale: float, next_layer: Tensor
    ) -> Tensor:
        """Compute the product (B, H) of the average text with ``next_layer``.

        Text t_j has the attention alpha_j from the image. With the value matrix W_V, the average
        text is sum_j alpha_j W_V t_j. The computation is in float32. With many texts, no (B, K)
        tensor is needed.

        Args:
            image: (B, D) unit-norm embeddings.
            text: (K, D) unit-norm embeddings.
            logit_scale: The VLM's logit scale.
            next_layer: (H, D) weights of the layer after the attention. This layer's input is the
                average.
        """
        query, key, value, scale = self.projections(logit_scale)
        with torch.autocast(image.device.type, enabled=False):
            if has_few_texts(text, image):
                # Both branches compute the same result. This branch projects the texts, and the
                # second branch projects the images. With 10 texts and 128 images, this branch needs
                # three quarters of the other branch's time. The (B, K) weights are small here, so a
                # fused kernel would save little memory. It would also take longer.
                keys = (text @ key.T) @ query
                values = (text @ value.T) @ next_layer.T
                weights = (scale * (image @ keys.T)).softmax(dim=1)
                return weights @ values
            queries = (image @ query.T) @ key
            attended = fused_attention(queries, text, text, scale)
            return (attended @ value.T) @ next_layer.T

    @abstractmethod
    def projections(self, logit_scale: float) -> tuple[Tensor, Tensor, Tensor, float]:
        """Return query, key and value matrices (D, D), and the scale on query-key products."""


def has_few_texts(text: Tensor, image: Tensor) -> bool:
    """Return whether there are at most half as many texts as images. Always False in an export.

    An exported graph is for any text and image counts, so it cannot branch on these counts.
    """
    return not torch.compiler.is_exporting() and 2 * len(text) <= len(image)


def fused_attention(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Compute softmax(scale * queries @ keys.T) @ values (B, H)."""
    # The fused kernels need two more dimensions in front: a batch with size 1, and a single head.
    attended = functional.scaled_dot_product_attention(
        queries[None, None], keys[None, None], values[None, None], scale=scale
    )
    return attended[0, 0]


class OfficialAttention(CrossAttention):
    """Cross-attention as in the released code, with the same matrix for keys and values.

    z_v is the image, z_tj is text j, and s is the VLM's logit scale. W_v and W_t are learned.

        alpha = softmax_j(s (W_v z_v) . (W_t z_tj))
        attended text = sum_j alpha_j W_t z_tj

    In the beginning W_v and W_t are the identity, so alpha is the zero-shot posterior.
    """

    def __init__(self, dim: int, generator: torch.Generator | None = None) -> None:  # noqa: ARG002
        super().__init__()
        # not torch.eye: on the meta device, torch.eye would import torch's compiler
        identity = torch.zeros(dim, dim, dtype=torch.float32)
        identity.fill_diagonal_(1)
        self.image = nn.Parameter(identity)  # W_v
        self.text = nn.Parameter(identity.clone())  # W_t

    def projections(self, logit_scale: float) -> tuple[Tensor, Tensor, Tensor, float]:
        """Return W_v for queries, W_t for keys and values, and the VLM's logit scale."""
        return self.image, self.text, self.text, logit_scale


class PaperAttention(CrossAttention):
    """Cross-attention as in the paper, with three learned matrices W_Q, W_K and W_V.

    z_v is the image, z_tj is text j, and d is the embedding width.

        alpha = softmax_j((W_Q z_v) . (W_K z_tj) / sqrt(d))
        attended text = sum_j alpha_j W_V z_tj

    The paper states no initialisation. Xavier-uniform is taken from torch's own attention.
    """

    def __init__(self, dim: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.query = xavier_matrix(dim, generator)
        self.key = xavier_matrix(dim, generator)
        self.value_projection = xavier_matrix(dim, generator)

    def projections(
        self,
        logit_scale: float,  # noqa: ARG002
    ) -> tuple[Tensor, Tensor, Tensor, float]:
        """Return W_Q, W_K, W_V and 1 / sqrt(d). The VLM's logit scale is not used."""
        return self.query, self.key, self.value_projection, 1 / math.sqrt(len(self.query))


ATTENTION_CLASSES: dict[str, type[OfficialAttention] | type[PaperAttention]] = {
    "official": OfficialAttention,
    "paper": PaperAttention,
}
"""Cross-attention forms, by name."""


HIDDEN_WIDTHS = (512, 256, 128)
"""Hidden layer widths in the published head (supplement, A.2)."""


def normal_matrix(
    n_rows: int, n_columns: int, std: float, generator: torch.Generator | None
) -> nn.Parameter:
    """Draw a matrix with random entries from N(0, std^2)."""
    weight = torch.empty(n_rows, n_columns, dtype=torch.float32)
    if not weight.is_meta:  # on the meta device there is nothing to initialise
        weight.normal_(0, std, generator=generator)
    return nn.Parameter(weight)


def xavier_matrix(dim: int, generator: torch.Generator | None) -> nn.Parameter:
    """Draw a square matrix with Xavier-uniform initialisation."""
    weight = torch.empty(dim, dim, dtype=torch.float32)
    if not weight.is_meta:  # on the meta device there is nothing to initialise
        nn.init.xavier_uniform_(weight, generator=generator)
    return nn.Parameter(weight)


class FailureHead(nn.Module):
    """Network for the failure logit g. The failure probability is sigmoid(g).

    g = MLP(z), where z is a joint embedding and the MLP has ReLU activations. z concatenates the
    image z_v, the attended text, the predicted caption z_t̂ and the answer's zero-shot probability.
    All parts except z_v are optional. With only z_v, this is the head of ``LVU``.

    Args:
        dim: Embedding width D.
        hidden: Hidden layer widths in the MLP. The MLP has ``len(hidden) + 1`` layers.
        attention: "official" or "paper". If None, z has no attended text.
        predicted_caption: Whether z has z_t̂, the answer's text embedding.
        mcm: Whether z has the answer's zero-shot probability (supplement, B.2). For the
            zero-shot answer this is max_j p_j.
        dropout: Applied after every hidden layer. If None, there is no dropout, as published.
        generator: Generator for the initial weights. If None, torch's global generator.

    The parts are ordered as in the released code, not as in the paper, so that released weights can
    be used. The released head returns a confidence logit, and this head returns its negative.

    Source: ViLU (ICCV 2025), Sec. 4 and supplement A.2, B.1, B.2.
    """

    def __init__(
        self,
        dim: int,
        hidden: Sequence[int] = HIDDEN_WIDTHS,
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
        layer_outputs = [*hidden, 1]
        n_first_outputs = layer_outputs[0]  # 1 if there is no hidden layer
        self.first = first_layer_weights(widths, generator, n_outputs=n_first_outputs, dim=dim)
        zero_bias = torch.zeros(n_first_outputs, dtype=torch.float32)
        self.first_bias = nn.Parameter(zero_bias)
        self.rest = perceptron(layer_outputs, dropout, generator)
        self.attention: CrossAttention | None = None
        if attention is not None:
            self.attention = ATTENTION_CLASSES[attention](dim, generator)

    def forward(self, batch: Batch) -> Tensor:
        """Compute the failure logits (B,) in float32."""
        logit_column: Tensor = self.rest(self.first_layer(batch))
        logit = logit_column.squeeze(-1)
        return logit.float()

    def first_layer(self, batch: Batch) -> Tensor:
        """Compute the first layer's outputs (B, H) before the activation.

        All later layers depend on the batch only through these outputs.
        """
        outputs: Tensor = self.first_bias
        terms = self.first_layer_terms(batch)
        for term in terms.values():
            outputs = outputs + term
        return outputs

    def first_layer_terms(self, batch: Batch) -> dict[str, Tensor]:
        """Compute what each part of z adds to the first layer's outputs: (B, H), by part name."""
        terms = {"image": functional.linear(batch.image, self.first["image"])}
        if self.attention is not None:
            terms["attended"] = self.attention(
                batch.image, batch.text, batch.logit_scale, self.first["attended"]
            )
        if "caption" in self.first:
            terms["caption"] = self._caption_term(batch)
        if "mcm" in self.first:
            probability_column = batch.answer_probability[:, None]
            terms["mcm"] = functional.linear(probability_column, self.first["mcm"])
        return terms

    def _caption_term(self, batch: Batch) -> Tensor:
        """Compute the predicted caption's term (B, H) in the first layer's outputs."""
        weight = self.first["caption"]
        if has_few_texts(batch.text, batch.image):
            # Every text is projected once. A projection per image would be slower. The projections
            # are not indexed with [], because several threads would sum an index's gradient in
            # an order that varies.
            projected_texts = functional.linear(batch.text, weight)
            return functional.embedding(batch.prediction, projected_texts)
        return functional.linear(batch.text[batch.prediction], weight)


def first_layer_weights(
    widths: Mapping[str, int], generator: torch.Generator | None, *, n_outputs: int, dim: int
) -> nn.ParameterDict:
    """Draw the first layer's initial weights (H, width), for each part of z by name."""
    # He initialisation, for embeddings with unit norm: the coordinates have a mean square of 1 / D
    # instead of 1. With torch's default initialisation the activations would be very small, and
    # most training steps would only increase the activations.
    n_inputs = sum(widths.values())
    std = math.sqrt(2 * dim / n_inputs)
    weights = {
        part: normal_matrix(n_outputs, width, std, generator) for part, width in widths.items()
    }
    return nn.ParameterDict(weights)


def perceptron(
    widths: Sequence[int], dropout: Dropout | None, generator: torch.Generator | None
) -> nn.Sequential:
    """Make all layers after the first layer.

    Each is a ReLU, then ``dropout`` if any, then a linear layer. ``widths`` are the output counts
    of all layers, including the first layer.
    """
    # All layers are built first, and initialised again afterwards. Both draw random numbers. In a
    # different order, the same seed would give other weights than in earlier versions.
    linear_layers = [
        linear(n_inputs, n_outputs, generator) for n_inputs, n_outputs in itertools.pairwise(widths)
    ]
    for layer in linear_layers:
        he_std = math.sqrt(2 / layer.in_features)
        layer.weight = normal_matrix(layer.out_features, layer.in_features, he_std, generator)
        nn.init.zeros_(layer.bias)
    layers: list[nn.Module] = []
    for layer in linear_layers:
        layers.append(nn.ReLU(inplace=True))
        if dropout is not None:
            layers.append(dropout)
        layers.append(layer)
    return nn.Sequential(*layers)


def load_weights(network: nn.Module, state: dict[str, Tensor], method_name: str) -> nn.Module:
    """Give a network a copy of the weights ``state``, and set it to evaluation.

    Messages call the method ``method_name``.

    Raises:
        DataError: If the weights differ from the network in names, shapes or types.
    """
    expected_forms = _shapes_and_types(network.state_dict())
    actual_forms = _shapes_and_types(state)
    if actual_forms != expected_forms:
        # An element is a tensor's name with its sizes and type. ^ keeps what only one side has.
        actual = set(actual_forms.items())
        expected = set(expected_forms.items())
        differing_forms = sorted(actual ^ expected, key=str)
        raise DataError(
            f"the weights do not fit a {method_name} with these parameters; "
            f"they differ in {differing_forms[:4]}."
        )
    copies = {}
    for name, tensor in state.items():
        copies[name] = tensor.clone(memory_format=torch.contiguous_format)
    # ``assign`` replaces the tensors: a network on the meta device has no memory to copy into
    network.load_state_dict(copies, assign=True)
    return network.eval()


def _shapes_and_types(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int | torch.dtype, ...]]:
    """Return each tensor's sizes and type, by name."""
    return {name: (*tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


class Graph(nn.Module):
    """A function from a batch to scores, as a module that can be exported.

    The ``network`` used by the function is a submodule, so its weights are part of the graph.
    """

    def __init__(self, score: Callable[[Batch], Tensor], network: nn.Module | None = None) -> None:
        super().__init__()
        self.score = score
        self.network = network

    def forward(self, batch: Batch) -> Tensor:
        """Compute a batch's scores (N,)."""
        return self.score(batch)
