"""Methods with a small network.

PVU predicts the VLM's loss from the image alone. LMN predicts a temperature for the logits.
"""

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
    """A predictor whose network has one output per row, trained with AdamW.

    The fitted weights are the weights after the last epoch.

    Args:
        epochs: Passes over the training rows. None: the default in ``HeadPredictor``.
        batch_size: Rows per step. None: the default in ``HeadPredictor``.
        learning_rate: Initial learning rate. A cosine schedule lowers the rate to zero.
        weight_decay: AdamW's weight decay.
    """

    seed: int = 0
    epochs: Count | None = None
    batch_size: Count | None = None
    learning_rate: Positive = 1e-3
    weight_decay: NonNegative = 1e-4
    device: str = "auto"

    @abstractmethod
    def _loss(self, batch: Batch, output: Tensor) -> Tensor:
        """Compute the training loss from the network's output (B,)."""

    def _default_epochs(self, epoch_steps: int) -> int:
        """Return the default epoch count if an epoch has ``epoch_steps`` steps."""
        return default_epochs(epoch_steps)

    def _learn(
        self,
        train: Rows,
        failure: Tensor,  # noqa: ARG002
        validation: EmbeddingSource | None,  # noqa: ARG002
    ) -> Learnt:
        nothing_fitted: dict[str, Tensor] = {}
        module = self.module(nothing_fitted, train.source.space)
        network = cast("nn.Module", module)
        settings = self._settings(AdamWConfig)
        history = train_adamw(network, self._loss, train, settings, self._default_epochs)
        state = network.state_dict()
        weights = {name: tensor.cpu() for name, tensor in state.items()}
        return Learnt(weights, {"history": {"loss": history}})


def perceptron(widths: list[int], seed: int) -> nn.Sequential:
    """Make linear layers of ``widths`` with leaky ReLUs in between. ``seed`` draws the weights."""
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for n_inputs, n_outputs in itertools.pairwise(widths):
        layers += [linear(n_inputs, n_outputs, generator), nn.LeakyReLU()]
    layers_without_last_activation = layers[:-1]
    return nn.Sequential(*layers_without_last_activation)


RANKING_MARGIN = 0.1  # margin in the ranking loss of ``PVU``
MIN_UNCERTAINTY = 1e-6  # smallest uncertainty from ``PVU``


@dataclasses.dataclass
class PVU(NetworkPredictor):
    """Pretrained visual uncertainties: an image-only network trained on the VLM's own loss.

    u = softplus(g(z_v)) + 1e-6

    g is an MLP D -> 512 -> 512 -> 1 with leaky ReLUs. The only input is the image embedding z_v.
    The score u predicts the VLM's loss L = -log p_target.

    With loss="ranking" the network learns the order of the losses L. A shuffled batch is divided
    into pairs of consecutive rows 1 and 2. The training loss is the mean of
    max(0, 0.1 - sign(L_1 - L_2) (u_1 - u_2)) over the pairs. If the batch has an odd row count, the
    last row is left out.

    With loss="mse" the network learns the values L, and the training loss is the mean of (u - L)^2.

    The training set needs labels, but no wrong answers. For captions, L is computed within the
    drawn pool.

    Args:
        hidden: The MLP's hidden widths.
        loss: Training loss: "ranking" or "mse".

    Source: Kirchhof et al., "Pretrained Visual Uncertainties", 2024. The paper pretrains on
    ImageNet-21k with 32 passes over 200,000 images. Here the network is fitted to the training
    rows, by default for 1,400 to 6,000 steps, but at least 10 and at most 300 epochs. AdamW
    (learning rate 1e-3, betas 0.8 and 0.95, weight decay 1e-4) and the cosine schedule are the
    paper's. Unit-norm embeddings are multiplied by sqrt(D), so that a coordinate's magnitude is
    about one. The losses L are float64. In float32, many rows with nearly certain answers would
    tie.

    Examples:
        >>> import numpy as np, vilu
        >>> angle = np.linspace(0, np.pi / 2, 100)
        >>> image = np.c_[np.cos(angle), np.sin(angle)]
        >>> text = np.eye(2)  # class 0 at 0 degrees, class 1 at 90 degrees
        >>> target = np.repeat([0, 1], [70, 30])  # the answers between 45 and 63 degrees are wrong
        >>> train = vilu.Embeddings(image, text, target=target)
        >>> new_image = [[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]  # at 0, 53 and 90 degrees
        >>> new = vilu.Embeddings(new_image, text)
        >>> uncertainty = vilu.PREDICTORS["pvu"](epochs=10).fit(train).predict_uncertainty(new)
        >>> uncertainty.argsort()  # the second image, among the wrong answers, is most uncertain
        array([0, 2, 1])
    """

    name: ClassVar[str] = "pvu"
    summary: ClassVar[str] = (
        "image-only head that ranks the VLM's own losses (Pretrained Visual Uncertainties)"
    )
    reference: ClassVar[str] = "Kirchhof et al., 2024"
    cost: ClassVar[str] = "fit: 1,400 to 6,000 steps of an MLP; score: 1 MFLOP per row"
    looks_at: ClassVar[frozenset[str]] = frozenset({"image"})
    depends_on_answer: ClassVar[bool] = False

    hidden: Widths = (512, 512)
    loss: Literal["ranking", "mse"] = "ranking"

    def module(
        self,
        tensors: dict[str, Tensor],  # noqa: ARG002
        space: EmbeddingSpace,
    ) -> nn.Module:
        """Make the network."""
        return ImageNetwork(space.embed_dim, self.hidden, self.seed)

    def graph(self) -> nn.Module:
        """Make the score for export. onnxruntime lacks softplus in float64, so it is replaced."""
        return Graph(self._score_without_softplus, self.network)

    def _score_without_softplus(self, batch: Batch) -> Tensor:
        network_output = self.network(batch)
        output = float64(network_output)
        zero = torch.zeros_like(output)
        # softplus(x) = log(exp(x) + exp(0))
        return torch.logaddexp(output, zero) + MIN_UNCERTAINTY

    def _loss(self, batch: Batch, output: Tensor) -> Tensor:
        log_p = log_posterior(batch)
        vlm_loss = -batch.log_likelihood(log_p)
        uncertainty = functional.softplus(output) + MIN_UNCERTAINTY
        vlm_loss_on_device = vlm_loss.to(output.device)
        return LOSSES[self.loss](uncertainty, vlm_loss_on_device)

    def _score(self, batch: Batch) -> Tensor:
        network_output = self.network(batch)
        output = float64(network_output)
        return functional.softplus(output) + MIN_UNCERTAINTY


class ImageNetwork(nn.Module):
    """An MLP on the image embedding."""

    def __init__(self, dim: int, hidden: tuple[int, ...], seed: int) -> None:
        super().__init__()
        self.scale = math.sqrt(dim)
        self.layers = perceptron([dim, *hidden, 1], seed)

    def forward(self, batch: Batch) -> Tensor:
        """Compute the MLP's output (B,), float32."""
        output: Tensor = self.layers(batch.image * self.scale)
        return output.squeeze(-1)


def ranking_loss(uncertainty: Tensor, vlm_loss: Tensor) -> Tensor:
    """Average the hinge loss over pairs of consecutive rows.

    A pair's loss is zero if its uncertainties have the same order as the VLM's losses, and are at
    least 0.1 apart. Both arguments are (B,).
    """
    n_pairs = len(vlm_loss) // 2
    n_paired_rows = 2 * n_pairs
    uncertainty_of_pair = uncertainty[:n_paired_rows].view(n_pairs, 2)
    u_1, u_2 = uncertainty_of_pair.unbind(dim=1)
    loss_of_pair = vlm_loss[:n_paired_rows].view(n_pairs, 2)
    loss_1, loss_2 = loss_of_pair.unbind(dim=1)
    sign = torch.sign(loss_1 - loss_2).to(uncertainty.dtype)
    hinge = functional.relu(RANKING_MARGIN - sign * (u_1 - u_2))
    return hinge.sum() / max(n_pairs, 1)  # a batch with one row has no pairs


def regression_loss(uncertainty: Tensor, vlm_loss: Tensor) -> Tensor:
    """Average the squared differences between the uncertainties (B,) and the VLM's losses (B,)."""
    loss_to_learn = vlm_loss.to(uncertainty.dtype)
    return functional.mse_loss(uncertainty, loss_to_learn)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ranking": ranking_loss,
    "mse": regression_loss,
}
"""Training losses for ``PVU``, by name.

The arguments are the uncertainties (B,) and the VLM's losses (B,).
"""


MAX_LOG_TEMPERATURE = math.log(10.0)
"""Largest |log T|. So the temperatures of two rows differ at most by a factor of 100."""

MAX_GAP = 20.0
"""Largest gap to the largest logit, in nats. A missing gap has this value, too."""


@dataclasses.dataclass
class LMN(NetworkPredictor):
    """Lightweight meta-network (LMN): a network computes a temperature T(x) > 0 for every row x.

    u = 1 - max_j softmax_j(l / T(x)), as in MCM, with l the logits. T(x) never changes the answer.

    log T is the output of an MLP with 16 hidden units (about 17,000 parameters at D = 512). The
    inputs are the image embedding z_v, the answer's text embedding z_t̂, and the gaps between the
    largest logit and the next largest logits. With p = softmax(l / T) and s = max_j p_j, a row has
    the training loss

        balance * [1 - psi(s) - log s]                  if the answer is right,
        (1 - balance) * [psi(s) + KL(uniform || p)]     if it is wrong,

    where psi is the sigmoid of (s - 1/2) / steepness, rescaled to psi(0) = 0 and psi(1) = 1. The
    loss raises s for right answers and lowers s for wrong answers. If the training set has only
    right or only wrong answers, one of the two terms is unused, and there is a warning.

    Args:
        hidden: The MLP's hidden widths.
        n_logits: Number of logits, the largest ones, from which the gaps are computed.
        balance: Weight of the loss for right answers.
        steepness: The divisor in psi. With a large value, psi(s) is nearly s, as in ordinary
            calibration.

    Source: Huang et al., "Revisiting Confidence Calibration for Misclassification Detection in
    VLMs", ICLR 2026. There are three differences. In the paper all K logits are inputs, so K and
    the class order are fixed. Here the inputs are gaps, sorted, and at most 20 nats each. If there
    are fewer than ``n_logits`` candidates, the missing gaps are 20 nats. Here the last layer starts
    at zero, so the scores before training are MCM's scores. Here |log T| is at most log 10.

    Examples:
        >>> import numpy as np, vilu
        >>> angle = np.linspace(0, np.pi / 2, 100)
        >>> image = np.c_[np.cos(angle), np.sin(angle)]
        >>> text = np.eye(2)  # class 0 at 0 degrees, class 1 at 90 degrees
        >>> target = np.repeat([0, 1], [70, 30])  # the answers between 45 and 63 degrees are wrong
        >>> train = vilu.Embeddings(image, text, target=target, logit_scale=10.0)
        >>> new_image = [[0.8, 0.6], [0.6, 0.8]]  # at 37 and 53 degrees
        >>> new = vilu.Embeddings(new_image, text, logit_scale=10.0)
        >>> vilu.MCM().predict_uncertainty(new).round(2)  # both are 8 degrees from 45 degrees
        array([0.12, 0.12])
        >>> method = vilu.PREDICTORS["lmn"](epochs=20, learning_rate=0.01)
        >>> method.fit(train).predict_uncertainty(new).round(1)  # image 2 is near wrong answers
        array([0. , 0.3])
    """

    name: ClassVar[str] = "lmn"
    summary: ClassVar[str] = (
        "MCM, and a small network predicts the temperature of each image (LMN, ICLR 2026)"
    )
    reference: ClassVar[str] = "Huang et al., ICLR 2026"
    cost: ClassVar[str] = "fit: 1,400 to 6,000 steps of a small MLP; score: 40 kFLOP per row"

    hidden: Widths = (16,)
    n_logits: Annotated[int, Field(ge=2)] = 16
    balance: Annotated[float, Field(ge=0, le=1)] = 0.6
    steepness: Positive = 0.05

    needs: ClassVar[Needs] = "failure"

    def _learn(self, train: Rows, failure: Tensor, validation: EmbeddingSource | None) -> Learnt:
        if len(failure.unique()) < 2:
            missing_kind = "successes" if failure.any() else "failures"
            warn_caller(
                f"only 0 {missing_kind} among {len(failure)} training rows: one term of the loss "
                "is unused."
            )
        return super()._learn(train, failure, validation)

    def module(
        self,
        tensors: dict[str, Tensor],  # noqa: ARG002
        space: EmbeddingSpace,
    ) -> nn.Module:
        """Make the network."""
        return MetaNetwork(space.embed_dim, self.hidden, self.n_logits, self.seed)

    def _loss(self, batch: Batch, output: Tensor) -> Tensor:
        inverse_temperature = torch.exp(-output)[:, None]  # the output is log T
        log_p = torch.log_softmax(batch.logits * inverse_temperature, dim=-1)
        log_s = log_p.amax(dim=-1)
        s = log_s.exp()
        psi = target_curve(s, self.steepness)
        n_candidates = log_p.shape[-1]
        divergence = -log_p.mean(dim=-1) - math.log(n_candidates)  # KL(uniform || p)
        loss_if_right = self.balance * (1 - psi - log_s)
        loss_if_wrong = (1 - self.balance) * (psi + divergence)
        loss_of_row = torch.where(batch.failure == 1, loss_if_wrong, loss_if_right)
        return loss_of_row.mean()

    graph = own_graph  # the score can be exported to ONNX

    def _score(self, batch: Batch) -> Tensor:
        log_temperature = self.network(batch)
        temperature = float64(log_temperature).exp()
        log_p = log_posterior(batch, temperature[:, None])
        largest_log_p = log_p.amax(dim=-1)
        return -torch.expm1(largest_log_p)  # 1 - p, precise also for p near 1


class MetaNetwork(nn.Module):
    """Network that computes log T from a row's logits, image and answer text."""

    def __init__(self, dim: int, hidden: tuple[int, ...], n_logits: int, seed: int) -> None:
        super().__init__()
        self.n_logits = n_logits
        self.scale = math.sqrt(dim)
        n_gaps = n_logits - 1
        n_inputs = n_gaps + 2 * dim  # the gaps, the image and the answer's text
        self.layers = perceptron([n_inputs, *hidden, 1], seed)
        last_layer = self.layers[-1]
        # before training the output is 0, so T = 1 for every row
        for parameter in last_layer.parameters():
            nn.init.zeros_(parameter)

    def forward(self, batch: Batch) -> Tensor:
        """Compute the logarithms of the temperatures (B,), float32."""
        answer = batch.text[batch.prediction]
        inputs = [
            logit_gaps(batch.logits, self.n_logits),
            batch.image * self.scale,
            answer * self.scale,
        ]
        joint_input = torch.cat(inputs, dim=1)
        output: Tensor = self.layers(joint_input).squeeze(-1)
        # bounds |log T|, and hardly changes small outputs
        return MAX_LOG_TEMPERATURE * torch.tanh(output / MAX_LOG_TEMPERATURE)


def logit_gaps(logits: Tensor, n_logits: int) -> Tensor:
    """Compute the gaps between a row's largest logit and the next n - 1 logits, ascending.

    The logits are (B, K), the gaps are (B, n - 1), and n is ``n_logits``. The unit is 20 nats. A
    gap is at most one unit, and if K < n, the missing gaps are one unit.
    """
    n_present = min(n_logits, logits.shape[1])
    descending = logits.topk(n_present, dim=-1).values
    largest = descending[:, :1]
    gaps_in_nats = largest - descending[:, 1:]
    gaps = (gaps_in_nats / MAX_GAP).clamp(max=1)
    n_missing = n_logits - n_present
    return functional.pad(gaps, (0, n_missing), value=1.0)


def target_curve(confidence: Tensor, steepness: float) -> Tensor:
    """Compute psi in ``LMN``: a sigmoid curve from 0 at confidence 0 to 1 at confidence 1.

    The curve is the sigmoid of (s - 1/2) / lambda, rescaled, with s the confidence and lambda the
    steepness. It is computed as

        (1 + tanh((s - 1/2) / (2 lambda)) / tanh(1 / (4 lambda))) / 2,

    because this form does not overflow for any lambda.
    """
    curve = torch.tanh((confidence - 0.5) / (2 * steepness))
    curve_at_one = math.tanh(1 / (4 * steepness))
    return (1 + curve / curve_at_one) / 2
