"""SIRC: a zero-shot confidence, overruled for images far from the training images."""

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

# Smallest standard deviation of S2. It is the rounding error of a unit norm in float32.
MIN_DEVIATION = 1e-6


@dataclass
class SIRC(FailurePredictor):
    """Softmax information retaining combination of a confidence S1 and a typicality S2.

    u = log(S1_max - S1) + log(1 + exp(-b (S2 - a)))

    S1 is computed from the posterior, and S1_max is the largest possible S1. S2 measures how
    typical the image is. Over the training rows, a = mean(S2) - 3 sd(S2) and b = 1 / sd(S2), with
    the standard deviation sd at least 1e-6.

    For a typical S2 the second term is nearly constant, so S1 decides. An image with S2 far below
    the threshold a is uncertain for every S1. The paper multiplies two factors. Here u is the
    logarithm of the product, so that nothing underflows. S1_max - S1 is computed without
    cancellation.

    The fit uses no labels, but its rows are the labelled rows, as for most fitted methods.

    Args:
        confidence: S1: "msp" is max_j p_j, "entropy" is -H(p), "doctor" is sum_j p_j^2.
        typicality: S2: "norm1" is ||z_v||_1, with z_v the image embedding. "residual" is minus the
            norm of z_v's part outside the principal subspace. In this subspace the training
            embeddings' second moment (not centred) is largest.
        components: Dimension of the principal subspace. None: half of min(D, number of rows).

    Source: Xia and Bouganis, ACCV 2022. In the paper S2 is computed from the features before the
    classifier. Here S2 is computed from the embedding z_v. The 2-norm of z_v is 1, so the 1-norm
    measures how evenly z_v spreads over the coordinates. The published code differs in two points.
    First, the published code takes 512 components, so there is no residual if D <= 512. Second, the
    published code shifts the features by an origin computed from the classifier's bias, but a VLM
    has no such bias.

    Examples:
        >>> import vilu
        >>> text = [[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]
        >>> image = [[0.5, 0.5, 0.5, 0.5], [0.1, 0.7, 0.5, 0.5]]  # 1-norms 2.0 and 1.8
        >>> train = vilu.Embeddings(image, text, target=[0, 1], logit_scale=10.0)
        >>> new_image = [[0.7, 0.1, 0.5, 0.5], [0.6, 0.0, 0.8, 0.0]]  # 1-norms 1.8 and 1.4
        >>> new = vilu.Embeddings(new_image, text, logit_scale=10.0)  # both have the same S1
        >>> vilu.PREDICTORS["sirc"]().fit(train).predict_uncertainty(new).round(2)
        array([-5.88, -3.88])
    """

    name: ClassVar[str] = "sirc"
    summary: ClassVar[str] = (
        "zero-shot confidence, overruled where the image is untypical (SIRC, ACCV 2022)"
    )
    reference: ClassVar[str] = "Xia and Bouganis, ACCV 2022"
    looks_at: ClassVar[frozenset[str]] = frozenset({"logits", "image"})
    cost: ClassVar[str] = (
        "fit: two passes over the images; score: as mcm, with residual D^2 / 2 more"
    )
    # name, type (f float32, d float64, i int64, ? bool) and sizes for each learned tensor
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
        typicality_by_batch = []
        for batch in train.batches(SCORING_BATCH):
            typicality_of_batch = self._typicality(batch.to(self.device_), learned)
            typicality_by_batch.append(typicality_of_batch.cpu())
        typicality = torch.cat(typicality_by_batch)
        spread = typicality.std(correction=0)
        deviation = spread.clamp(min=MIN_DEVIATION)
        learned["shift"] = typicality.mean() - 3 * deviation
        learned["slope"] = 1 / deviation
        return Learnt(learned)

    def _complement(self, train: Rows, n_rows: int) -> Tensor:
        """Find orthonormal directions (D, D - components) with the images' least second moments."""
        dim = train.source.space.embed_dim
        components = self.components
        if components is None:
            components = max(min(dim, n_rows) // 2, 1)
        if components >= dim:
            raise UsageError(
                f"components must be less than the embedding width {dim}. Got {components} instead."
            )
        moment = torch.zeros(dim, dim, dtype=torch.float64)
        for batch in train.batches(SCORING_BATCH):
            image = float64(batch.to(self.device_).image)
            moment = moment.to(image.device) + image.T @ image
        eigenvectors: Tensor = torch.linalg.eigh(moment).eigenvectors
        n_outside = dim - components
        complement = eigenvectors[:, :n_outside].cpu()  # ``eigh`` sorts by ascending moment
        return complement.clone()

    def tensor_names(self) -> tuple[str, ...]:
        """Return the fitted tensors' names. ``complement`` exists only for "residual"."""
        if self.typicality == "residual":
            return self.tensors
        return self.tensors[:-1]  # ``complement`` is the last name in ``_forms``

    def _typicality(self, batch: Batch, learned: dict[str, Tensor]) -> Tensor:
        """Compute the images' S2 (B,), float64. For "residual", ``learned`` has the complement."""
        image = float64(batch.image)
        if self.typicality == "norm1":
            return image.abs().sum(dim=-1)
        outside_subspace = image @ learned["complement"].to(image.device)
        norm: Tensor = torch.linalg.vector_norm(outside_subspace, dim=-1)
        return -norm

    graph = own_graph  # the score can be exported to ONNX

    def _score(self, batch: Batch) -> Tensor:
        log_p = log_posterior(batch)
        compute_log_doubt = LOG_DOUBT_FUNCTIONS[self.confidence]
        log_doubt = compute_log_doubt(log_p)
        shift = self.tensor("shift", log_doubt.device)  # a
        slope = self.tensor("slope", log_doubt.device)  # b
        untypicality = slope * (shift - self._typicality(batch, self.learned_))
        zero = torch.zeros_like(untypicality)
        # log(1 + exp(x)) = log(exp(x) + exp(0))
        return log_doubt + torch.logaddexp(untypicality, zero)


def log_rest(log_p: Tensor) -> Tensor:
    """Compute log(1 - max_j p_j) (B,), as log-sum-exp over all but the largest log p_j."""
    largest = log_p.argmax(dim=-1, keepdim=True)
    log_p_of_rest = log_p.scatter(1, largest, -torch.inf)
    return torch.logsumexp(log_p_of_rest, dim=-1)


def log_entropy(log_p: Tensor) -> Tensor:
    """Compute log H(p) (B,), the logarithm of the entropy."""
    log_terms = log_p + torch.log(-log_p)  # log(-p_j log p_j)
    return torch.logsumexp(log_terms, dim=-1)


def log_gini(log_p: Tensor) -> Tensor:
    """Compute the logarithm (B,) of the Gini impurity sum_j p_j (1 - p_j)."""
    log_terms = log_p + torch.log(-torch.expm1(log_p))  # log(p_j (1 - p_j))
    return torch.logsumexp(log_terms, dim=-1)


LOG_DOUBT_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "msp": log_rest,
    "entropy": log_entropy,
    "doctor": log_gini,
}
"""Functions that compute log(S1_max - S1) (B,) from log p (B, K). The keys are names of S1."""
