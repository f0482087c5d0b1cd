"""ProbVLM: generalised Gaussians around frozen embeddings."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from vilu.embeddings.source import Batch
from vilu.embeddings.space import EmbeddingSpace
from vilu.predictors.contract.labelled import failure_log_odds
from vilu.predictors.nn.layers import linear
from vilu.predictors.nn.train import few_epochs
from vilu.predictors.vilu.head import Count, NonNegative
from vilu_bench.methods.networks import NetworkPredictor

# for a shape below one the density has a cusp, and its slope no bound, where the deviation is zero
SMALLEST = 1e-6


class GeneralisedGaussian(NamedTuple):
    """Independent generalised Gaussians.

    Their density is beta / (2 alpha Gamma(1/beta)) exp(-(|x - mean| / alpha)^beta).

    beta = 1 is the Laplace distribution of scale alpha, beta = 2 the Gaussian of variance alpha² /
    2.

    Attributes:
        mean: Any shape.
        inverse_scale: 1 / alpha > 0, of a shape that broadcasts with ``mean``.
        shape: beta > 0, likewise.
    """

    mean: Tensor
    inverse_scale: Tensor
    shape: Tensor

    def nll(self, x: Tensor) -> Tensor:
        """Negative log-density of every entry.

        It is (|x - mean| / alpha)^beta - log(beta / (2 alpha)) + log Gamma(1/beta).

        Deviations below 1e-6 alpha count as 1e-6 alpha, which keeps the gradient finite.
        """
        deviation = ((x - self.mean).abs() * self.inverse_scale).clamp_min(SMALLEST)
        normaliser = (
            torch.lgamma(1 / self.shape) - torch.log(self.shape * self.inverse_scale) + math.log(2)
        )
        return deviation**self.shape + normaliser

    def log_variance(self) -> Tensor:
        """log(alpha² Gamma(3/beta) / Gamma(1/beta)) of every entry."""
        return (
            torch.lgamma(3 / self.shape)
            - torch.lgamma(1 / self.shape)
            - 2 * torch.log(self.inverse_scale)
        )

    def at(self, where: slice | tuple[slice | None, ...]) -> GeneralisedGaussian:
        """The entries at an index into all three parts, which may also add dimensions."""
        return GeneralisedGaussian(self.mean[where], self.inverse_scale[where], self.shape[where])


FLATTEST = 1e-3
"""Least 1 / alpha, in units in which a coordinate is of order one."""
SHARPEST = 1e3
"""Largest 1 / alpha in these units."""

LOWEST_SHAPE = 0.1
HIGHEST_SHAPE = 5.0


class ProbabilisticAdapter(nn.Module):
    """ProbVLM's adapter of one modality.

    x = z sqrt(D), y = x + MLP(x), and heads on y give mean, 1 / alpha and beta.

    A coordinate of a unit vector is of the order of 1 / sqrt(D); x and the distribution are in
    units in which it is of order one, so that the start does not depend on D. The MLP has three
    layers, each head two.
    """

    def __init__(self, dim: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        first = linear(dim, width, generator)
        second = linear(width, width, generator)
        self.hidden = nn.ModuleList([first, second])
        self.out = linear(width, dim, generator)
        self.mean = two_layers(dim, generator)
        self.inverse_scale = two_layers(dim, generator)
        self.shape = two_layers(dim, generator)

    def forward(self, embedding: Tensor, masks: Sequence[Tensor] = ()) -> GeneralisedGaussian:
        """Distribution over embeddings (..., D), times sqrt(D), of the meaning of ``embedding``.

        Args:
            embedding: (..., D) unit-norm rows.
            masks: Dropout masks of the two hidden layers, each (..., width); none: no dropout.
        """
        x = in_units(embedding)
        y = x
        for number, layer in enumerate(self.hidden):
            y = torch.relu(layer(y))
            if masks:
                y = y * masks[number].to(y.device)
        y = x + self.out(y)
        inverse_scale = functional.softplus(self.inverse_scale(y)).clamp(FLATTEST, SHARPEST)
        shape = LOWEST_SHAPE + (HIGHEST_SHAPE - LOWEST_SHAPE) * torch.sigmoid(self.shape(y))
        return GeneralisedGaussian(self.mean(y), inverse_scale, shape)


def two_layers(dim: int, generator: torch.Generator) -> nn.Sequential:
    """A head with one output per input."""
    first = linear(dim, dim, generator)
    second = linear(dim, dim, generator)
    return nn.Sequential(first, nn.ReLU(), second)


def in_units(embedding: Tensor) -> Tensor:
    """Embeddings (..., D) in the units of the distributions: times sqrt(D)."""
    return embedding * math.sqrt(embedding.shape[-1])


def dropout_masks(
    size: tuple[int, int], rate: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Masks of two layers of a ``size``: zero with probability ``rate``, else 1 / (1 - rate)."""
    draws = torch.rand((2, *size), generator=generator, dtype=torch.float32)
    first, second = (draws >= rate).float() / (1 - rate)
    return first, second


BLOCK = 1 << 24
"""Numbers at a time where every row meets every candidate in every dimension."""


@dataclasses.dataclass
class ProbVLM(NetworkPredictor):
    """Two adapters that turn embeddings into distributions.

    These are factorised generalised Gaussians over the embedding space.

    The image adapter q_v and the text adapter q_t are trained on pairs (z_v, z_t), the text being
    that of the image's class or its caption, on L = l(z_v | q_v) + l(z_t | q_t) + cross_weight *
    [l(z_t | q_v) + l(z_v | q_t)], l the negative log-likelihood averaged over the D dimensions. The
    uncertainties that have been tried:

    - "aleatoric": mean over the dimensions of log Var, Var = alpha² Gamma(3/beta) / Gamma(1/beta),
      of q_v.
    - "epistemic": mean over the dimensions of the variance of q_v's mean over ``samples`` dropout
      masks. The masks are drawn once, from the seed, so a row's score does not depend on the
      others.
    - "cross_modal": log((1 - p_t̂) / p_t̂), p = softmax_j of the negative cross-modal loss of the
      image and candidate j: 1 - p_t̂ in another scale, since p_t̂ often rounds to zero.

    The first two look at the image alone, not at the answer. The supplement reports the first and
    the third: both were poor predictors of failure.

    Args:
        epochs: Passes over the training rows; None: 20, or as many as make 300 steps.
        width: Hidden width of the adapters.
        dropout: Share of hidden units that a step leaves out.
        cross_weight: Weight of the cross-modal terms.
        uncertainty: Which of the three.
        samples: Dropout masks of "epistemic".

    Source: Upadhyay et al., "ProbVLM", ICCV 2023; ViLU, supplement A.3. Departures from the
    reference implementation: there the exponent beta of the likelihood multiplies instead, and an
    absolute error is added; 1 / alpha and beta are outputs of ReLUs (no gradient once zero), here
    of softplus and a sigmoid onto [0.1, 5]; embeddings enter times sqrt(D); Adam runs under a
    cosine. Variances are averaged geometrically, since one dimension of a heavy tail outweighs all
    others in an arithmetic mean: at beta = 0.1 the ratio of Gammas is 10^25.

    Examples:
        >>> import numpy as np, vilu
        >>> # the answer is class 0 up to 45 degrees, the truth up to 63
        >>> angle = np.linspace(0, np.pi / 2, 100)
        >>> image = np.c_[np.cos(angle), np.sin(angle)]
        >>> train = vilu.Embeddings(image, np.eye(2), np.repeat([0, 1], [70, 30]))
        >>> new_image = [[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]  # at 0, 53 and 90 degrees
        >>> new = vilu.Embeddings(new_image, np.eye(2))
        >>> settings = {"cross_weight": 1.0, "epochs": 20, "learning_rate": 0.01}
        >>> method = vilu.PREDICTORS["probvlm"](uncertainty="cross_modal", **settings)
        >>> (method.fit(train).predict_uncertainty(new) > 0).tolist()  # log-odds
        [False, True, False]
    """

    name: ClassVar[str] = "probvlm"
    summary: ClassVar[str] = (
        "spread of the distribution that an adapter puts around the image's embedding (ProbVLM)"
    )
    reference: ClassVar[str] = "Upadhyay et al., ICCV 2023"
    cost: ClassVar[str] = (
        "fit: 300 steps or 20 epochs of two MLPs; score: 4 MFLOP a row, cross_modal K D powers"
    )

    batch_size: Count | None = 128  # a step is long, most of it however few rows it has
    weight_decay: NonNegative = 0.0
    width: Count = 256
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    cross_weight: NonNegative = 1e-4
    uncertainty: Literal["aleatoric", "epistemic", "cross_modal"] = "aleatoric"
    samples: Annotated[int, Field(ge=2, le=10_000)] = 15

    def module(
        self,
        tensors: dict[str, Tensor],  # noqa: ARG002
        space: EmbeddingSpace,
    ) -> nn.Module:
        """The adapters."""
        return PairAdapters(space.embed_dim, self)

    def _loss(self, batch: Batch, output: Tensor) -> Tensor:  # noqa: ARG002
        # the network saw the batch: in training its output is the loss
        return output.mean()

    def _length(self, steps: int) -> int:
        return few_epochs(steps)

    def _score(self, batch: Batch) -> Tensor:
        score: Tensor = self.network(batch)
        return score


class PairAdapters(nn.Module):
    """The adapters of both modalities.

    The outputs are losses in training mode and uncertainties in evaluation mode.
    """

    def __init__(self, dim: int, settings: ProbVLM) -> None:
        super().__init__()
        self.settings = settings
        first_weights = torch.Generator().manual_seed(settings.seed)
        self.image = ProbabilisticAdapter(dim, settings.width, first_weights)
        self.text = ProbabilisticAdapter(dim, settings.width, first_weights)
        self.draws = torch.Generator().manual_seed(settings.seed)

    def forward(self, batch: Batch) -> Tensor:
        """(B,) alignment losses, or uncertainties, as torchvision's detectors do."""
        if self.training:
            return self.alignment_loss(batch)
        score: Tensor = getattr(self, self.settings.uncertainty)(batch)
        return score

    def alignment_loss(self, batch: Batch) -> Tensor:
        """(B,) L of every pair."""
        pair = torch.stack([batch.image, batch.text[batch.target]])
        own_image, cross_text = self._losses(self.image, pair[0], pair)
        cross_image, own_text = self._losses(self.text, pair[1], pair)
        cross = cross_text + cross_image
        return own_image + own_text + self.settings.cross_weight * cross

    def _losses(
        self, adapter: ProbabilisticAdapter, embedding: Tensor, pair: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(B,) losses of the images and of the texts under the distribution of an embedding."""
        masks = self._masks(len(embedding), self.draws)
        distribution: GeneralisedGaussian = adapter(embedding, masks)
        image_loss, text_loss = distribution.nll(in_units(pair)).mean(dim=-1)
        return image_loss, text_loss

    def aleatoric(self, batch: Batch) -> Tensor:
        """(B,) mean log-variance of the image's distribution."""
        spread: Tensor = self.image(batch.image).log_variance()
        return spread.mean(dim=-1)

    def epistemic(self, batch: Batch) -> Tensor:
        """(B,) mean variance of the mean over dropout masks."""
        draws = torch.Generator().manual_seed(self.settings.seed)
        first_masks, second_masks = self._masks(self.settings.samples, draws)
        samples = zip(first_masks, second_masks, strict=True)
        means = torch.stack([self.image(batch.image, masks).mean for masks in samples])
        return means.var(dim=0).mean(dim=-1)

    def cross_modal(self, batch: Batch) -> Tensor:
        """(B,) log-odds that the VLM's answer is not the caption.

        The probabilities are the softmax of the negative cross-modal losses.
        """
        image: GeneralisedGaussian = self.image(batch.image)
        text: GeneralisedGaussian = self.text(batch.text)
        rows, dim = batch.image.shape
        size = max(BLOCK // (rows * dim), 1)
        losses = []
        for start in range(0, len(batch.text), size):
            block = slice(start, start + size)
            texts_of_image = image.at((slice(None), None)).nll(in_units(batch.text[block]))
            images_of_text = text.at(block).nll(in_units(batch.image)[:, None])
            losses.append((texts_of_image + images_of_text).mean(dim=-1))
        return failure_log_odds(-torch.cat(losses, dim=1), batch)

    def _masks(self, n: int, draws: torch.Generator) -> tuple[Tensor, Tensor]:
        return dropout_masks((n, self.settings.width), self.settings.dropout, draws)
