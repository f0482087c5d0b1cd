"""SIRC: a zero-shot confidence, overruled where the image is untypical."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from vilu.embeddings.rows import SCORING_BATCH, Rows
from vilu.embeddings.similarity import float64
from vilu.embeddings.source import Batch, EmbeddingSource, log_posterior
from vilu.errors import UsageError
from vilu.predictors.contract.predictor import FailurePredictor, Learnt, own_graph

# least standard deviation of the typicality: what float32 leaves of the norm of a unit vector
MIN_DEVIATION = 1e-6


@dataclass
class SIRC(FailurePredictor):
    """Softmax information retaining combination: u = log(S1_max - S1) + log(1 + exp(-b (S2 - a))).

    S1 is a confidence of the posterior and S2 a typicality of the image, a = mean(S2) - 3 sd(S2)
    and b = 1 / sd(S2) over the training rows (sd at least 1e-6). While S2 is typical the second
    term is nearly constant and S1 decides; an image far below a is uncertain whatever S1 says. This
    is the logarithm of the published product, so that nothing underflows; S1_max - S1 is formed
    without cancellation.

    The labels are not used. The rows are those of every fitted method, usable and labelled.

    Args:
        confidence: S1: "msp", max_j p_j; "entropy", -H(p); "doctor", sum_j p_j^2.
        typicality: S2: "norm1", ||z_v||_1; "residual", minus the norm of the part of z_v outside
            the principal subspace of the training embeddings (of their second moment, uncentred).
        components: Dimension of that subspace; None: half of D, or of the number of rows if that is
            less.

    Source: Xia and Bouganis, ACCV 2022. There S2 is of the features before the classifier; here z_v
    has unit 2-norm, so its 1-norm says how evenly it spreads over the coordinates. The published
    code takes 512 components, which leaves no residual of an embedding that narrow, and moves the
    origin by the classifier's bias, which a VLM has not.

    Examples:
        >>> import vilu
        >>> text = [[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]
        >>> train = vilu.Embeddings(
        ...     [[0.5, 0.5, 0.5, 0.5], [0.1, 0.7, 0.5, 0.5]], text, [0, 1], logit_scale=10.0
        ... )
        >>> new = vilu.Embeddings(
        ...     [[0.7, 0.1, 0.5, 0.5], [0.6, 0.0, 0.8, 0.0]], text, logit_scale=10.0
        ... )  # p alike
        >>> vilu.PREDICTORS["sirc"]().fit(train).predict_uncertainty(new).round(2)
        array([-5.88, -3.88])
    """

    name: ClassVar[str] = "sirc"
    summary: ClassVar[str] = (
        "zero-shot confidence, overruled where the image is untypical (SIRC, ACCV 2022)"
    )
    reference: ClassVar[str] = "Xia and Bouganis, ACCV 2022"
    cost: ClassVar[str] = (
        "fit: two passes over the images; score: as mcm, with residual D^2 / 2 more"
    )
    _forms: ClassVar[str] = "shift:d slope:d complement:dDC"

    seed: int = 0
    device: str = "auto"
    confidence: Literal["msp", "entropy", "doctor"] = "msp"
    typicality: Literal["norm1", "residual"] = "norm1"
    components: Annotated[int, Field(ge=1)] | None = None

    def _learn(
        self,
        train: Rows,
        failure: Tensor,
        validation: EmbeddingSource | None,  # noqa: ARG002
    ) -> Learnt:
        learned: dict[str, Tensor] = {}
        if self.typicality == "residual":
            learned["complement"] = self._complement(train, len(failure))
        parts = []
        for batch in train.batches(SCORING_BATCH):
            parts.append(self._typicality(batch.to(self.device_), learned).cpu())
        typicality = torch.cat(parts)
        deviation = typicality.std(correction=0).clamp(min=MIN_DEVIATION)
        learned["shift"] = typicality.mean() - 3 * deviation
        learned["slope"] = 1 / deviation
        return Learnt(learned)

    def _complement(self, train: Rows, n: int) -> Tensor:
        """(D, D - components) orthonormal directions of least second moment of the ``n`` images."""
        dim = train.source.space.embed_dim
        components = self.components
        if components is None:
            components = max(min(dim, n) // 2, 1)
        if components >= dim:
            raise UsageError(
                f"components must be less than the embedding width {dim}. Got {components} instead."
            )
        moment = torch.zeros(dim, dim, dtype=torch.float64)
        for batch in train.batches(SCORING_BATCH):
            image = float64(batch.to(self.device_).image)
            moment = moment.to(image.device) + image.T @ image
        vectors: Tensor = torch.linalg.eigh(moment).eigenvectors
        return vectors[:, : dim - components].cpu().clone()

    def tensor_names(self) -> tuple[str, ...]:
        """The directions only where they are looked at."""
        return self.tensors if self.typicality == "residual" else self.tensors[:2]

    def _typicality(self, batch: Batch, learned: dict[str, Tensor]) -> Tensor:
        """(B,) float64 S2."""
        image = float64(batch.image)
        if self.typicality == "norm1":
            return image.abs().sum(dim=-1)
        outside = image @ learned["complement"].to(image.device)
        norm: Tensor = torch.linalg.vector_norm(outside, dim=-1)
        return -norm

    graph = own_graph

    def _score(self, batch: Batch) -> Tensor:
        doubt = DOUBT[self.confidence](log_posterior(batch))
        shift = self.tensor("shift", doubt.device)
        slope = self.tensor("slope", doubt.device)
        untypical = slope * (shift - self._typicality(batch, self.learned_))
        return doubt + torch.logaddexp(untypical, torch.zeros_like(untypical))


def log_rest(log_p: Tensor) -> Tensor:
    """(B,) log(1 - max_j p_j), as the log of the sum of all but the largest probability."""
    largest = log_p.argmax(dim=-1, keepdim=True)
    return torch.logsumexp(log_p.scatter(1, largest, -torch.inf), dim=-1)


def log_entropy(log_p: Tensor) -> Tensor:
    """(B,) log H(p)."""
    return torch.logsumexp(log_p + torch.log(-log_p), dim=-1)


def log_gini(log_p: Tensor) -> Tensor:
    """(B,) log sum_j p_j (1 - p_j)."""
    return torch.logsumexp(log_p + torch.log(-torch.expm1(log_p)), dim=-1)


DOUBT: dict[str, Callable[[Tensor], Tensor]] = {
    "msp": log_rest,
    "entropy": log_entropy,
    "doctor": log_gini,
}
"""log(S1_max - S1) of (B, K) log p, by the name of the confidence."""
