"""BayesVLM."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from vilu.errors import DataError
from vilu.nn.laplace import Factors, Layer, Posterior, cosine_moments, factors, posterior
from vilu.nn.train import Rows, steps_per_epoch
from vilu.predictors.bayes.answer import failure_log_odds
from vilu.predictors.heads.head import Count, Positive
from vilu.predictors.labelled import TensorPredictor
from vilu.progress import track
from vilu.similarity import float64
from vilu.types import Batch, EmbeddingSource

FARTHEST = 1e-2
"""Largest distance of normalise(P phi) from the embedding; rounding both to float16 makes about 1e-3."""


@dataclass
class BayesVLM(TensorPredictor):
    """Last-layer Laplace: u = 1 - p_t̂, p = softmax of the logits under a posterior over the last linear maps.

    With g = P phi and h = Q psi the last layers of the image and the text encoder, P's posterior precision is
    (sqrt(tau) A + sqrt(lambda) I) ⊗ (sqrt(tau) B + sqrt(lambda) I), A = n^(-1/2) sum_i phi_i phi_i^T (F, F) and
    B = n^(-1/2) sum_i H_i (D, D), H_i the Gauss-Newton curvature in g_i of the contrastive loss; Q's likewise, with
    images and texts in each other's place. lambda, one for each encoder, maximises the Laplace evidence. The variance
    of g is (phi^T A^(-1) phi) times the diagonal of B^(-1), from which follow mean m_j and variance v_j of every logit,
    and p = softmax_j(m_j / sqrt(1 + pi v_j / 8)). What is scored is the VLM's own answer t̂, which need not be the
    largest p_j. The logit bias counts, since the root differs between candidates.

    The n pairs are the training images, each with the text of its class or its caption. Images are matched against
    all K candidates, texts against the images of their chunk; a text of many images counts as often. With captions a
    chunk is a pool. A class without a training image keeps the prior's variance along its own direction.

    Two kinds of fit, told apart in the method's label, and data to score must carry what the fit used:

    - "bayesvlm (model)": phi, psi, P and Q are the columns ``features``, ``text_features``, ``image_projection`` and
      ``text_projection``. Data whose normalise(P phi) is farther than 1e-2 from the embedding are refused, such as
      features of a second encoder or texts averaged over prompts. A bias of the last layer is a column of P, and a
      feature that is always one.
    - "bayesvlm (embeddings-only)": the last layer counts as the identity on the embeddings, phi = g = z, P = I. This is
      a construction of ours and not the published method.

    Args:
        mode: "model", "embeddings", or "auto": "model" where the training data carry all four columns.
        loss: "infonce" (CLIP) or "siglip", what the VLM was trained with.
        pseudo_count: tau, how many times the pairs count; 10 in the reference.
        chunk: Pairs at a time, hence images that compete for a text.

    Source: Baumann et al., "Post-hoc Probabilistic Vision-Language Models", ICLR 2026. The reference implementation
    leaves the 1/2 before the log-determinants of the evidence out and swaps their Kronecker exponents; here they are as
    derived. There the pairs come from the VLM's own training data; here from the data to fit on.
    """

    name: ClassVar[str] = "bayesvlm"
    summary: ClassVar[str] = "Laplace posterior over the VLM's last layers, as a temperature per candidate (BayesVLM)"
    reference: ClassVar[str] = "Baumann et al., ICLR 2026"
    cost: ClassVar[str] = "fit: one pass, O(N D (K + D)); score: three products with the candidates"
    optional_columns: ClassVar[tuple[str, ...]] = (
        "features",
        "text_features",
        "image_projection",
        "text_projection",
    )
    is_probability: ClassVar[bool] = True
    tensors: ClassVar[tuple[str, ...]] = (
        "image_inputs",
        "image_outputs",
        "image_prior",
        "text_inputs",
        "text_outputs",
        "text_prior",
        "on_features",
    )

    mode: Literal["auto", "model", "embeddings"] = "auto"
    loss: Literal["infonce", "siglip"] = "infonce"
    pseudo_count: Positive = 10.0
    chunk: Count = 4_096

    @property
    def label(self) -> str:
        """The name with the kind of fit, once there is one."""
        if not self.learned_:
            return self.name
        return f"{self.name} (model)" if self._on_features else f"{self.name} (embeddings-only)"

    def columns_to_fit(self, train: EmbeddingSource) -> tuple[str, ...]:
        """The four columns in mode "model", or in mode "auto" where they are there; else none."""
        there = train.columns.issuperset(self.optional_columns)
        return self.optional_columns if self.mode == "model" or (self.mode == "auto" and there) else ()

    @property
    def columns_to_score(self) -> tuple[str, ...]:
        """What the fit used."""
        return self.optional_columns if self.learned_ and self._on_features else ()

    @property
    def _on_features(self) -> bool:
        return bool(self.learned_["on_features"])

    def _fit_tensors(self, train: Rows, failure: Tensor) -> dict[str, Tensor]:  # noqa: ARG002 - pairs are what counts
        sums = functools.reduce(lambda a, b: (a[0] + b[0], a[1] + b[1]), self._factors(train))
        tensors = {"on_features": torch.tensor(bool(train.columns))}
        for side, found in zip(("image", "text"), sums, strict=True):
            layer = train.source.column(f"{side}_projection", train.index[:1]) if train.columns else None
            squared_norm = train.source.space.embed_dim if layer is None else float(layer.double().square().sum())
            learned, prior = posterior(found, squared_norm, self.pseudo_count)
            tensors |= {f"{side}_inputs": learned.inputs.cpu(), f"{side}_outputs": learned.outputs.cpu()}
            tensors[f"{side}_prior"] = torch.tensor(prior, dtype=torch.float64)
        return tensors

    def _factors(self, train: Rows) -> Iterator[tuple[Factors, Factors]]:
        """What every chunk of pairs adds to the factors of the image and the text layer."""
        # Labelled rows often come class by class, and a text needs images of all classes to compete for it.
        generator = None if train.source.pool_size else torch.Generator().manual_seed(self.seed)
        with track("fit", steps_per_epoch(train, self.chunk), "chunks") as task:
            for batch in train.steps(self.chunk, generator):
                layers = last_layers(batch.to(self.device_), on_features=bool(train.columns))
                (phi, g), (psi, h) = ((float64(inputs), float64(outputs)) for inputs, outputs in layers)
                image = Layer(phi, g, g.new_ones(len(g)))
                text = Layer(psi, h, torch.bincount(batch.target, minlength=len(h)).to(h))
                logit = (batch.logit_scale, batch.logit_bias)
                yield (
                    factors(image, text.directions, *logit, loss=self.loss),
                    factors(text, image.directions, *logit, loss=self.loss),
                )
                task.advance(1)

    def _notes(self) -> dict[str, object]:
        priors = {side: float(self.learned_[f"{side}_prior"]) for side in ("image", "text")}
        return {"label": self.label, "prior_precision": priors}

    def _uncertainty(self, batch: Batch) -> Tensor:
        (phi, g), (psi, h) = last_layers(batch, on_features=self._on_features)
        image, text = (
            Posterior(self.learned_[f"{side}_inputs"].to(g), self.learned_[f"{side}_outputs"].to(g))
            for side in ("image", "text")
        )
        mean, variance = cosine_moments(g, image.variance(phi), h, text.variance(psi))
        logits = probit(batch.logit_scale * mean + batch.logit_bias, batch.logit_scale**2 * variance)
        return torch.sigmoid(failure_log_odds(logits, batch))


def last_layers(batch: Batch, *, on_features: bool) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Inputs and outputs, (B, F) and (B, D), of the last layer of the image encoder, and (K, F), (K, D) of the text's.

    Raises:
        DataError: If the columns do not give the embeddings.
    """
    if not on_features:
        return (batch.image, batch.image), (batch.text, batch.text)
    return (
        last_layer(batch, "features", "image_projection", batch.image),
        last_layer(batch, "text_features", "text_projection", batch.text),
    )


def last_layer(batch: Batch, features: str, projection: str, embedding: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs phi and outputs P phi of one encoder's last layer."""
    phi, layer = batch.columns[features], batch.columns[projection]
    if layer.shape != (embedding.shape[1], phi.shape[1]):
        raise DataError(
            f"the column {projection!r} must map {features!r} to the embeddings, with shape "
            f"{(embedding.shape[1], phi.shape[1])}. Got {tuple(layer.shape)} instead. Make both with "
            "`vilu embed --features`."
        )
    g = phi @ layer.T
    distance = float((functional.normalize(g, dim=-1) - embedding).norm(dim=-1).max())
    if distance > FARTHEST:
        raise DataError(
            f"{features!r} times {projection!r} must be the embeddings, up to {FARTHEST} after normalisation. An "
            f"entry is {distance:.2g} away: are these the features of another encoder, or texts averaged over prompts? "
            "Make the columns with `vilu embed --features`, or set mode=embeddings."
        )
    return phi, g


def probit(mean: Tensor, variance: Tensor) -> Tensor:
    """Logits whose softmax approximates the expected softmax of Gaussian logits: mean / sqrt(1 + pi variance / 8)."""
    return mean / (1 + math.pi / 8 * variance).sqrt()
