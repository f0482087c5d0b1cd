"""ViLU, and LVU, its baseline that uses only the image."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from vilu.embeddings.space import EmbeddingSpace
from vilu.predictors.contract.labelled import Needs
from vilu.predictors.nn.head import Dropout, FailureHead
from vilu.predictors.vilu.head import HeadPredictor, head_coalitions, head_graph


@dataclasses.dataclass
class LVU(HeadPredictor):
    """Learned visual uncertainty: ViLU's MLP on the image embedding alone, u = sigmoid(g).

    g is the output of the MLP, and p_y is the zero-shot probability of the true class. The losses
    are:

    - "mse": squared error between sigmoid(g) and 1 - p_y, as in the released code. For a picture of
      none of the classes the target is 1.
    - "loss": squared error between softplus(g) and -log p_y, the loss of the VLM, as in the
      supplement. It is divided by the mean square of -log p_y in the batch if that exceeds one, so
      that a step does not grow with the logit scale of the VLM.
    - "bce": the loss of ViLU. The released checkpoints seem to be trained with this loss.

    softplus(g) = -log p_y is equivalent to sigmoid(g) = 1 - p_y. So in both regressions sigmoid(g)
    estimates 1 - p_y, which is used in place of the probability of failure. With "loss" the
    estimate is higher, because the mean of -log p_y depends mostly on its largest values. By
    Jensen's inequality the optimum of "loss" is never below that of "mse". Only "bce" estimates the
    probability of failure itself.

    Source: ViLU, supplement A.3, after ConfidNet (Corbière et al., NeurIPS 2019).

    Examples:
        >>> import numpy as np, vilu
        >>> angle = np.linspace(
        ...     0, np.pi / 2, 100
        ... )  # the answer is class 0 up to 45 degrees, the true class is 0 up to 63 degrees
        >>> train = vilu.Embeddings(
        ...     np.c_[np.cos(angle), np.sin(angle)], np.eye(2), target=np.repeat([0, 1], [70, 30])
        ... )
        >>> new = vilu.Embeddings(
        ...     [[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]], np.eye(2)
        ... )  # at 0, 53 and 90 degrees
        >>> vilu.LVU(loss="bce", epochs=10).fit(train).predict_uncertainty(new).round()
        array([0., 1., 0.])
    """

    name: ClassVar[str] = "lvu"
    summary: ClassVar[str] = (
        "image-only head: regression of the true-class probability or the loss, or BCE"
    )
    reference: ClassVar[str] = "Corbière et al., NeurIPS 2019"
    cost: ClassVar[str] = "fit: 1,400 to 6,000 steps of an MLP; score: 1 MFLOP a row"

    loss: Literal["mse", "loss", "bce"] = "mse"

    @property
    def needs(self) -> Needs:
        """Labels that a fit needs. "loss" needs the class, since -log p_y must be finite."""
        return "class" if self.loss == "loss" else super().needs

    graph = head_graph
    coalitions = head_coalitions

    def module(
        self,
        tensors: dict[str, Tensor],  # noqa: ARG002
        space: EmbeddingSpace,
    ) -> FailureHead:
        """A new head, whose initial weights are drawn with the seed."""
        return FailureHead(
            space.embed_dim,
            self.hidden,
            attention=None,
            predicted_caption=False,
            generator=torch.Generator().manual_seed(self.seed),
        )


@dataclasses.dataclass
class ViLU(HeadPredictor):
    """ViLU: an MLP on the image, the predicted caption, and cross-attention over all candidates.

        u = sigmoid(g(z_v, sum_j alpha_j W z_tj, z_t̂))

    z_v is the image, z_tj are the candidates with their attention weights alpha_j, and z_t̂ is the
    predicted caption. g is an MLP [512, 256, 128, 1] with ReLU. The loss is the BCE on the failure
    of the zero-shot answer. With N_s successes and N_f failures, failures have the weight
    log(1 + N_s / N_f).

    Args:
        attention: Form of the cross-attention. "official": as in the released code, with W
            initialised to the identity, shared keys and values, and the logit scale. "paper": with
            W_Q, W_K, W_V and the scale 1/sqrt(d). None: no attention.
        predicted_caption: Whether the embedding of the zero-shot answer is an input.
        mcm_input: Whether max_j p_j is an input. The transfer experiments of the paper use it
            (supplement, B.2).
        loss: "bce", or "mse": regression of the probability of the true class, as in ``LVU`` (an
            ablation of the paper).

    Source: ViLU, ICCV 2025. Differences from the released code:

    - Labels, similarities and losses are in float32.
    - The attention is not changed at all while it is frozen.
    - The weight of failures is bounded.
    - The test set is never used for selection.
    - The output is the probability of failure, not the confidence.

    Examples:
        >>> import numpy as np, vilu
        >>> angle = np.linspace(
        ...     0, np.pi / 2, 100
        ... )  # the answer is class 0 up to 45 degrees, the true class is 0 up to 63 degrees
        >>> train = vilu.Embeddings(
        ...     np.c_[np.cos(angle), np.sin(angle)], np.eye(2), target=np.repeat([0, 1], [70, 30])
        ... )
        >>> new = vilu.Embeddings(
        ...     [[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]], np.eye(2)
        ... )  # at 0, 53 and 90 degrees
        >>> vilu.ViLU(epochs=10).fit(train).predict_uncertainty(new).round()
        array([0., 1., 0.])
    """

    name: ClassVar[str] = "vilu"
    summary: ClassVar[str] = (
        "cross-attention over all texts + predicted caption + image (ViLU, ICCV 2025)"
    )
    reference: ClassVar[str] = "Lafon et al., ICCV 2025"
    cost: ClassVar[str] = "fit: 1,400 to 6,000 steps of an MLP; score: 1 MFLOP a row"

    attention: Literal["official", "paper"] | None = "official"
    predicted_caption: bool = True
    mcm_input: bool = False
    loss: Literal["bce", "mse"] = "bce"

    graph = head_graph
    coalitions = head_coalitions

    def module(
        self,
        tensors: dict[str, Tensor],  # noqa: ARG002
        space: EmbeddingSpace,
    ) -> nn.Module:
        """A new head, whose initial weights are drawn with the seed."""
        return self._head(space)

    def _head(self, space: EmbeddingSpace, dropout: Dropout | None = None) -> FailureHead:
        return FailureHead(
            space.embed_dim,
            self.hidden,
            attention=self.attention,
            predicted_caption=self.predicted_caption,
            mcm=self.mcm_input,
            dropout=dropout,
            generator=torch.Generator().manual_seed(self.seed),
        )
