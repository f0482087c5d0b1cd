"""The methods ``vilu`` and ``lvu``. LVU uses only the image, and is the baseline of ViLU."""

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
    """Learned visual uncertainty: ViLU's MLP with only the image embedding, u = sigmoid(g).

    g is the MLP output, and p_y is the zero-shot probability of the true class. There are three
    losses:

    - "mse": squared error between sigmoid(g) and 1 - p_y, as in the released code. For an image
      that shows none of the classes, the target is 1.
    - "loss": squared error between softplus(g) and -log p_y, the VLM's loss, as in the supplement.
      If the mean square of -log p_y in the batch exceeds 1, the error is divided by the mean
      square. Without this division a training step would grow with the VLM's logit scale.
    - "bce": the loss of ViLU. The released checkpoints seem to be trained with this loss.

    softplus(g) = -log p_y is equivalent to sigmoid(g) = 1 - p_y. So with "mse" and with "loss",
    sigmoid(g) estimates 1 - p_y, and this estimate serves as the probability of failure. By
    Jensen's inequality, the optimal estimate is never smaller with "loss" than with "mse". Only
    "bce" estimates the probability of failure itself.

    Source: ViLU, supplement A.3, after ConfidNet (Corbière et al., NeurIPS 2019).

    Examples:
        >>> import numpy as np, vilu
        >>> angle = np.linspace(0, np.pi / 2, 100)
        >>> image = np.c_[np.cos(angle), np.sin(angle)]
        >>> text = np.eye(2)  # class 0 is at 0 degrees, class 1 at 90 degrees
        >>> target = np.repeat([0, 1], [70, 30])  # truth 0 up to 63 degrees, answer 0 up to 45
        >>> train = vilu.Embeddings(image, text, target=target)
        >>> new = vilu.Embeddings([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]], text)  # 0, 53, 90 degrees
        >>> method = vilu.LVU(loss="bce", epochs=10)
        >>> method.fit(train).predict_uncertainty(new).round()  # the second answer is wrong
        array([0., 1., 0.])
    """

    name: ClassVar[str] = "lvu"
    summary: ClassVar[str] = (
        "image-only head: regression of the true-class probability or the loss, or BCE"
    )
    reference: ClassVar[str] = "Corbière et al., NeurIPS 2019"
    cost: ClassVar[str] = "fit: 1,400 to 6,000 steps of an MLP; score: 1 MFLOP per row"

    loss: Literal["mse", "loss", "bce"] = "mse"

    @property
    def needs(self) -> Needs:
        """What a training row must have. With the loss "loss", it must have a known class.

        If an image shows none of the classes, -log p_y is infinite, so the image is left out.
        """
        if self.loss == "loss":
            return "class"
        return super().needs

    graph = head_graph
    coalitions = head_coalitions

    def module(
        self,
        tensors: dict[str, Tensor],  # noqa: ARG002
        space: EmbeddingSpace,
    ) -> FailureHead:
        """Make a head. Its initial weights are drawn from the seed."""
        generator = torch.Generator().manual_seed(self.seed)
        return FailureHead(
            space.embed_dim,
            self.hidden,
            attention=None,
            predicted_caption=False,
            generator=generator,
        )


@dataclasses.dataclass
class ViLU(HeadPredictor):
    """ViLU: an MLP on the image, the predicted caption, and cross-attention over all candidates.

    z_v is the image embedding, and z_t̂ the embedding of the predicted caption. z_tj is the
    embedding of candidate j, with the attention weight alpha_j and the learned matrix W. g is an
    MLP with ReLU and layers with 512, 256, 128 and 1 units. The uncertainty is

        u = sigmoid(g(z_v, sum_j alpha_j W z_tj, z_t̂))

    The loss is the BCE with the answer's failure as target. In a batch with N_s successes and N_f
    failures, failures have the weight log(1 + N_s / N_f).

    Args:
        attention: Form of the cross-attention.

            - "official": as in the released code, with one matrix W for keys and values, and with
              the VLM's logit scale. In the beginning, W is the identity.
            - "paper": as in the paper, with W_Q, W_K, W_V and the scale 1/sqrt(d).
            - None: no attention.
        predicted_caption: Whether the answer's text embedding is an input.
        mcm_input: Whether the answer's zero-shot probability is an input, as in the paper's
            transfer experiments (supplement, B.2).
        loss: "bce", or "mse", an ablation in the paper. With "mse", sigmoid(g) is fitted to 1 minus
            the zero-shot probability of the true class, as in ``LVU``.

    Source: ViLU, ICCV 2025. There are differences from the released code:

    - Labels, similarities and losses are in float32.
    - While the attention is frozen, weight decay does not change the attention either.
    - The weight of failures is bounded.
    - The test set is never used to select an epoch.
    - The output is the probability of failure, not of success.

    Examples:
        >>> import numpy as np, vilu
        >>> angle = np.linspace(0, np.pi / 2, 100)
        >>> image = np.c_[np.cos(angle), np.sin(angle)]
        >>> text = np.eye(2)  # class 0 is at 0 degrees, class 1 at 90 degrees
        >>> target = np.repeat([0, 1], [70, 30])  # truth 0 up to 63 degrees, answer 0 up to 45
        >>> train = vilu.Embeddings(image, text, target=target)
        >>> new = vilu.Embeddings([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]], text)  # 0, 53, 90 degrees
        >>> method = vilu.ViLU(epochs=10)
        >>> method.fit(train).predict_uncertainty(new).round()  # the second answer is wrong
        array([0., 1., 0.])
    """

    name: ClassVar[str] = "vilu"
    summary: ClassVar[str] = (
        "cross-attention over all texts + predicted caption + image (ViLU, ICCV 2025)"
    )
    reference: ClassVar[str] = "Lafon et al., ICCV 2025"
    cost: ClassVar[str] = "fit: 1,400 to 6,000 steps of an MLP; score: 1 MFLOP per row"

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
        """Make a head. Its initial weights are drawn from the seed."""
        return self._head(space)

    def _head(self, space: EmbeddingSpace, dropout: Dropout | None = None) -> FailureHead:
        """Make a head with this predictor's parameters, and with ``dropout`` if given."""
        generator = torch.Generator().manual_seed(self.seed)
        return FailureHead(
            space.embed_dim,
            self.hidden,
            attention=self.attention,
            predicted_caption=self.predicted_caption,
            mcm=self.mcm_input,
            dropout=dropout,
            generator=generator,
        )
