"""The failure head: attention over the candidates, and a perceptron."""

from __future__ import annotations

import copy
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from vilu.embeddings.similarity import TILE_CELLS, TILE_ROWS, row_blocks
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


def texts_first(n_rows: int, n_texts: int, dim: int) -> bool:
    """Whether attention and its gradient cost less with texts projected before they are averaged.

    The products of a step are counted: 8 of K x D x D and 5 of B x K x D, against 4 of B x K x D
    with the cheaper of 11 of B x D x D, or 6 of D x D x D and 5 of B x D x D.
    """
    # both sides are divided by D, which every product has
    projected_first = n_texts * (8 * dim + 5 * n_rows)
    averaged_first = 4 * n_rows * n_texts + dim * min(11 * n_rows, 6 * dim + 5 * n_rows)
    return projected_first < averaged_first


class CrossAttention(nn.Module, ABC):
    """Texts averaged by how much an image attends to them."""

    def forward(self, image: Tensor, text: Tensor, logit_scale: float, after: Tensor) -> Tensor:
        """(B, H) sum_j alpha_j W_V t_j, times the matrix ``after``; arguments as of ``factors``."""
        left, right = self.factors(image, text, logit_scale, after)
        return left @ right

    def factors(
        self,
        image: Tensor,
        text: Tensor,
        logit_scale: float,
        after: Tensor,
        products: Mapping[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Two matrices whose product is ``forward``. The weights alpha are computed in float32.

        Few texts are projected one by one, keys and values together where they have one matrix, so
        that nothing of size (B, D) is projected. Of many texts the average is projected. Up to
        ``TILE_CELLS`` weights are kept for the gradient. More weights are never there together, so
        that a pool of N pairs takes no N x N matrix: the average is ``attend``, which computes the
        weights again for the gradient.

        Args:
            image: (B, D) unit-norm embeddings.
            text: (K, D) unit-norm embeddings, without gradient.
            logit_scale: The VLM's own multiplier of the cosine.
            after: (H, D) matrix that is applied to the attended text.
            products: (K, D) products of the texts with the matrices of keys and values, where they
                are known.
        """
        with torch.autocast(image.device.type, enabled=False):
            n_images = len(image)
            is_large = n_images * len(text) > TILE_CELLS
            if products or (not is_large and texts_first(n_images, *text.shape)):
                return self._texts_first(image, text, logit_scale, after, products or {})
            return self._average_first(image, text, logit_scale, after, is_large=is_large)

    def _texts_first(
        self,
        image: Tensor,
        text: Tensor,
        logit_scale: float,
        after: Tensor,
        products: Mapping[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """The factors where texts are projected one by one: (B, K) weights and (K, H) texts."""
        query, key, value, scale = self.projections(logit_scale)
        keys = products[key] if products else text @ key.T
        values = keys
        if value is not key:
            values = products[value] if products else text @ value.T
        # keys @ query is (K, D): with few texts cheaper than queries of all images
        logits = scale * (image @ (keys @ query).T)
        return torch.softmax(logits, dim=-1), values @ after.T

    def _average_first(
        self, image: Tensor, text: Tensor, logit_scale: float, after: Tensor, *, is_large: bool
    ) -> tuple[Tensor, Tensor]:
        """The factors where the average of the texts is projected."""
        query, key, value, scale = self.projections(logit_scale)
        # multi_dot takes the cheapest order of the products
        if is_large:
            attended = attend(torch.linalg.multi_dot([image, query.T, key]), text, scale)
        else:
            logits = scale * torch.linalg.multi_dot([image, query.T, key, text.T])
            attended = torch.softmax(logits, dim=-1) @ text
        # few averages are projected themselves; of many, the two matrices after them are one
        if 2 * len(image) < text.shape[1]:
            return attended @ value.T, after.T
        return attended, value.T @ after.T

    @abstractmethod
    def projections(self, logit_scale: float) -> tuple[Tensor, Tensor, Tensor, float]:
        """Query, key and value matrices (D, D), and the multiplier of queries times keys."""


def attend(query: Tensor, text: Tensor, scale: float) -> Tensor:
    """(B, D) softmax(scale * query @ text.T) @ text, without a (B, K) tensor either way.

    The text has no gradient.
    """
    if text.requires_grad:
        raise ValueError("an attention over so many texts gives them no gradient. Detach them.")
    apply: Callable[[Tensor, Tensor, float], Tensor] = _Attend.apply  # torch gives it no type
    return apply(query, text, scale)


class _Attend(torch.autograd.Function):
    """Forward torch's ``scaled_dot_product_attention``, backward a cheaper one for the query alone.

    Torch's backward takes five products of B x K x D operations, for the gradients of keys and
    values too. The encoders are frozen, and the query's gradient alone takes three:

        P = softmax(scale * query @ text.T),
        dP = gradient @ text.T,
        d query = scale * P (dP - (P * dP).sum) @ text.

    It is computed in tiles of ``TILE_CELLS`` weights.
    """

    # torch gives ``ctx`` no type

    @staticmethod
    def forward(ctx: Any, query: Tensor, text: Tensor, scale: float) -> Tensor:  # noqa: ANN401
        """Row blocks bound the memory also where torch has only its plain kernel."""
        # heads and batches of one: the fused kernels want four dimensions
        keys = text[None, None]
        blocks = []
        for part in row_blocks(len(query), len(text), len(query)):
            rows = query[None, None, part]
            attended = functional.scaled_dot_product_attention(rows, keys, keys, scale=scale)
            blocks.append(attended)
        result = torch.cat(blocks, dim=2)[0, 0]
        ctx.save_for_backward(query, text, result)
        ctx.scale = scale
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        """The gradient of the query, block by block of its rows."""
        query, text, result = ctx.saved_tensors
        change = torch.empty_like(query)
        blocks = zip(
            query.split(TILE_ROWS),
            gradients[0].split(TILE_ROWS),
            result.split(TILE_ROWS),
            change.split(TILE_ROWS),
            strict=True,
        )
        with torch.autocast(query.device.type, enabled=False):
            for rows, gradient, average, out in blocks:
                _query_gradient(rows, gradient, average, text, ctx.scale, out)
        return change.mul_(ctx.scale), None, None


def _query_gradient(
    query: Tensor, gradient: Tensor, average: Tensor, text: Tensor, scale: float, out: Tensor
) -> None:
    """Write P (dP - (P * dP).sum) @ text of some rows into ``out``, tile by tile of the texts.

    The softmax is a running one: numerators are taken against the largest logit so far, and what
    was added up under a smaller one is shrunk when a larger one comes. So one pass over the texts
    gives the numerators and the sum that they are divided by.
    """
    # (P * dP).sum = sum_j P_j gradient . t_j = gradient . sum_j P_j t_j: known before any tile
    mean = (gradient * average).sum(dim=1, keepdim=True)
    largest = torch.full_like(mean, -torch.inf)
    total = torch.zeros_like(mean)
    out.zero_()
    n_columns = max(TILE_CELLS // TILE_ROWS, 1)
    for texts in text.split(n_columns):
        # exp(x) = 2^(x log2 e): the change of base is a part of the scale
        logits = (query @ texts.T).mul_(scale * math.log2(math.e))
        higher = torch.maximum(largest, logits.amax(dim=1, keepdim=True))
        shrunk = (largest - higher).exp2_()
        weights = logits.sub_(higher).exp2_()
        towards = (gradient @ texts.T).sub_(mean).mul_(weights)
        out.mul_(shrunk).addmm_(towards, texts)
        total.mul_(shrunk).add_(weights.sum(dim=1, keepdim=True))
        largest = higher
    out.div_(total)


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


class FoldedAttention(nn.Module):
    """A fitted attention and the matrix after it, multiplied out once: for a graph.

    A graph has one order of products for all sizes, where ``CrossAttention`` chooses by size.
    scale (image W_Q') (text W_K')' is image Q text' with one matrix Q = scale W_Q' W_K (D, D). The
    average of the texts meets one matrix V = after W_V (H, D).
    """

    def __init__(self, attention: CrossAttention, after: Tensor, logit_scale: float) -> None:
        super().__init__()
        query, key, value, scale = attention.projections(logit_scale)
        # float64, rounded once: folding adds a rounding of each number, not those of D products
        folded_query = scale * (query.double().T @ key.double())
        folded_value = after.double() @ value.double()
        self.query = nn.Buffer(folded_query.detach().float())
        self.value = nn.Buffer(folded_value.detach().float())

    def factors(
        self,
        image: Tensor,
        text: Tensor,
        logit_scale: float,  # noqa: ARG002
        *_: object,
    ) -> tuple[Tensor, Tensor]:
        """As of ``CrossAttention``; the scale and the matrix after it are folded in already."""
        alpha = torch.softmax(image @ self.query @ text.T, dim=-1)
        return alpha @ text, self.value.T


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
        # in training: products of texts that stay with the ``text_matrices``
        self.products: Mapping[Tensor, Tensor] = {}

    def forward(self, batch: Batch) -> Tensor:
        """(B,) failure logits in float32."""
        return cast("Tensor", self.rest(self.first_layer(batch))).squeeze(-1).float()

    def folded(self, logit_scale: float) -> FailureHead:
        """A copy for a graph."""
        head = copy.deepcopy(self)
        if head.attention is not None:
            folded = FoldedAttention(head.attention, head.first["attended"], logit_scale)
            head.attention = cast("CrossAttention", folded)
        return head

    def first_layer(self, batch: Batch) -> Tensor:
        """(B, H) first hidden layer before its activation.

        It is all of the head that sees more than the MLP's input.
        """
        (image, image_weight), *rest = self.factors(batch).values()
        total = torch.addmm(self.first_bias, image, image_weight)
        for left, right in rest:
            # in place: no memory but its own
            total = total.addmm_(left.to(total.dtype), right.to(total.dtype))
        return total

    def text_matrices(self) -> list[Tensor]:
        """The matrices that multiply texts and nothing else."""
        matrices = []
        if "caption" in self.first:
            matrices.append(self.first["caption"])
        if self.attention is not None:
            _, key, value, _ = self.attention.projections(1.0)
            matrices.append(key)
            if value is not key:
                matrices.append(value)
        return matrices

    def parts(self, batch: Batch) -> dict[str, Tensor]:
        """(B, H) what each part of z adds to the first hidden layer, beside the bias."""
        return {part: left @ right for part, (left, right) in self.factors(batch).items()}

    def factors(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """Two matrices for each part of z; their product is added to the first hidden layer."""
        # The first layer is a sum over the parts of z, each with a matrix of its own. Texts are
        # projected before they are averaged over or picked, where they are few: K rows instead of
        # B.
        factors = {"image": (batch.image, self.first["image"].T)}
        if self.attention is not None:
            after = self.first["attended"]
            factors["attended"] = self.attention.factors(
                batch.image, batch.text, batch.logit_scale, after, self.products
            )
        if "caption" in self.first:
            weight = self.first["caption"]
            product = self.products.get(weight)
            factors["caption"] = picked(batch.text, batch.prediction, weight, product)
        if "mcm" in self.first:
            factors["mcm"] = batch.answer_probability[:, None], self.first["mcm"].T
        return factors


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


def picked(
    text: Tensor, rows: Tensor, weight: Tensor, product: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Two matrices whose product is ``text[rows] @ weight.T``.

    Each of K texts is projected once where that is cheaper, or where ``text @ weight.T`` is known:
    the ``product``. The projected texts are picked by a product with one-hot rows, since the
    gradient of an indexing is many times slower.
    """
    if product is None:
        # a graph has one form for all sizes; to look at a size would fix it
        if torch.compiler.is_exporting() or not _projects_all(text, rows):
            return text[rows], weight.T
        product = text @ weight.T
    one_hot = functional.one_hot(rows, len(text)).to(text.dtype)
    return one_hot, product


def _projects_all(text: Tensor, rows: Tensor) -> bool:
    """Whether all K texts are projected and B picked at no more cost than projecting those B."""
    # for a column of the weight K D + K B operations, against B D; both are divided by D
    n_rows = len(rows)
    return len(text) * (1 + n_rows / text.shape[1]) <= n_rows


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
