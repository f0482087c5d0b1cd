"""ViLU, its image-only baseline, and ensembles of it."""

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

    With p_y the zero-shot probability of the true class, the losses are "mse": squared error of
    sigmoid(g) to 1 - p_y (1 for a picture of none of the classes), as the released code does;
    "loss": squared error of softplus(g) to the backbone's loss -log p_y, as the supplement says;
    over the mean square of a batch's losses where that exceeds one, so that a step does not grow
    with the VLM's logit scale; "bce": ViLU's own loss, which the released checkpoints seem to be
    trained with.

    A predicted loss softplus(g) = -log p_y means p_y = 1 - sigmoid(g), so sigmoid(g) has one
    meaning in both regressions: the probability that the VLM withholds from the truth, which stands
    in for the probability of failure. The mean of -log p_y is ruled by its largest values, so
    "loss" errs upwards (by Jensen's inequality the best "loss" is never below the best "mse"); only
    "bce" learns the failure itself.

    Source: ViLU, supplement A.3, after ConfidNet (Corbière et al., NeurIPS 2019).

    Examples:
        >>> import numpy as np, vilu
        >>> angle = np.linspace(
        ...     0, np.pi / 2, 100
        ... )  # the answer is class 0 up to 45 degrees, the truth up to 63
        >>> train = vilu.Embeddings(
        ...     np.c_[np.cos(angle), np.sin(angle)], np.eye(2), np.repeat([0, 1], [70, 30])
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
        """Of "loss" the class: a picture of none of them has no finite loss."""
        return "class" if self.loss == "loss" else super().needs

    graph = head_graph
    coalitions = head_coalitions

    def module(
        self,
        tensors: dict[str, Tensor],  # noqa: ARG002
        space: EmbeddingSpace,
    ) -> FailureHead:
        """The head, with the first weights of the seed."""
        return FailureHead(
            space.embed_dim,
            self.hidden,
            attention=None,
            predicted_caption=False,
            generator=torch.Generator().manual_seed(self.seed),
        )


@dataclasses.dataclass
class ViLU(HeadPredictor):
    """ViLU: cross-attention over all candidates, the predicted caption and the image, an MLP.

    Its loss is the weighted BCE.

    u = sigmoid(g(z_v, sum_j alpha_j W z_tj, z_t̂)), g an MLP [512, 256, 128, 1] with ReLU; L =
    weighted BCE on the failure of the zero-shot answer, with weight log(1 + N_s / N_f) on failures.

    Args:
        attention: "official" (released code: identity start, shared key/value, logit scale),
            "paper" (W_Q, W_K, W_V, 1/sqrt(d)), or None.
        predicted_caption: Whether the embedding of the zero-shot answer is an input.
        mcm_input: Whether max_j p_j is an input (supplement, B.2: used for all transfer
            experiments).
        loss: "bce", or the regression "mse" of the true class's probability (the paper's ablation;
            as ``LVU``).

    Source: ViLU, ICCV 2025. Differs from the released code: labels, similarities and losses are in
    float32; the frozen attention really is frozen; the weight is bounded; selection never sees the
    test set; the output is the failure, not the confidence.

    Examples:
        >>> import numpy as np, vilu
        >>> angle = np.linspace(
        ...     0, np.pi / 2, 100
        ... )  # the answer is class 0 up to 45 degrees, the truth up to 63
        >>> train = vilu.Embeddings(
        ...     np.c_[np.cos(angle), np.sin(angle)], np.eye(2), np.repeat([0, 1], [70, 30])
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
        """The head, with the first weights of the seed."""
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
