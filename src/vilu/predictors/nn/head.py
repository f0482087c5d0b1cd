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
from vilu.predictors.nn.processes import current_world


class Dropout(nn.Module):
    """In training, a unit is zero with probability ``rate``, else multiplied by 1 / (1 - rate); otherwise nothing.

    Masks are drawn on the CPU from a generator of its own: a seed gives the same ones on every
    device, and the global generators are left alone. One instance may serve several layers. Where
    several processes train together, each draws the masks of all their rows and takes its own, so
    that their number does not matter (Srivastava et al., JMLR 2014).
    """

    def __init__(self, rate: float, seed: int) -> None:
        super().__init__()
        self.rate = rate
        self.generator = torch.Generator().manual_seed(seed)

    def forward(self, hidden: Tensor) -> Tensor:
        """A mask per row in training, else the input."""
        if not self.training:
            return hidden
        world = current_world()
        n_rows = world.total(len(hidden))
        mask = self.mask((n_rows, *hidden.shape[1:]), self.generator)[world.mine(n_rows)]
        return hidden * mask.to(hidden.device)

    def mask(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """A mask on the CPU, zeros and 1 / (1 - rate)."""
        keep = torch.empty(*shape).bernoulli_(1 - self.rate, generator=generator)
        return keep / (1 - self.rate)


def texts_first(n_rows: int, n_texts: int, dim: int) -> bool:
    """Whether attention and its gradient take fewer operations when texts are projected before they are averaged.

    By the products of a step: 8 of K x D x D and 5 of B x K x D, against 4 of B x K x D, with the
    cheaper of 11 of B x D x D, or 6 of D x D x D and 5 of B x D x D.
    """
    averaged_first = 4 * n_rows * n_texts + dim * min(11 * n_rows, 6 * dim + 5 * n_rows)
    return n_texts * (8 * dim + 5 * n_rows) < averaged_first


class CrossAttention(nn.Module, ABC):
    """Texts averaged by how much an image attends to them."""

    def forward(self, image: Tensor, text: Tensor, logit_scale: float, after: Tensor) -> Tensor:
        """(B, H): sum_j alpha_j W_V t_j, times a matrix that follows; arguments as of ``factors``."""
        left, right = self.factors(image, text, logit_scale, after)
        return left @ right

    def factors(
        self,
        image: Tensor,
        text: Tensor,
        logit_scale: float,
        after: Tensor,
        made: Mapping[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Two matrices whose product is ``forward``. The weights alpha are computed in float32.

        Up to ``TILE_CELLS`` weights are kept for the gradient. Few texts are projected one by one,
        keys and values together where they have one matrix, so that nothing of size (B, D) is
        projected; of more the average is. More weights are never there together, so that a pool of
        N pairs takes no N x N matrix: the average is ``attend``, which computes the weights again
        for the gradient.

        Args:
            image: (B, D) unit-norm embeddings.
            text: (K, D) unit-norm embeddings, without gradient.
            logit_scale: The VLM's own multiplier of the cosine.
            after: (H, D) matrix that is applied to the attended text.
            made: (K, D) products of the texts with the matrices of keys and values, where they are
                known.
        """
        with torch.autocast(image.device.type, enabled=False):
            query, key, value, scale = self.projections(logit_scale)
            large = len(image) * len(text) > TILE_CELLS
            if made or (not large and texts_first(len(image), *text.shape)):
                keys = made[key] if made else text @ key.T
                values = keys if value is key else made[value] if made else text @ value.T
                return torch.softmax(scale * (image @ (keys @ query).T), dim=-1), values @ after.T
            if large:
                attended = attend(torch.linalg.multi_dot([image, query.T, key]), text, scale)
            else:
                logits = scale * torch.linalg.multi_dot([image, query.T, key, text.T])
                attended = torch.softmax(logits, dim=-1) @ text
            few = 2 * len(image) < text.shape[1]
            return (attended @ value.T, after.T) if few else (attended, value.T @ after.T)

    @abstractmethod
    def projections(self, logit_scale: float) -> tuple[Tensor, Tensor, Tensor, float]:
        """Query, key and value matrices (D, D), and the multiplier of the product of the first two."""


def attend(query: Tensor, text: Tensor, scale: float) -> Tensor:
    """softmax(scale * query @ text.T) @ text, (B, D), without a (B, K) tensor either way; text has no gradient."""
    if text.requires_grad:
        raise ValueError("an attention over so many texts gives them no gradient. Detach them.")
    apply: Callable[[Tensor, Tensor, float], Tensor] = _Attend.apply  # torch gives it no type
    return apply(query, text, scale)


class _Attend(torch.autograd.Function):
    """Forward torch's ``scaled_dot_product_attention``, backward three products of B x K x D operations, not its five.

    Its backward would compute gradients of keys and values too, and the encoders are frozen. The
    query's alone is

        P = softmax(scale * query @ text.T), dP = gradient @ text.T, d query = scale * P (dP - (P *
        dP).sum) @ text,

    made here in tiles of ``TILE_CELLS`` weights.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, text: Tensor, scale: float) -> Tensor:  # noqa: ANN401 - torch gives it no type
        """Row blocks bound the memory also where torch has only its plain kernel."""
        # heads and batches of one: the fused kernels want four dimensions
        keys = text[None, None]
        parts = [query[None, None, part] for part in row_blocks(len(query), len(text), len(query))]
        attended = [
            functional.scaled_dot_product_attention(part, keys, keys, scale=scale) for part in parts
        ]
        result = torch.cat(attended, dim=2)[0, 0]
        ctx.save_for_backward(query, text, result)
        ctx.scale = scale
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401 - torch gives it no type
        """Of the query; (P * dP).sum is gradient . result, and the sum that P is over comes with its numerators."""
        query, text, result = ctx.saved_tensors
        change, columns = torch.empty_like(query), max(TILE_CELLS // TILE_ROWS, 1)
        blocks = (x.split(TILE_ROWS) for x in (query, gradients[0], result, change))
        with torch.autocast(query.device.type, enabled=False):
            for part, gradient, average, out in zip(*blocks, strict=True):
                mean = (gradient * average).sum(dim=1, keepdim=True)
                largest, total = torch.full_like(mean, -torch.inf), torch.zeros_like(mean)
                out.zero_()
                for texts in text.split(columns):
                    weights = (part @ texts.T).mul_(ctx.scale * math.log2(math.e))
                    higher = torch.maximum(largest, weights.amax(dim=1, keepdim=True))
                    shrunk, weights = (largest - higher).exp2_(), weights.sub_(higher).exp2_()
                    towards = (gradient @ texts.T).sub_(mean).mul_(weights)
                    out.mul_(shrunk).addmm_(towards, texts)
                    total.mul_(shrunk).add_(weights.sum(dim=1, keepdim=True))
                    largest = higher
                out.div_(total)
        return change.mul_(ctx.scale), None, None


class OfficialAttention(CrossAttention):
    """As in the released code: identity-initialised projections, one matrix for keys and values, scale s.

    alpha = softmax_j(s (W_v z_v) . (W_t z_tj)), attended text = sum_j alpha_j W_t z_tj. At
    initialisation alpha is the zero-shot posterior.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.image, self.text = (
            nn.Parameter(torch.zeros(dim, dim).fill_diagonal_(1)) for _ in range(2)
        )

    def projections(self, logit_scale: float) -> tuple[Tensor, Tensor, Tensor, float]:
        """W_v, W_t for keys and values, and the VLM's logit scale."""
        return self.image, self.text, self.text, logit_scale


class PaperAttention(CrossAttention):
    """As written in the paper: W_Q, W_K, W_V and the temperature 1/sqrt(d).

    alpha = softmax_j((W_Q z_v) . (W_K z_tj) / sqrt(d)), attended text = sum_j alpha_j W_V z_tj. The
    paper states no initialisation; Xavier-uniform is what torch's own attention uses.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query = nn.Parameter(nn.init.xavier_uniform_(torch.empty(dim, dim)))
        self.key = nn.Parameter(nn.init.xavier_uniform_(torch.empty(dim, dim)))
        self.value_projection = nn.Parameter(nn.init.xavier_uniform_(torch.empty(dim, dim)))

    def projections(self, logit_scale: float) -> tuple[Tensor, Tensor, Tensor, float]:  # noqa: ARG002 - of the paper's
        """W_Q, W_K, W_V and 1/sqrt(d)."""
        return self.query, self.key, self.value_projection, 1 / math.sqrt(len(self.query))


class FoldedAttention(nn.Module):
    """A fitted attention, and the matrix after it, multiplied out in one order whatever the sizes: for a graph.

    scale (image W_Q') (text W_K')' is image Q text' with Q (D, D), and what follows the average of
    the texts is one matrix V (H, D); both products are made in float64.
    """

    def __init__(self, attention: CrossAttention, after: Tensor, logit_scale: float) -> None:
        super().__init__()
        query, key, value, scale = attention.projections(logit_scale)
        self.query = nn.Buffer((scale * (query.double().T @ key.double())).detach().float())
        self.value = nn.Buffer((after.double() @ value.double()).detach().float())

    def factors(
        self,
        image: Tensor,
        text: Tensor,
        logit_scale: float,  # noqa: ARG002
        *_: object,
    ) -> tuple[Tensor, Tensor]:
        """As of ``CrossAttention``; scale and matrix are those that it was made with."""
        return torch.softmax(image @ self.query @ text.T, dim=-1) @ text, self.value.T


ATTENTION: dict[str, type[OfficialAttention] | type[PaperAttention]] = {
    "official": OfficialAttention,
    "paper": PaperAttention,
}
"""Attention forms by name."""


HIDDEN = (512, 256, 128)
"""Hidden widths of the published head (supplement, A.2)."""


def normal(n_rows: int, n_columns: int, std: float) -> nn.Parameter:
    """Numbers of N(0, std^2); none on the meta device, where to draw would import torch's compiler for a second."""
    weight = torch.empty(n_rows, n_columns)
    return nn.Parameter(weight if weight.is_meta else weight.normal_(0, std))


class FailureHead(nn.Module):
    """Failure logit g of the joint embedding z = (z_v, attended text, z_t̂, MCM), each part but z_v optional.

    g(z) = MLP(z) with ReLU; the probability of failure is sigmoid(g). With every optional part left
    out this is the visual-only head (LVU).

    Args:
        dim: Embedding width D.
        hidden: Hidden widths of the MLP; its depth is ``len(hidden) + 1``.
        attention: "official", "paper", or None to leave the attended text out.
        predicted_caption: Whether z_t̂, the embedding of the zero-shot answer, is an input.
        mcm: Whether max_j p_j of the zero-shot posterior is an input (supplement, B.2).
        dropout: Applied to every hidden activation; None for none, as published.

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
    ) -> None:
        super().__init__()
        used = {
            "image": True,
            "attended": attention is not None,
            "caption": predicted_caption,
            "mcm": mcm,
        }
        widths = {part: 1 if part == "mcm" else dim for part, is_used in used.items() if is_used}
        outputs = [*hidden, 1]
        # He initialisation for inputs of unit norm, whose coordinates have a second moment of 1/D,
        # not of one: torch's default start makes the first activations so small that a run spends
        # most of its steps on growing them.
        std = math.sqrt(2 * dim / sum(widths.values()))
        self.first = nn.ParameterDict(
            {part: normal(outputs[0], width, std) for part, width in widths.items()}
        )
        self.first_bias = nn.Parameter(torch.zeros(outputs[0]))
        linears = [nn.Linear(*pair) for pair in itertools.pairwise(outputs)]
        for linear in linears:
            linear.weight = normal(
                linear.out_features, linear.in_features, math.sqrt(2 / linear.in_features)
            )
            nn.init.zeros_(linear.bias)
        between = [] if dropout is None else [dropout]
        self.rest = nn.Sequential(
            *(layer for linear in linears for layer in (nn.ReLU(inplace=True), *between, linear))
        )
        self.attention: CrossAttention | None = ATTENTION[attention](dim) if attention else None
        self.made: Mapping[
            Tensor, Tensor
        ] = {}  # what ``text_matrices`` make of texts that stay, in training

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
        """(B, H) first hidden layer before its activation: all of the head that sees more than the MLP's input."""
        image, *others = self.factors(batch).values()
        total = torch.addmm(self.first_bias, *image)
        for factors in others:
            total = total.addmm_(
                *(factor.to(total.dtype) for factor in factors)
            )  # in place: no memory but its own
        return total

    def text_matrices(self) -> list[Tensor]:
        """Those that multiply texts and nothing else."""
        found = [self.first["caption"]] if "caption" in self.first else []
        return found + (
            []
            if self.attention is None
            else list(dict.fromkeys(self.attention.projections(1.0)[1:3]))
        )

    def parts(self, batch: Batch) -> dict[str, Tensor]:
        """What each part of z adds to the first hidden layer, (B, H) each, in their order; the bias aside."""
        return {part: left @ right for part, (left, right) in self.factors(batch).items()}

    def factors(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """Two matrices for each part of z, whose product is what it adds to the first hidden layer."""
        # The first layer is a sum over the parts of z, each with a matrix of its own. Texts are
        # projected before they are averaged over or picked, where they are few: K rows instead of
        # B.
        found = {"image": (batch.image, self.first["image"].T)}
        if self.attention is not None:
            after = self.first["attended"]
            found["attended"] = self.attention.factors(
                batch.image, batch.text, batch.logit_scale, after, self.made
            )
        if "caption" in self.first:
            weight = self.first["caption"]
            found["caption"] = picked(batch.text, batch.prediction, weight, self.made.get(weight))
        if "mcm" in self.first:
            found["mcm"] = batch.zero_shot.max_probability[:, None], self.first["mcm"].T
        return found


def picked(
    text: Tensor, rows: Tensor, weight: Tensor, made: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Two matrices whose product is ``text[rows] @ weight.T``: each of K texts is projected once where that is cheaper.

    They are then picked by a product with one-hot rows, since the gradient of an indexing is many
    times slower. Where ``text @ weight.T`` is known, it is ``made``.
    """
    # a graph has one form for all sizes
    if made is None and (
        torch.compiler.is_exporting() or len(text) * (1 + len(rows) / text.shape[1]) > len(rows)
    ):
        return text[rows], weight.T
    return functional.one_hot(rows, len(text)).to(
        text.dtype
    ), text @ weight.T if made is None else made


def with_weights(network: nn.Module, state: dict[str, Tensor], method: str) -> nn.Module:
    """The network with a copy of saved weights, ready to score; refuses those of other names, shapes or types."""
    kinds = (
        {name: (*t.shape, t.dtype) for name, t in tensors.items()}
        for tensors in (network.state_dict(), state)
    )
    expected, found = kinds
    if found != expected:
        differing = sorted({*found.items()} ^ {*expected.items()}, key=str)[:4]
        raise DataError(
            f"the weights do not fit a {method} with these parameters; they differ in {differing}."
        )
    copies = {
        name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()
    }
    network.load_state_dict(
        copies, assign=True
    )  # a network on the meta device has no memory to copy into
    return network.eval()


class Graph(nn.Module):
    """A function of a batch as a module, with the network that it looks at, which then is part of the graph."""

    def __init__(self, score: Callable[[Batch], Tensor], network: nn.Module | None = None) -> None:
        super().__init__()
        self.score, self.network = score, network

    def forward(self, batch: Batch) -> Tensor:
        """(N,)."""
        return self.score(batch)
