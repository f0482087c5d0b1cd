"""Small networks on other inputs: a meta-network of temperatures, predictive visual uncertainty."""

from __future__ import annotations

import dataclasses
import itertools
import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Annotated, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from vilu.callers import warn_caller
from vilu.embeddings.rows import Rows
from vilu.embeddings.similarity import float64
from vilu.embeddings.source import Batch, EmbeddingSource, log_posterior
from vilu.embeddings.space import EmbeddingSpace
from vilu.predictors.contract.labelled import Needs
from vilu.predictors.contract.predictor import FailurePredictor, Learnt, own_graph
from vilu.predictors.nn.head import Graph
from vilu.predictors.nn.layers import linear
from vilu.predictors.nn.train import AdamWConfig, default_epochs, train_adamw
from vilu.predictors.vilu.head import Count, NonNegative, Positive, Widths


@dataclasses.dataclass
class NetworkPredictor(FailurePredictor):
    """A predictor with a network that gives one number per row, trained by AdamW.

    The weights are those of the last epoch.

    Args:
        epochs: Passes over the training rows; None: as many as a head's (``HeadPredictor``).
        batch_size: Rows per step; None: as a head's.
        learning_rate: At the start; a cosine takes it to zero.
        weight_decay: Of AdamW.
    """

    seed: int = 0
    epochs: Count | None = None
    batch_size: Count | None = None
    learning_rate: Positive = 1e-3
    weight_decay: NonNegative = 1e-4
    device: str = "auto"

    @abstractmethod
    def _loss(self, batch: Batch, output: Tensor) -> Tensor:
        """The training loss of the network's output (B,)."""

    def _length(self, steps: int) -> int:
        """How many epochs of ``steps`` steps by default."""
        return default_epochs(steps)

    def _learn(
        self,
        train: Rows,
        failure: Tensor,  # noqa: ARG002
        validation: EmbeddingSource | None,  # noqa: ARG002
    ) -> Learnt:
        network = cast("nn.Module", self.module({}, train.source.space))
        history = train_adamw(network, self._loss, train, self._settings(AdamWConfig), self._length)
        weights = {name: tensor.cpu() for name, tensor in network.state_dict().items()}
        return Learnt(weights, {"history": {"loss": history}})


def perceptron(widths: list[int], seed: int) -> nn.Sequential:
    """Linear layers of these widths with leaky ReLUs between them, drawn with the seed."""
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for n_inputs, n_outputs in itertools.pairwise(widths):
        layers += [linear(n_inputs, n_outputs, generator), nn.LeakyReLU()]
    return nn.Sequential(*layers[:-1])


MARGIN = 0.1
FLOOR = 1e-6


@dataclasses.dataclass
class PVU(NetworkPredictor):
    """Pretrained visual uncertainties: an image-only network trained on the VLM's own loss.

    u = softplus(g(z_v)) + 1e-6, and the loss is L = -log p_target.

    g is an MLP D -> 512 -> 512 -> 1 with leaky ReLUs on the image embedding alone. With
    loss="ranking" it learns only the order of the losses: over consecutive pairs of a shuffled
    batch the mean of max(0, -sign(L_1 - L_2) (u_1 - u_2) + 0.1); an odd last row is left out. With
    loss="mse" it learns the values, the mean of (u - L)^2. Labels are needed, failures are not.
    Captions: the loss is that of the pool drawn.

    Args:
        hidden: Hidden widths of the MLP.
        loss: "ranking" or "mse".

    Source: Kirchhof et al., "Pretrained Visual Uncertainties", 2024. Pretrained there on
    ImageNet-21k, here fitted to the rows at hand: for 1,400 to 6,000 steps, not 32 passes over
    200,000 images, with the same AdamW (learning rate 1e-3, betas 0.8 and 0.95, decay 1e-4) and
    cosine. Embeddings have unit norm and go in times sqrt(D), so that their coordinates have the
    size of features. The losses are float64, which keeps sure rows apart.

    Examples:
        >>> import numpy as np, vilu
        >>> # the answer is class 0 up to 45 degrees, the truth up to 63
        >>> angle = np.linspace(0, np.pi / 2, 100)
        >>> image = np.c_[np.cos(angle), np.sin(angle)]
        >>> train = vilu.Embeddings(image, np.eye(2), np.repeat([0, 1], [70, 30]))
        >>> new_image = [[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]  # at 0, 53 and 90 degrees
        >>> new = vilu.Embeddings(new_image, np.eye(2))
        >>> vilu.PREDICTORS["pvu"](epochs=10).fit(train).predict_uncertainty(new).argsort()
        array([0, 2, 1])
    """

    name: ClassVar[str] = "pvu"
    summary: ClassVar[str] = (
        "image-only head that ranks the VLM's own losses (Pretrained Visual Uncertainties)"
    )
    reference: ClassVar[str] = "Kirchhof et al., 2024"
    cost: ClassVar[str] = "fit: 1,400 to 6,000 steps of an MLP; score: 1 MFLOP a row"
    looks_at: ClassVar[frozenset[str]] = frozenset({"image"})

    hidden: Widths = (512, 512)
    loss: Literal["ranking", "mse"] = "ranking"

    def module(
        self,
        tensors: dict[str, Tensor],  # noqa: ARG002
        space: EmbeddingSpace,
    ) -> nn.Module:
        """The network."""
        return ImageNetwork(space.embed_dim, self.hidden, self.seed)

    def graph(self) -> nn.Module:
        """The score with another softplus: onnxruntime has none in float64."""
        return Graph(self._score_without_softplus, self.network)

    def _score_without_softplus(self, batch: Batch) -> Tensor:
        output = float64(self.network(batch))
        return torch.logaddexp(output, torch.zeros_like(output)) + FLOOR

    def _loss(self, batch: Batch, output: Tensor) -> Tensor:
        backbone = -batch.log_probability(log_posterior(batch), batch.target)
        uncertainty = functional.softplus(output) + FLOOR
        return LOSSES[self.loss](uncertainty, backbone.to(output.device))

    def _score(self, batch: Batch) -> Tensor:
        return functional.softplus(float64(self.network(batch))) + FLOOR


class ImageNetwork(nn.Module):
    """An MLP on the image embedding."""

    def __init__(self, dim: int, hidden: tuple[int, ...], seed: int) -> None:
        super().__init__()
        self.scale = math.sqrt(dim)
        self.layers = perceptron([dim, *hidden, 1], seed)

    def forward(self, batch: Batch) -> Tensor:
        """(B,) float32."""
        return cast("Tensor", self.layers(batch.image * self.scale)).squeeze(-1)


def ranking_loss(uncertainty: Tensor, backbone: Tensor) -> Tensor:
    """Mean hinge of consecutive pairs of uncertainties (B,).

    They should be in the order of the backbone's losses (B,).
    """
    pairs = len(backbone) // 2
    u_1, u_2 = uncertainty[: 2 * pairs].view(pairs, 2).unbind(dim=1)
    loss_1, loss_2 = backbone[: 2 * pairs].view(pairs, 2).unbind(dim=1)
    sign = torch.sign(loss_1 - loss_2).to(uncertainty.dtype)
    return functional.relu(MARGIN - sign * (u_1 - u_2)).sum() / max(pairs, 1)


def regression_loss(uncertainty: Tensor, backbone: Tensor) -> Tensor:
    """Mean squared difference of the uncertainties (B,) from the backbone's losses (B,)."""
    return functional.mse_loss(uncertainty, backbone.to(uncertainty.dtype))


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ranking": ranking_loss,
    "mse": regression_loss,
}
"""Of uncertainties and the backbone's losses, by name."""


LIMIT = math.log(10.0)
"""Largest |log T|: a hundredfold between two rows, and no posterior that rounds to one."""

FAR = 20.0
"""Gap to the largest logit, in nats, from which on a candidate is as good as absent."""


@dataclasses.dataclass
class LMN(NetworkPredictor):
    """Lightweight meta-network: MCM at a temperature T(x) > 0 that is learned per row.

    u = 1 - max_j softmax_j(l / T(x)); the answer never changes.

    log T is an MLP with 16 hidden units (about 17,000 parameters at D = 512) on (gaps of the next
    logits to the largest, z_v, z_t̂). With s = max_j p_j after scaling, and psi the sigmoid (s -
    1/2) / steepness brought to psi(0) = 0 and psi(1) = 1, its loss is balance * [1 - psi(s) - log
    s] where the answer is right, (1 - balance) * [psi(s) + KL(uniform || p)] where it is wrong,
    averaged over the batch: right but unsure is sharpened, wrong but sure is flattened.

    A training set without failures, or without successes, has one of the two forces only; that is
    said as a warning.

    Args:
        hidden: Hidden widths of the MLP.
        n_logits: How many of the largest logits are inputs.
        balance: Weight beta of the right answers.
        steepness: lambda of psi; a large one gives the diagonal of ordinary calibration.

    Source: Huang et al., "Revisiting Confidence Calibration for Misclassification Detection in
    VLMs", ICLR 2026. There all K logits are inputs in the order of the classes, which fixes K and
    that order; here the sorted gaps of the ``n_logits`` largest, cut at 20 nats, where an absent
    candidate counts as that far away. The last layer starts at zero, so that the scores start as
    MCM's, and |log T| is bounded by log 10.

    Examples:
        >>> import numpy as np, vilu
        >>> # the answer is class 0 up to 45 degrees, the truth up to 63
        >>> angle = np.linspace(0, np.pi / 2, 100)
        >>> image = np.c_[np.cos(angle), np.sin(angle)]
        >>> train = vilu.Embeddings(image, np.eye(2), np.repeat([0, 1], [70, 30]), logit_scale=10.0)
        >>> new = vilu.Embeddings([[0.8, 0.6], [0.6, 0.8]], np.eye(2), logit_scale=10.0)
        >>> vilu.MCM().predict_uncertainty(new).round(2)
        array([0.12, 0.12])
        >>> method = vilu.PREDICTORS["lmn"](epochs=20, learning_rate=0.01)
        >>> method.fit(train).predict_uncertainty(new).round(1)
        array([0. , 0.3])
    """

    name: ClassVar[str] = "lmn"
    summary: ClassVar[str] = (
        "MCM at a temperature that a small network gives each image (LMN, ICLR 2026)"
    )
    reference: ClassVar[str] = "Huang et al., ICLR 2026"
    cost: ClassVar[str] = "fit: 1,400 to 6,000 steps of a small MLP; score: 40 kFLOP a row"

    hidden: Widths = (16,)
    n_logits: Annotated[int, Field(ge=2)] = 16
    balance: Annotated[float, Field(ge=0, le=1)] = 0.6
    steepness: Positive = 0.05

    needs: ClassVar[Needs] = "failure"

    def _learn(self, train: Rows, failure: Tensor, validation: EmbeddingSource | None) -> Learnt:
        if len(failure.unique()) < 2:
            what = "successes" if failure.any() else "failures"
            warn_caller(
                f"only 0 {what} among {len(failure)} training rows: one-sided temperatures."
            )
        return super()._learn(train, failure, validation)

    def module(
        self,
        tensors: dict[str, Tensor],  # noqa: ARG002
        space: EmbeddingSpace,
    ) -> nn.Module:
        """The network."""
        return MetaNetwork(space.embed_dim, self.hidden, self.n_logits, self.seed)

    def _loss(self, batch: Batch, output: Tensor) -> Tensor:
        log_p = torch.log_softmax(batch.logits * torch.exp(-output)[:, None], dim=-1)
        log_s = log_p.amax(dim=-1)
        psi = target_curve(log_s.exp(), self.steepness)
        flatness = -log_p.mean(dim=-1) - math.log(log_p.shape[-1])
        right = self.balance * (1 - psi - log_s)
        wrong = (1 - self.balance) * (psi + flatness)
        return torch.where(batch.failure == 1, wrong, right).mean()

    graph = own_graph

    def _score(self, batch: Batch) -> Tensor:
        temperature = float64(self.network(batch)).exp()
        log_p = log_posterior(batch, temperature[:, None])
        return -torch.expm1(log_p.amax(dim=-1))


class MetaNetwork(nn.Module):
    """log T of every row, from its largest logits, the image, and the zero-shot answer's text."""

    def __init__(self, dim: int, hidden: tuple[int, ...], n_logits: int, seed: int) -> None:
        super().__init__()
        self.n_logits = n_logits
        self.scale = math.sqrt(dim)
        self.layers = perceptron([2 * dim + n_logits - 1, *hidden, 1], seed)
        for parameter in self.layers[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, batch: Batch) -> Tensor:
        """(B,) float32."""
        answer = batch.text[batch.prediction]
        inputs = [
            logit_gaps(batch.logits, self.n_logits),
            batch.image * self.scale,
            answer * self.scale,
        ]
        output: Tensor = self.layers(torch.cat(inputs, dim=1)).squeeze(-1)
        return LIMIT * torch.tanh(output / LIMIT)


def logit_gaps(logits: Tensor, n: int) -> Tensor:
    """(B, n - 1) sorted gaps of the n largest logits to the very largest.

    They are in units of 20 nats, and at most one.

    Absent candidates of (B, K) logits with K < n are one unit away.
    """
    largest = logits.topk(min(n, logits.shape[1]), dim=-1).values
    gaps = ((largest[:, :1] - largest[:, 1:]) / FAR).clamp(max=1)
    return functional.pad(gaps, (0, n - 1 - gaps.shape[1]), value=1.0)


def target_curve(confidence: Tensor, steepness: float) -> Tensor:
    """psi: the sigmoid of (confidence - 1/2) / steepness, brought to 0 at 0 and 1 at 1.

    It is formed as (1 + tanh((s - 1/2) / (2 lambda)) / tanh(1 / (4 lambda))) / 2, which no lambda
    makes overflow.
    """
    curve = torch.tanh((confidence - 0.5) / (2 * steepness))
    largest = math.tanh(1 / (4 * steepness))
    return (1 + curve / largest) / 2
