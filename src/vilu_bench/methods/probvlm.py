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

# smallest |x - mean| / alpha: for beta < 1 the gradient of the loss is unbounded at x = mean
SMALLEST = 1e-6


class GeneralisedGaussian(NamedTuple):
    """Independent generalised Gaussians.

    The density of an entry is beta / (2 alpha Gamma(1/beta)) exp(-(|x - mean| / alpha)^beta).

    beta = 1 gives the Laplace distribution of scale alpha; beta = 2 gives the Gaussian of variance
    alpha² / 2.

    Attributes:
        mean: Mean of every entry, in any array shape.
        inverse_scale: 1 / alpha > 0; broadcasts with ``mean``.
        shape: Shape parameter beta > 0; broadcasts with ``mean``.
    """

    mean: Tensor
    inverse_scale: Tensor
    shape: Tensor

    def nll(self, x: Tensor) -> Tensor:
        """Negative log-density of every entry.

        It is (|x - mean| / alpha)^beta - log(beta / (2 alpha)) + log Gamma(1/beta).

        |x - mean| is at least 1e-6 alpha, which keeps the gradient finite.
        """
        deviation = ((x - self.mean).abs() * self.inverse_scale).clamp_min(SMALLEST)
        normaliser = (
            torch.lgamma(1 / self.shape) - torch.log(self.shape * self.inverse_scale) + math.log(2)
        )
        return deviation**self.shape + normaliser

    def log_variance(self) -> Tensor:
        """Log-variance of every entry: log(alpha² Gamma(3/beta) / Gamma(1/beta))."""
        return (
            torch.lgamma(3 / self.shape)
            - torch.lgamma(1 / self.shape)
            - 2 * torch.log(self.inverse_scale)
        )

    def at(self, where: slice | tuple[slice | None, ...]) -> GeneralisedGaussian:
        """Apply an index to all three arrays; None in it adds an axis."""
        return GeneralisedGaussian(self.mean[where], self.inverse_scale[where], self.shape[where])


FLATTEST = 1e-3
"""Smallest 1 / alpha, in the units of ``in_units``, where a coordinate is of order one."""
SHARPEST = 1e3
"""Largest 1 / alpha in the same units."""

LOWEST_SHAPE = 0.1
HIGHEST_SHAPE = 5.0


class ProbabilisticAdapter(nn.Module):
    """ProbVLM's adapter of one modality: from an embedding z to a distribution over embeddings.

    x = z sqrt(D) and y = x + MLP(x). Three heads on y give the mean, 1 / alpha and beta.

    A coordinate of a unit vector is of order 1 / sqrt(D). Multiplied by sqrt(D) it is of order one,
    so that training starts alike for every D. The distribution is over embeddings times sqrt(D).
    The MLP has three layers and each head has two.
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
        """Distribution, over embeddings (..., D) times sqrt(D), that belongs to ``embedding``.

        Args:
            embedding: (..., D) unit-norm rows.
            masks: Dropout masks (..., width) of the two hidden layers; empty: no dropout.
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
    """A head of two layers with ``dim`` inputs and ``dim`` outputs."""
    first = linear(dim, dim, generator)
    second = linear(dim, dim, generator)
    return nn.Sequential(first, nn.ReLU(), second)


def in_units(embedding: Tensor) -> Tensor:
    """Embeddings (..., D) times sqrt(D), the units of the distributions."""
    return embedding * math.sqrt(embedding.shape[-1])


def dropout_masks(
    size: tuple[int, int], rate: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Dropout masks (``size``) of two layers: 0 with probability ``rate``, else 1 / (1 - rate)."""
    draws = torch.rand((2, *size), generator=generator, dtype=torch.float32)
    first, second = (draws >= rate).float() / (1 - rate)
    return first, second


BLOCK = 1 << 24
"""Most numbers in an array (rows, candidates, dimensions) of the cross-modal loss."""


@dataclasses.dataclass
class ProbVLM(NetworkPredictor):
    """Two adapters that turn embeddings into distributions over the embedding space.

    The distributions are factorised generalised Gaussians. The image adapter q_v and the text
    adapter q_t are trained on pairs (z_v, z_t), where the text is that of the image's class, or its
    caption. The training loss of a pair is

        L = l(z_v | q_v) + l(z_t | q_t) + cross_weight * [l(z_t | q_v) + l(z_v | q_t)],

    with l the negative log-likelihood averaged over the D dimensions. There are three
    uncertainties:

    - "aleatoric": mean over the dimensions of log Var of q_v, with Var = alpha² Gamma(3/beta) /
      Gamma(1/beta).
    - "epistemic": variance of q_v's mean over ``samples`` dropout masks, averaged over the
      dimensions. The masks are drawn once from the seed, so the score of a row does not depend on
      other rows.
    - "cross_modal": log((1 - p_t̂) / p_t̂), where p is the softmax of the negative cross-modal
      losses of the image and the candidates. It orders the rows as 1 - p_t̂ does, but keeps apart
      rows whose p_t̂ rounds to zero.

    "aleatoric" and "epistemic" depend on the image alone, not on the answer. ViLU's supplement
    reports "aleatoric" and "cross_modal"; both were poor predictors of failure.

    Args:
        epochs: Passes over the training rows; None: 20, or as many as make 300 steps.
        width: Hidden width of the adapters.
        dropout: Share of hidden units that a training step drops.
        cross_weight: Weight of the cross-modal terms.
        uncertainty: "aleatoric", "epistemic" or "cross_modal".
        samples: Number of dropout masks of "epistemic".

    Source: Upadhyay et al., "ProbVLM", ICCV 2023; ViLU, supplement A.3. Differences from the
    reference implementation:

    - There beta multiplies |x - mean| / alpha; here it is the exponent. There an absolute error is
      added to the loss.
    - There 1 / alpha and beta are outputs of ReLUs, which have no gradient once they are zero. Here
      they are outputs of a softplus and of a sigmoid onto [0.1, 5].
    - Here embeddings are multiplied by sqrt(D), and Adam has a cosine schedule.
    - Here the variances of the dimensions are averaged geometrically. In an arithmetic mean one
      dimension with a heavy tail outweighs all others: at beta = 0.1 the ratio of Gammas is 10^25.

    Examples:
        >>> import numpy as np, vilu
        >>> # the answer is class 0 up to 45 degrees, the truth up to 63
        >>> angle = np.linspace(0, np.pi / 2, 100)
        >>> image = np.c_[np.cos(angle), np.sin(angle)]
        >>> train = vilu.Embeddings(image, np.eye(2), target=np.repeat([0, 1], [70, 30]))
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

    batch_size: Count | None = 128  # most of a step's time does not depend on its number of rows
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
        # in training mode the output of the network is the loss of every row
        return output.mean()

    def _length(self, steps: int) -> int:
        return few_epochs(steps)

    def _score(self, batch: Batch) -> Tensor:
        score: Tensor = self.network(batch)
        return score


class PairAdapters(nn.Module):
    """The adapters of both modalities.

    The output is the loss of every row in training mode and the uncertainty in evaluation mode.
    """

    def __init__(self, dim: int, settings: ProbVLM) -> None:
        super().__init__()
        self.settings = settings
        first_weights = torch.Generator().manual_seed(settings.seed)
        self.image = ProbabilisticAdapter(dim, settings.width, first_weights)
        self.text = ProbabilisticAdapter(dim, settings.width, first_weights)
        self.draws = torch.Generator().manual_seed(settings.seed)

    def forward(self, batch: Batch) -> Tensor:
        """Alignment losses (B,) in training mode, uncertainties (B,) in evaluation mode."""
        if self.training:
            return self.alignment_loss(batch)
        score: Tensor = getattr(self, self.settings.uncertainty)(batch)
        return score

    def alignment_loss(self, batch: Batch) -> Tensor:
        """Loss L (B,) of every pair."""
        pair = torch.stack([batch.image, batch.text[batch.target]])
        own_image, cross_text = self._losses(self.image, pair[0], pair)
        cross_image, own_text = self._losses(self.text, pair[1], pair)
        cross = cross_text + cross_image
        return own_image + own_text + self.settings.cross_weight * cross

    def _losses(
        self, adapter: ProbabilisticAdapter, embedding: Tensor, pair: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Losses (B,) of the images and of the texts, under the distributions of ``embedding``."""
        masks = self._masks(len(embedding), self.draws)
        distribution: GeneralisedGaussian = adapter(embedding, masks)
        image_loss, text_loss = distribution.nll(in_units(pair)).mean(dim=-1)
        return image_loss, text_loss

    def aleatoric(self, batch: Batch) -> Tensor:
        """Log-variance of the image's distribution, averaged over the dimensions: (B,)."""
        spread: Tensor = self.image(batch.image).log_variance()
        return spread.mean(dim=-1)

    def epistemic(self, batch: Batch) -> Tensor:
        """Variance, over dropout masks, of the mean, averaged over the dimensions: (B,)."""
        draws = torch.Generator().manual_seed(self.settings.seed)
        first_masks, second_masks = self._masks(self.settings.samples, draws)
        samples = zip(first_masks, second_masks, strict=True)
        means = torch.stack([self.image(batch.image, masks).mean for masks in samples])
        return means.var(dim=0).mean(dim=-1)

    def cross_modal(self, batch: Batch) -> Tensor:
        """Log-odds (B,) that the VLM's answer is wrong.

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
