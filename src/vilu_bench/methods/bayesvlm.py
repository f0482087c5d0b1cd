"""BayesVLM: a Laplace approximation of the projections."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from vilu.embeddings.rows import Rows
from vilu.embeddings.similarity import float64
from vilu.embeddings.source import Batch, EmbeddingSource
from vilu.errors import DataError
from vilu.predictors.contract.labelled import failure_log_odds
from vilu.predictors.contract.predictor import FailurePredictor, Learnt
from vilu.predictors.nn.train import steps_per_epoch
from vilu.predictors.vilu.head import Count, Positive
from vilu.progress import track

ROWS = 1_024  # rows against all candidates at a time


def softmax_weights(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Curvature of InfoNCE in the logits (M, K), diag(p) - p p^T for each row, as p twice."""
    p = logits.softmax(dim=-1)
    return p, p


def sigmoid_weights(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Curvature of SigLIP's loss in the logits (M, K), diag(sigma (1 - sigma)) for each row.

    There is no outer product, so the second vector is zero.
    """
    p = logits.sigmoid()
    return p * (1 - p), torch.zeros_like(p)


LOSSES: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "infonce": softmax_weights,
    "siglip": sigmoid_weights,
}
"""Curvature diag(a) - b b^T of a contrastive loss in its logits, as (a, b), by the loss's name."""


@dataclass(frozen=True)
class Layer:
    """The last layer of an encoder at M rows."""

    inputs: Tensor  # (M, F) phi
    outputs: Tensor  # (M, D) g = P phi, of any norm
    count: Tensor  # (M,) how often each row occurs

    @property
    def directions(self) -> Tensor:
        """(M, D) g / ‖g‖."""
        return functional.normalize(self.outputs, dim=-1)


@dataclass(frozen=True)
class Factors:
    """Kronecker factors of the curvature of a last layer over n pairs.

    The root of n has not divided them yet.
    """

    inputs: Tensor  # (F, F) sum of phi phi^T
    outputs: Tensor  # (D, D) sum of the Gauss-Newton curvatures of the loss in g
    n: int  # number of pairs

    def __add__(self, other: Factors) -> Factors:
        return Factors(self.inputs + other.inputs, self.outputs + other.outputs, self.n + other.n)


def factors(
    layer: Layer,
    candidates: Tensor,
    scale: float,
    bias: float,
    loss: str,
    block_rows: int = ROWS,
) -> Factors:
    """The factors that some rows add, each against all of ``candidates`` (K, D).

    The logits are scale * cosine + bias. With unit vectors u = g / ‖g‖ and c_j, the curvature in g
    of one row is scale² J (sum_j a_j c_j c_j^T - m m^T) J, where J = (I - u u^T) / ‖g‖ and m =
    sum_j b_j c_j; a and b come from the loss: a = b = p for InfoNCE, a = sigma (1 - sigma) and b =
    0 for SigLIP.
    """
    dim = candidates.shape[1]
    outputs = candidates.new_zeros(dim, dim)
    weights = layer.count * (scale / layer.outputs.norm(dim=-1)).square()
    directions = layer.directions.split(block_rows)
    for unit, weight in zip(directions, weights.split(block_rows), strict=True):
        logits = scale * unit @ candidates.T + bias
        diagonal, outer = LOSSES[loss](logits)
        outputs += curvature_sum(unit, weight, candidates, diagonal, outer)
    inputs = (layer.inputs * layer.count[:, None]).T @ layer.inputs
    return Factors(inputs, outputs, int(layer.count.sum()))


def curvature_sum(
    unit: Tensor, weight: Tensor, candidates: Tensor, diagonal: Tensor, outer: Tensor
) -> Tensor:
    """(D, D) sum over rows of w (I - u u^T) M (I - u u^T).

    Here M = sum_j a_j c_j c_j^T - m m^T and m = sum_j b_j c_j.

    ``unit`` (M, D) are u, ``weight`` (M,) w, ``candidates`` (K, D) c, ``diagonal`` (M, K) a and
    ``outer`` (M, K) b. The projections are multiplied out, so that nothing is larger than (M, K),
    (M, D) or (D, D).
    """
    # w (I - u u^T) M (I - u u^T) = w M - w u (M u)^T - w (M u) u^T + w (u^T M u) u u^T
    mean = outer @ candidates
    mean_along_unit = (mean * unit).sum(dim=-1, keepdim=True)
    along = (diagonal * (unit @ candidates.T)) @ candidates - mean * mean_along_unit  # M u
    sum_of_diagonals = candidates.T @ ((weight @ diagonal)[:, None] * candidates)
    middle = sum_of_diagonals - mean.T @ (weight[:, None] * mean)
    cross = unit.T @ (weight[:, None] * along)
    along_both = (along * unit).sum(dim=-1)  # u^T M u
    twice = unit.T @ ((weight * along_both)[:, None] * unit)
    return middle - cross - cross.T + twice


@dataclass(frozen=True)
class Posterior:
    """Diagonal of the Gaussian posterior of a last layer: (phi^T inputs phi) * outputs."""

    inputs: Tensor  # (F, F)
    outputs: Tensor  # (D,)

    def variance(self, phi: Tensor) -> Tensor:
        """(M, D) variances of the outputs at inputs (M, F)."""
        return (phi @ self.inputs * phi).sum(dim=-1, keepdim=True) * self.outputs


def posterior(layer: Factors, squared_norm: float, pseudo_count: float) -> tuple[Posterior, float]:
    """Posterior of a last layer of squared norm ‖P‖², and the prior precision that was chosen.

    The evidence chooses the prior precision lambda.
    """
    # of both factors, so that their product weighs ``pseudo_count`` times the data
    scale = math.sqrt(pseudo_count / layer.n)
    a, a_vectors = torch.linalg.eigh(scale * layer.inputs)
    b, b_vectors = torch.linalg.eigh(scale * layer.outputs)
    a = a.clamp_min(0)
    b = b.clamp_min(0)
    prior = best_prior_precision(a, b, squared_norm)
    inputs = (a_vectors / (a + math.sqrt(prior))) @ a_vectors.T
    outputs = b_vectors.square() @ (1 / (b + math.sqrt(prior)))
    return Posterior(inputs, outputs), prior


def log_evidence(log_prior: float, a: Tensor, b: Tensor, squared_norm: float) -> float:
    """Log marginal likelihood of a Laplace approximation.

    Terms that do not depend on the prior precision lambda are left out:

    (F D log lambda - lambda ‖P‖² - log det(Ã ⊗ B̃)) / 2, with Ã = diag(a) + sqrt(lambda) I in the
    eigenbasis, B̃ likewise, and log det(Ã ⊗ B̃) = D log det Ã + F log det B̃; a (F,) and b (D,) are
    eigenvalues of sqrt(tau) A and B.
    """
    root = math.exp(log_prior / 2)
    log_det = float(len(b) * (a + root).log().sum() + len(a) * (b + root).log().sum())
    return (len(a) * len(b) * log_prior - math.exp(log_prior) * squared_norm - log_det) / 2


def best_prior_precision(a: Tensor, b: Tensor, squared_norm: float) -> float:
    """The lambda of the largest ``log_evidence``.

    Its derivative in log lambda falls everywhere, so there is one maximum, and none above F D /
    ‖P‖², where the derivative of the first two terms is zero.
    """
    from scipy.optimize import minimize_scalar

    def loss(log_prior: float) -> float:
        return -log_evidence(log_prior, a, b, squared_norm)

    highest = math.log(len(a) * len(b) / squared_norm)
    best = minimize_scalar(
        loss, bounds=(highest - 60, highest), method="bounded", options={"xatol": 1e-6}
    )
    return math.exp(best.x)


def cosine_moments(
    g: Tensor, g_variance: Tensor, h: Tensor, h_variance: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and variance (B, K) of the cosine of Gaussian vectors.

    The vectors have means (B, D) and (K, D) and diagonal covariances.

    The moments of g · h are exact; the product of the norms counts as the root of its expected
    square.
    """
    g_second = g.square() + g_variance
    h_second = h.square() + h_variance
    squared_norms = g_second.sum(dim=-1)[:, None] * h_second.sum(dim=-1)
    mean = g @ h.T / squared_norms.sqrt()
    variance = (g_second @ h_variance.T + g_variance @ h.square().T) / squared_norms
    return mean, variance


# largest distance of normalise(P phi) from the embedding; rounding both to float16 makes about 1e-3
FARTHEST = 1e-2


@dataclass
class BayesVLM(FailurePredictor):
    """Last-layer Laplace: a posterior over the VLM's last linear maps softens its logits.

    u = 1 - p_t̂, p = the softmax of these logits.

    With g = P phi and h = Q psi the last layers of the image and the text encoder, P's posterior
    precision is (sqrt(tau) A + sqrt(lambda) I) ⊗ (sqrt(tau) B + sqrt(lambda) I), A = n^(-1/2) sum_i
    phi_i phi_i^T (F, F) and B = n^(-1/2) sum_i H_i (D, D), H_i the Gauss-Newton curvature in g_i of
    the contrastive loss; Q's likewise, with images and texts in each other's place. lambda, one for
    each encoder, maximises the Laplace evidence. The variance of g is (phi^T A^(-1) phi) times the
    diagonal of B^(-1), from which follow mean m_j and variance v_j of every logit, and p =
    softmax_j(m_j / sqrt(1 + pi v_j / 8)). What is scored is the VLM's own answer t̂, which need not
    be the largest p_j. The logit bias counts, since the root differs between candidates.

    The n pairs are the training images, each with the text of its class or its caption. Images are
    matched against all K candidates, texts against the images of their chunk; a text of many images
    counts as often. With captions a chunk is a pool. A class without a training image keeps the
    prior's variance along its own direction.

    Two kinds of fit, told apart in the method's label, and data to score must carry what the fit
    used:

    - "bayesvlm (model)": phi, psi, P and Q are the columns ``features``, ``text_features``,
      ``image_projection`` and ``text_projection``. Data whose normalise(P phi) is farther than 1e-2
      from the embedding are refused, such as features of a second encoder or texts averaged over
      prompts. A bias of the last layer is a column of P, and a feature that is always one.
    - "bayesvlm (embeddings-only)": the last layer counts as the identity on the embeddings, phi = g
      = z, P = I. This is a construction of ours and not the published method.

    Args:
        mode: "model", "embeddings", or "auto": "model" where the training data carry all four
            columns.
        loss: "infonce" (CLIP) or "siglip", what the VLM was trained with.
        pseudo_count: tau, how many times the pairs count; 10 in the reference.
        chunk: Pairs at a time, hence images that compete for a text.

    Source: Baumann et al., "Post-hoc Probabilistic Vision-Language Models", ICLR 2026. The
    reference implementation leaves the 1/2 before the log-determinants of the evidence out and
    swaps their Kronecker exponents; here they are as derived. There the pairs come from the VLM's
    own training data; here from the data to fit on.

    Examples:
        >>> import numpy as np, vilu
        >>> # the answer is class 0 up to 45 degrees, the truth up to 63
        >>> angle = np.linspace(0, np.pi / 2, 100)
        >>> image = np.c_[np.cos(angle), np.sin(angle)]
        >>> train = vilu.Embeddings(image, np.eye(2), np.repeat([0, 1], [70, 30]), logit_scale=10.0)
        >>> new = vilu.Embeddings([[0.8, 0.6], [0.6, 0.8]], np.eye(2), logit_scale=10.0)
        >>> vilu.MCM().predict_uncertainty(new).round(2)
        array([0.12, 0.12])
        >>> method = vilu.PREDICTORS["bayesvlm"](pseudo_count=1.0)
        >>> method.fit(train).predict_uncertainty(new).round(2)
        array([0.17, 0.26])
    """

    name: ClassVar[str] = "bayesvlm"
    summary: ClassVar[str] = (
        "Laplace posterior over the VLM's last layers, as a temperature per candidate (BayesVLM)"
    )
    reference: ClassVar[str] = "Baumann et al., ICLR 2026"
    cost: ClassVar[str] = "fit: one pass, O(N D (K + D)); score: three products with the candidates"
    optional_columns: ClassVar[tuple[str, ...]] = (
        "features",
        "text_features",
        "image_projection",
        "text_projection",
    )
    is_probability: ClassVar[bool] = True
    _forms: ClassVar[str] = (
        "image_inputs:dEE image_outputs:dD image_prior:d "
        "text_inputs:dFF text_outputs:dD text_prior:d on_features:?"
    )

    seed: int = 0
    device: str = "auto"
    mode: Literal["auto", "model", "embeddings"] = "auto"
    loss: Literal["infonce", "siglip"] = "infonce"
    pseudo_count: Positive = 10.0
    chunk: Count = 4_096

    @property
    def label(self) -> str:
        """The name, once fitted with the kind of fit."""
        return self._label(self._on_features) if self.learned_ else self.name

    def _label(self, on_features: bool) -> str:
        return f"{self.name} (model)" if on_features else f"{self.name} (embeddings-only)"

    def columns_to_fit(self, train: EmbeddingSource) -> tuple[str, ...]:
        """The four columns in mode "model", or in mode "auto" where they are there; else none."""
        if self.mode == "model":
            return self.optional_columns
        has_columns = train.columns.issuperset(self.optional_columns)
        if self.mode == "auto" and has_columns:
            return self.optional_columns
        return ()

    @property
    def columns_to_score(self) -> tuple[str, ...]:
        """The columns that the fit used."""
        return self.optional_columns if self.learned_ and self._on_features else ()

    @property
    def _on_features(self) -> bool:
        return bool(self.learned_["on_features"])

    def _learn(
        self,
        train: Rows,
        failure: Tensor,  # noqa: ARG002
        validation: EmbeddingSource | None,  # noqa: ARG002
    ) -> Learnt:
        chunks = self._factors(train)
        image, text = next(chunks)
        for more_image, more_text in chunks:
            image = image + more_image
            text = text + more_text
        on_features = bool(train.columns)
        tensors = {"on_features": torch.tensor(on_features)}
        priors = {}
        for side, layer in (("image", image), ("text", text)):
            squared_norm = self._squared_norm(side, train)
            learned, prior = posterior(layer, squared_norm, self.pseudo_count)
            tensors[f"{side}_inputs"] = learned.inputs.cpu()
            tensors[f"{side}_outputs"] = learned.outputs.cpu()
            tensors[f"{side}_prior"] = torch.tensor(prior, dtype=torch.float64)
            priors[side] = prior
        return Learnt(tensors, {"label": self._label(on_features), "prior_precision": priors})

    def _squared_norm(self, side: str, train: Rows) -> float:
        """‖P‖² of a last layer; that of the identity where the embeddings count as its inputs."""
        if not train.columns:
            return train.source.space.embed_dim
        projection = train.source.column(f"{side}_projection", train.index[:1])
        return float(projection.double().square().sum())

    def _factors(self, train: Rows) -> Iterator[tuple[Factors, Factors]]:
        """The factors that every chunk of pairs adds to those of the image and the text layer."""
        # Labelled rows often come class by class, and a text needs images of all classes to compete
        # for it.
        generator = None if train.source.pool_size else torch.Generator().manual_seed(self.seed)
        with track("fit", steps_per_epoch(train, self.chunk), "chunks") as task:
            for batch in train.steps(self.chunk, generator):
                yield self._chunk_factors(batch, on_features=bool(train.columns))
                task.advance(1)

    def _chunk_factors(self, batch: Batch, *, on_features: bool) -> tuple[Factors, Factors]:
        """Factors of the image and the text layer from one chunk of pairs."""
        (phi, g), (psi, h) = last_layers(batch.to(self.device_), on_features=on_features)
        g = float64(g)
        h = float64(h)
        image = Layer(float64(phi), g, g.new_ones(len(g)))
        n_images = torch.bincount(batch.target, minlength=len(h))
        text = Layer(float64(psi), h, n_images.to(h))
        scale = batch.logit_scale
        bias = batch.logit_bias
        return (
            factors(image, text.directions, scale, bias, self.loss),
            factors(text, image.directions, scale, bias, self.loss),
        )

    def _posterior(self, side: str, like: Tensor) -> Posterior:
        """The posterior of a last layer, of the device and the type of a tensor."""
        inputs = self.learned_[f"{side}_inputs"].to(like)
        outputs = self.learned_[f"{side}_outputs"].to(like)
        return Posterior(inputs, outputs)

    def _score(self, batch: Batch) -> Tensor:
        (phi, g), (psi, h) = last_layers(batch, on_features=self._on_features)
        g_variance = self._posterior("image", g).variance(phi)
        h_variance = self._posterior("text", g).variance(psi)
        mean, variance = cosine_moments(g, g_variance, h, h_variance)
        scale = batch.logit_scale
        # their softmax approximates the expected softmax of Gaussian logits
        widened = (1 + math.pi / 8 * (scale**2 * variance)).sqrt()
        logits = (scale * mean + batch.logit_bias) / widened
        return torch.sigmoid(failure_log_odds(logits, batch))


def last_layers(
    batch: Batch, *, on_features: bool
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Inputs (B, F) and outputs (B, D) of the image encoder's last layer, and the text's.

    Those of the text encoder are (K, F) and (K, D).
    """
    if not on_features:
        return (batch.image, batch.image), (batch.text, batch.text)
    return (
        last_layer(batch, "features", "image_projection", batch.image),
        last_layer(batch, "text_features", "text_projection", batch.text),
    )


def last_layer(
    batch: Batch, features: str, projection: str, embedding: Tensor
) -> tuple[Tensor, Tensor]:
    """Inputs phi and outputs P phi of one encoder's last layer."""
    phi = batch.columns[features]
    layer = batch.columns[projection]
    expected_shape = (embedding.shape[1], phi.shape[1])
    if layer.shape != expected_shape:
        raise DataError(
            f"the column {projection!r} must map {features!r} to the embeddings, with shape "
            f"{expected_shape}. Got {tuple(layer.shape)} instead. "
            "Make both with `vilu embed --features`."
        )
    g = phi @ layer.T
    distance = float((functional.normalize(g, dim=-1) - embedding).norm(dim=-1).max())
    if distance > FARTHEST:
        raise DataError(
            f"{features!r} times {projection!r} must be the embeddings, "
            f"up to {FARTHEST} after normalisation. "
            f"An entry is {distance:.2g} away: are these the features of another encoder, "
            "or texts averaged over prompts? "
            "Make the columns with `vilu embed --features`, "
            "or leave them out (bayesvlm: mode=embeddings, icpe: features=false)."
        )
    return phi, g
