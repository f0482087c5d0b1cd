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
from vilu.predictors.nn.train import small_network_epochs
from vilu.predictors.vilu.head import Count, NonNegative
from vilu_bench.methods.networks import NetworkPredictor

MIN_DEVIATION = 1e-6
"""Smallest |x - mean| / alpha in a loss. At 0 the gradient would be unbounded if beta < 1."""


class GeneralisedGaussian(NamedTuple):
    """Distribution of a tensor whose entries are independent generalised Gaussians.

    An entry x has the density beta / (2 alpha Gamma(1/beta)) exp(-(|x - mean| / alpha)^beta).
    alpha is the scale, and beta is the shape.

    beta = 1 is the Laplace distribution with scale alpha. beta = 2 is the Gaussian with variance
    alpha² / 2.

    Attributes:
        mean: Mean of every entry, in any shape.
        inverse_scale: 1 / alpha > 0, which broadcasts with ``mean``.
        shape: Shape parameter beta > 0, which broadcasts with ``mean``.
    """

    mean: Tensor
    inverse_scale: Tensor
    shape: Tensor

    def nll(self, x: Tensor) -> Tensor:
        """Compute every entry's negative log-density.

        The value is (|x - mean| / alpha)^beta - log(beta / (2 alpha)) + log Gamma(1/beta).
        |x - mean| is taken as at least 1e-6 alpha, for a finite gradient.
        """
        deviation = ((x - self.mean).abs() * self.inverse_scale).clamp_min(MIN_DEVIATION)
        normaliser = (
            torch.lgamma(1 / self.shape) - torch.log(self.shape * self.inverse_scale) + math.log(2)
        )
        return deviation**self.shape + normaliser

    def log_variance(self) -> Tensor:
        """Compute every entry's log-variance: log(alpha² Gamma(3/beta) / Gamma(1/beta))."""
        return (
            torch.lgamma(3 / self.shape)
            - torch.lgamma(1 / self.shape)
            - 2 * torch.log(self.inverse_scale)
        )

    def index_all(self, index: slice | tuple[slice | None, ...]) -> GeneralisedGaussian:
        """Apply an index to all three tensors. A None in the index adds an axis."""
        mean = self.mean[index]
        inverse_scale = self.inverse_scale[index]
        shape = self.shape[index]
        return GeneralisedGaussian(mean, inverse_scale, shape)


MIN_INVERSE_SCALE = 1e-3
"""Smallest 1 / alpha, for coordinates of order one (after ``times_root_of_width``)."""
MAX_INVERSE_SCALE = 1e3
"""Largest 1 / alpha, for the same coordinates."""

MIN_SHAPE = 0.1  # smallest beta
MAX_SHAPE = 5.0  # largest beta


class ProbabilisticAdapter(nn.Module):
    """ProbVLM's network, which turns an embedding z (D,) into a distribution over embeddings.

    x = z sqrt(D) and y = x + MLP(x). Three heads on y compute the mean, 1 / alpha and beta. The MLP
    has three layers, and each head has two. There is an adapter for images and an adapter for
    texts.

    A coordinate of a unit vector has magnitude 1 / sqrt(D). A coordinate times sqrt(D) has
    magnitude one, so the start of the training does not depend on D. The distribution is also over
    embeddings times sqrt(D).
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
        """Compute a distribution from every embedding. It is over embeddings times sqrt(D).

        Args:
            embedding: (..., D) unit-norm rows.
            masks: Dropout masks (..., width) for the two hidden layers. Empty: no dropout.
        """
        x = times_root_of_width(embedding)
        y = x
        for number, layer in enumerate(self.hidden):
            y = torch.relu(layer(y))
            if masks:
                y = y * masks[number].to(y.device)
        y = x + self.out(y)
        inverse_scale = functional.softplus(self.inverse_scale(y))
        inverse_scale = inverse_scale.clamp(MIN_INVERSE_SCALE, MAX_INVERSE_SCALE)
        position = torch.sigmoid(self.shape(y))  # 0 gives the smallest beta, 1 the largest
        shape = MIN_SHAPE + (MAX_SHAPE - MIN_SHAPE) * position
        mean = self.mean(y)
        return GeneralisedGaussian(mean, inverse_scale, shape)


def two_layers(dim: int, generator: torch.Generator) -> nn.Sequential:
    """Make a head with two layers, ``dim`` inputs and ``dim`` outputs."""
    first = linear(dim, dim, generator)
    second = linear(dim, dim, generator)
    activation = nn.ReLU()
    return nn.Sequential(first, activation, second)


def times_root_of_width(embedding: Tensor) -> Tensor:
    """Multiply embeddings (..., D) by sqrt(D). The distributions are over these products."""
    return embedding * math.sqrt(embedding.shape[-1])


def dropout_masks(
    size: tuple[int, int], rate: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw dropout masks with shape ``size`` for two layers.

    An entry is 0 with probability ``rate``, else 1 / (1 - rate).
    """
    uniform_draws = torch.rand((2, *size), generator=generator, dtype=torch.float32)
    masks = (uniform_draws >= rate).float() / (1 - rate)
    first, second = masks.unbind(dim=0)
    return first, second


MAX_BLOCK_ENTRIES = 1 << 24
"""Maximum number of entries in an array (rows, candidates, dimensions) for the cross-modal loss."""


@dataclasses.dataclass
class ProbVLM(NetworkPredictor):
    """Spread of the distribution that ProbVLM's adapters predict around an embedding.

    The distributions are generalised Gaussians with independent dimensions. An adapter computes the
    distribution q_v from an image embedding z_v, and a second adapter computes q_t from a text
    embedding z_t. The adapters are trained on pairs (z_v, z_t). The text is the image's class text
    or caption. A pair has the training loss

        L = l(z_v | q_v) + l(z_t | q_t) + cross_weight * [l(z_t | q_v) + l(z_v | q_t)],

    with l the negative log-likelihood averaged over the D dimensions. There are three
    uncertainties:

    - "aleatoric": the logarithm of q_v's variance, averaged over the dimensions. The variance is
      alpha² Gamma(3/beta) / Gamma(1/beta).
    - "epistemic": the variance of q_v's mean between ``samples`` dropout masks, averaged over the
      dimensions. The masks are drawn once from the seed, so a row's score does not depend on other
      rows.
    - "cross_modal": log((1 - p_t̂) / p_t̂), where t̂ is the answer and p is the softmax of the
      negative cross-modal losses between the image and the candidates. The order of the rows is
      the same as by 1 - p_t̂, but rows with p_t̂ rounded to zero do not tie.

    "aleatoric" and "epistemic" depend on the image alone, not on the answer. ViLU's supplement
    reports "aleatoric" and "cross_modal", and both were poor predictors of failure.

    Args:
        epochs: Passes over the training rows. None: 20, changed so that there are at least 300 and
            at most about 2,000 steps, but never fewer than 10 passes.
        width: The adapters' hidden width.
        dropout: Share of hidden units to drop in a training step.
        cross_weight: Weight of the cross-modal terms.
        uncertainty: "aleatoric", "epistemic" or "cross_modal".
        samples: Number of dropout masks for "epistemic".

    Source: Upadhyay et al., "ProbVLM", ICCV 2023, and ViLU, supplement A.3. Differences from the
    reference implementation:

    - In the reference, beta multiplies |x - mean| / alpha. Here beta is the exponent.
    - In the reference, an absolute error is added to the loss. Here it is not.
    - In the reference, 1 / alpha and beta are outputs of ReLUs. A ReLU has no gradient once the
      output is zero. Here 1 / alpha is a softplus output, and beta is a sigmoid output, scaled
      to [0.1, 5].
    - Here embeddings are multiplied by sqrt(D), and Adam has a cosine schedule.
    - Here the mean over the dimensions' variances is geometric. In an arithmetic mean one dimension
      with a heavy tail would outweigh all the rest: at beta = 0.1, Gamma(3/beta) / Gamma(1/beta)
      is 10^25.

    Examples:
        >>> import numpy as np, vilu
        >>> angle = np.linspace(0, np.pi / 2, 100)
        >>> image = np.c_[np.cos(angle), np.sin(angle)]
        >>> text = np.eye(2)  # class 0 at 0 degrees, class 1 at 90 degrees
        >>> target = np.repeat([0, 1], [70, 30])  # the answers between 45 and 63 degrees are wrong
        >>> train = vilu.Embeddings(image, text, target=target)
        >>> new_image = [[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]  # at 0, 53 and 90 degrees
        >>> new = vilu.Embeddings(new_image, text)
        >>> settings = {"cross_weight": 1.0, "epochs": 20, "learning_rate": 0.01}
        >>> method = vilu.PREDICTORS["probvlm"](uncertainty="cross_modal", **settings)
        >>> log_odds = method.fit(train).predict_uncertainty(new)
        >>> log_odds > 0  # log-odds above zero: the answer is more likely wrong than right
        array([False,  True, False])
    """

    name: ClassVar[str] = "probvlm"
    summary: ClassVar[str] = (
        "spread of the distribution that an adapter puts around the image's embedding (ProbVLM)"
    )
    reference: ClassVar[str] = "Upadhyay et al., ICCV 2023"
    cost: ClassVar[str] = (
        "fit: 300 steps or 20 epochs of two MLPs; score: 4 MFLOP per row, cross_modal K D powers"
    )

    # Rows per training step. A step with more rows takes hardly more time.
    batch_size: Count | None = 128
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
        """Make the adapters."""
        return PairAdapters(space.embed_dim, self)

    def _loss(self, batch: Batch, output: Tensor) -> Tensor:  # noqa: ARG002
        # in training mode the network's output is the loss for every row
        return output.mean()

    def _default_epochs(self, epoch_steps: int) -> int:
        return small_network_epochs(epoch_steps)

    def _score(self, batch: Batch) -> Tensor:
        score: Tensor = self.network(batch)
        return score


class PairAdapters(nn.Module):
    """The adapters for both modalities.

    In training mode the output is the loss for every row, in evaluation mode the uncertainty.
    """

    def __init__(self, dim: int, settings: ProbVLM) -> None:
        super().__init__()
        self.settings = settings
        weight_generator = torch.Generator().manual_seed(settings.seed)
        self.image = ProbabilisticAdapter(dim, settings.width, weight_generator)
        self.text = ProbabilisticAdapter(dim, settings.width, weight_generator)
        self.mask_generator = torch.Generator().manual_seed(settings.seed)

    def forward(self, batch: Batch) -> Tensor:
        """Compute alignment losses (B,) in training mode, uncertainties (B,) in evaluation mode."""
        if self.training:
            return self.alignment_loss(batch)
        # each value of the setting ``uncertainty`` is the name of a method in this class
        compute = getattr(self, self.settings.uncertainty)
        uncertainty: Tensor = compute(batch)
        return uncertainty

    def alignment_loss(self, batch: Batch) -> Tensor:
        """Compute the loss L (B,) for every pair."""
        image = batch.image
        text = batch.text[batch.target]
        pair = torch.stack([image, text])
        # text_under_image is the loss of the text, under the distribution from the image
        image_under_image, text_under_image = self._losses(self.image, image, pair)
        image_under_text, text_under_text = self._losses(self.text, text, pair)
        cross_modal = text_under_image + image_under_text
        return image_under_image + text_under_text + self.settings.cross_weight * cross_modal

    def _losses(
        self, adapter: ProbabilisticAdapter, embedding: Tensor, pair: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute the images' losses (B,) and the texts' losses (B,) under an adapter.

        Args:
            adapter: Computes a distribution from each row in ``embedding``.
            embedding: (B, D) images or texts.
            pair: (2, B, D) the images and the texts. Their losses are computed.
        """
        masks = self._masks(len(embedding), self.mask_generator)
        distribution: GeneralisedGaussian = adapter(embedding, masks)
        coordinates = times_root_of_width(pair)
        losses = distribution.nll(coordinates).mean(dim=-1)  # (2, B)
        image_loss, text_loss = losses
        return image_loss, text_loss

    def aleatoric(self, batch: Batch) -> Tensor:
        """Compute the mean log-variances (B,) of the images' distributions, over the dimensions."""
        distribution: GeneralisedGaussian = self.image(batch.image)
        log_variance = distribution.log_variance()
        return log_variance.mean(dim=-1)

    def epistemic(self, batch: Batch) -> Tensor:
        """Compute how much the distributions' means vary between dropout masks.

        Return the variances (B,), averaged over the dimensions.
        """
        mask_generator = torch.Generator().manual_seed(self.settings.seed)
        first_masks, second_masks = self._masks(self.settings.samples, mask_generator)
        pairs_of_masks = zip(first_masks, second_masks, strict=True)
        means = torch.stack([self.image(batch.image, masks).mean for masks in pairs_of_masks])
        variance = means.var(dim=0)
        return variance.mean(dim=-1)

    def cross_modal(self, batch: Batch) -> Tensor:
        """Compute the log-odds (B,) that the VLM's answer is wrong.

        The probabilities are the softmax of the negative cross-modal losses.
        """
        image: GeneralisedGaussian = self.image(batch.image)
        text: GeneralisedGaussian = self.text(batch.text)
        n_rows, dim = batch.image.shape
        block_size = max(MAX_BLOCK_ENTRIES // (n_rows * dim), 1)
        losses = []
        image_by_candidate = image.index_all((slice(None), None))  # (B, 1, D)
        image_coordinates = times_root_of_width(batch.image)[:, None]  # (B, 1, D)
        text_coordinates = times_root_of_width(batch.text)
        for start in range(0, len(batch.text), block_size):
            block = slice(start, start + block_size)
            texts_under_image = image_by_candidate.nll(text_coordinates[block])
            images_under_text = text.index_all(block).nll(image_coordinates)
            cross_modal_loss = texts_under_image + images_under_text
            losses.append(cross_modal_loss.mean(dim=-1))
        logits = -torch.cat(losses, dim=1)
        return failure_log_odds(logits, batch)

    def _masks(self, n: int, mask_generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw ``n`` dropout masks for each of the two hidden layers."""
        return dropout_masks((n, self.settings.width), self.settings.dropout, mask_generator)
