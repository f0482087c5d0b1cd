"""BayesVLM: a Laplace approximation to the weight posterior of a VLM's last linear layers."""

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

BLOCK_ROWS = 1_024  # number of rows processed together, so that their logits fit in memory


def softmax_weights(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Compute a and b (M, K) for InfoNCE. Both are the softmax p of the logits (M, K).

    In each row of logits, the loss has the curvature diag(a) - b b^T, here diag(p) - p p^T.
    """
    p = logits.softmax(dim=-1)
    return p, p


def sigmoid_weights(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Compute a and b (M, K) for SigLIP: a = p (1 - p) and b = 0, with p the logits' sigmoid.

    In each row of logits, the loss has the curvature diag(a) - b b^T. For SigLIP the curvature is
    diagonal, because the loss is a sum over single logits.
    """
    p = logits.sigmoid()
    return p * (1 - p), torch.zeros_like(p)


CURVATURE_WEIGHTS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "infonce": softmax_weights,
    "siglip": sigmoid_weights,
}
"""Functions that compute a and b from logits (M, K), by name of the contrastive loss."""


@dataclass(frozen=True)
class Layer:
    """Inputs and outputs of an encoder's last layer at M rows."""

    inputs: Tensor  # (M, F) phi
    outputs: Tensor  # (M, D) g = P phi, not normalised
    count: Tensor  # (M,) number of image-text pairs that contain the row

    @property
    def directions(self) -> Tensor:
        """Unit vectors g / ‖g‖ (M, D)."""
        return functional.normalize(self.outputs, dim=-1)


@dataclass(frozen=True)
class CurvatureFactors:
    """Two factors whose Kronecker product approximates a last layer's curvature over n pairs.

    The factors are sums, not yet divided by sqrt(n).
    """

    inputs: Tensor  # (F, F) sum of phi phi^T
    outputs: Tensor  # (D, D) sum of the loss's Gauss-Newton curvatures in g
    n: int  # number of pairs

    def __add__(self, other: CurvatureFactors) -> CurvatureFactors:
        return CurvatureFactors(
            self.inputs + other.inputs, self.outputs + other.outputs, self.n + other.n
        )


def curvature_factors(
    layer: Layer,
    candidates: Tensor,
    scale: float,
    bias: float,
    loss: str,
    block_rows: int = BLOCK_ROWS,
) -> CurvatureFactors:
    """Compute a layer's curvature factors. The loss matches each row with all K ``candidates``.

    A row has the layer output g and the unit vector u = g / ‖g‖. The candidates (K, D) are unit
    vectors c_j. The logits are scale * cosine + bias, and the loss gives a and b
    (``CURVATURE_WEIGHTS``). Then a row's curvature in g is

        scale² J (sum_j a_j c_j c_j^T - m m^T) J,  J = (I - u u^T) / ‖g‖,  m = sum_j b_j c_j.
    """
    dim = candidates.shape[1]
    outputs = candidates.new_zeros(dim, dim)
    output_norm = layer.outputs.norm(dim=-1)
    # scale² / ‖g‖², once for every pair that contains the row
    weights = layer.count * (scale / output_norm).square()
    unit_blocks = layer.directions.split(block_rows)
    weight_blocks = weights.split(block_rows)
    for unit, weight in zip(unit_blocks, weight_blocks, strict=True):
        logits = scale * unit @ candidates.T + bias
        a, b = CURVATURE_WEIGHTS[loss](logits)
        outputs += curvature_sum(unit, weight, candidates, diagonal=a, outer=b)
    inputs = (layer.inputs * layer.count[:, None]).T @ layer.inputs
    return CurvatureFactors(inputs, outputs, int(layer.count.sum()))


def curvature_sum(
    unit_rows: Tensor, weight: Tensor, candidates: Tensor, diagonal: Tensor, outer: Tensor
) -> Tensor:
    """Sum the curvatures of M rows, and return the sum (D, D).

    A row has a weight w, a unit vector u and a matrix C = sum_j a_j c_j c_j^T - m m^T, with
    m = sum_j b_j c_j. The row's curvature is w (I - u u^T) C (I - u u^T). This product is expanded,
    so that no array is larger than (M, K), (M, D), (K, D) or (D, D).

    Args:
        unit_rows: (M, D) u.
        weight: (M,) w.
        candidates: (K, D) c.
        diagonal: (M, K) a.
        outer: (M, K) b.
    """
    # w (I - u u^T) C (I - u u^T) = w C - w u (C u)^T - w (C u) u^T + w (u^T C u) u u^T
    weight_column = weight[:, None]
    m = outer @ candidates
    m_times_u = (m * unit_rows).sum(dim=-1, keepdim=True)
    cosines = unit_rows @ candidates.T
    c_times_u = (diagonal * cosines) @ candidates - m * m_times_u
    u_c_u = (c_times_u * unit_rows).sum(dim=-1, keepdim=True)  # u^T C u
    weight_of_candidate = (weight @ diagonal)[:, None]  # sum of w a_j over the rows
    sum_of_diagonals = candidates.T @ (weight_of_candidate * candidates)
    # three sums over the rows
    sum_of_c = sum_of_diagonals - m.T @ (weight_column * m)  # w C
    one_sided = unit_rows.T @ (weight_column * c_times_u)  # w u (C u)^T
    two_sided = unit_rows.T @ (weight_column * u_c_u * unit_rows)  # w (u^T C u) u u^T
    return sum_of_c - one_sided - one_sided.T + two_sided


@dataclass(frozen=True)
class LayerPosterior:
    """Gaussian posterior for a last layer's weights P.

    The precision is a Kronecker product, Ã (F, F) for the inputs times B̃ (D, D) for the outputs.
    The output P phi has the variances (phi^T Ã^(-1) phi) * diagonal of B̃^(-1).
    """

    inputs: Tensor  # (F, F) Ã^(-1)
    outputs: Tensor  # (D,) diagonal of B̃^(-1)

    def variance(self, phi: Tensor) -> Tensor:
        """Compute the variances (M, D) of the layer's outputs at the inputs ``phi`` (M, F)."""
        return (phi @ self.inputs * phi).sum(dim=-1, keepdim=True) * self.outputs


def layer_posterior(
    layer_factors: CurvatureFactors, squared_norm: float, pseudo_count: float
) -> tuple[LayerPosterior, float]:
    """Compute a last layer's posterior, and the prior precision lambda with the largest evidence.

    Args:
        layer_factors: The layer's factors.
        squared_norm: ‖P‖² for the layer's weights P.
        pseudo_count: Weight tau of the data against the prior.
    """
    # each factor is multiplied by this scale, so the product is multiplied by tau / n
    scale = math.sqrt(pseudo_count / layer_factors.n)
    # eigenvalues and eigenvectors of both factors
    a, a_vectors = torch.linalg.eigh(scale * layer_factors.inputs)  # (F,), (F, F)
    b, b_vectors = torch.linalg.eigh(scale * layer_factors.outputs)  # (D,), (D, D)
    a = a.clamp_min(0)  # rounding can make an eigenvalue negative
    b = b.clamp_min(0)
    prior_precision = best_prior_precision(a, b, squared_norm)
    root = math.sqrt(prior_precision)
    inverse_for_inputs = (a_vectors / (a + root)) @ a_vectors.T
    diagonal_for_outputs = b_vectors.square() @ (1 / (b + root))
    return LayerPosterior(inverse_for_inputs, diagonal_for_outputs), prior_precision


def log_evidence(log_prior: float, a: Tensor, b: Tensor, squared_norm: float) -> float:
    """Compute a Laplace approximation's log marginal likelihood for a prior precision lambda.

    ``log_prior`` is log lambda. The posterior precision is Ã ⊗ B̃. Let a (F,) and b (D,) be the
    eigenvalues of the two factors without the prior. Then in the eigenbasis
    Ã = diag(a) + sqrt(lambda) I and B̃ = diag(b) + sqrt(lambda) I.

    Terms that do not depend on lambda are left out. The rest is

        (F D log lambda - lambda ‖P‖² - log det(Ã ⊗ B̃)) / 2,
        log det(Ã ⊗ B̃) = D log det Ã + F log det B̃.
    """
    n_inputs = len(a)  # F
    n_outputs = len(b)  # D
    root = math.exp(log_prior / 2)  # sqrt(lambda)
    log_det = float(n_outputs * (a + root).log().sum() + n_inputs * (b + root).log().sum())
    weight_term = math.exp(log_prior) * squared_norm
    return (n_inputs * n_outputs * log_prior - weight_term - log_det) / 2


def best_prior_precision(a: Tensor, b: Tensor, squared_norm: float) -> float:
    """Find the prior precision lambda that maximises ``log_evidence``.

    The evidence is concave in log lambda, so there is one maximum. The maximum is below the bound
    lambda = F D / ‖P‖². From there on, the sum of the evidence's first two terms falls, and the
    third term falls everywhere. The search is between e^-60 times this bound and the bound.
    """
    from scipy.optimize import minimize_scalar

    def negative_evidence(log_prior: float) -> float:
        return -log_evidence(log_prior, a, b, squared_norm)

    largest_log_prior = math.log(len(a) * len(b) / squared_norm)
    bounds = (largest_log_prior - 60, largest_log_prior)
    optimum = minimize_scalar(
        negative_evidence, bounds=bounds, method="bounded", options={"xatol": 1e-6}
    )
    return math.exp(optimum.x)


def cosine_moments(
    g: Tensor, g_variance: Tensor, h: Tensor, h_variance: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute means (B, K) and variances (B, K) of the cosines between Gaussian vectors.

    The B vectors have the means ``g`` (B, D), and the K vectors the means ``h`` (K, D). The
    covariances are diagonal, with the diagonals ``g_variance`` (B, D) and ``h_variance`` (K, D).

    A cosine is a dot product, divided by the product of two norms. The dot product's mean and
    variance are exact. The product of the norms is replaced by its root mean square.
    """
    # expected squares of the coordinates
    g_squares = g.square() + g_variance
    h_squares = h.square() + h_variance
    # expected squared norms
    g_squared_norm = g_squares.sum(dim=-1)
    h_squared_norm = h_squares.sum(dim=-1)
    squared_norm_product = g_squared_norm[:, None] * h_squared_norm  # (B, K)
    mean = g @ h.T / squared_norm_product.sqrt()
    variance = (g_squares @ h_variance.T + g_variance @ h.square().T) / squared_norm_product
    return mean, variance


MAX_DISTANCE = 1e-2
"""Largest allowed distance between the normalised layer output P phi and the embedding.

The rounding of float16 alone gives about 1e-3.
"""


@dataclass
class BayesVLM(FailurePredictor):
    """Last-layer Laplace: a posterior over the VLM's last linear layers softens the VLM's logits.

    u = 1 - p_t̂, where t̂ is the VLM's answer and p is the softmax of the softened logits.

    The image encoder's last layer is g = P phi, and the text encoder's last layer is h = Q psi.
    There are n training pairs, each an image with its class text or its caption. H_i is the
    Gauss-Newton curvature of the contrastive loss in pair i's g. The posterior precision of P is

        (sqrt(tau) A + sqrt(lambda) I) ⊗ (sqrt(tau) B + sqrt(lambda) I),
        A = n^(-1/2) sum_i phi_i phi_i^T (F, F),  B = n^(-1/2) sum_i H_i (D, D).

    tau weights the data, and the prior precision lambda maximises the Laplace evidence. The
    precision of Q has the same form, with images and texts exchanged, and with its own lambda.

    Let Ã and B̃ be the two factors of the precision. Then the variance of g is phi^T Ã^(-1) phi
    times the diagonal of B̃^(-1). The means and variances of g and h determine every logit's mean
    m_j and variance v_j, and

        p = softmax_j(m_j / sqrt(1 + pi v_j / 8)).

    The score is for the VLM's answer t̂, even if another candidate has a larger p_j. The logit bias
    changes p, because the divisor differs between candidates.

    The pairs are read in chunks. With captions a chunk is a pool. The loss matches an image with
    all K candidates, and a text with the images in its chunk. A text counts once for each of its
    images. A class without training images adds nothing to the factors for Q. If this class's psi
    is orthogonal to psi for all texts with images, the data do not reduce the factor
    psi^T Ã^(-1) psi in the variance of h.

    There are two kinds of fit, and the method's label names the kind. Data to score must have the
    columns that the fit used.

    - "bayesvlm (model)": phi, psi, P and Q are the columns ``features``, ``text_features``,
      ``image_projection`` and ``text_projection``. Data are refused if a normalised P phi is
      farther than 1e-2 from its embedding. This happens, for example, with features from a second
      encoder, or with texts averaged over prompts. If a last layer has a bias, the bias is a
      further column in P, and the feature for this column is always one.
    - "bayesvlm (embeddings-only)": the last layer is taken as the identity on the embeddings z,
      with phi = g = z and P = I. This variant is ours, not the published method.

    Args:
        mode: "model", "embeddings", or "auto". "auto" means "model" if the training data have all
            four columns, else "embeddings".
        loss: The VLM's training loss: "infonce" (CLIP) or "siglip".
        pseudo_count: Weight tau of the pairs against the prior. The reference implementation
            has 10.
        chunk: Number of pairs in a chunk. A text is matched with this number of images.

    Source: Baumann et al., "Post-hoc Probabilistic Vision-Language Models", ICLR 2026. The
    reference implementation omits the factor 1/2 before the log-determinants in the evidence, and
    swaps the factors F and D there. Here the evidence is as derived. In the reference
    implementation the pairs come from the VLM's own training data. Here they come from the data to
    fit on.

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
        >>> method = vilu.PREDICTORS["bayesvlm"](pseudo_count=1.0)
        >>> method.fit(train).predict_uncertainty(new).round(2)  # class 1 has fewer images
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
    # name, type (f float32, d float64, i int64, ? bool) and sizes for each learned tensor
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
        """The method's name. After a fit, the kind of fit follows."""
        if not self.learned_:
            return self.name
        return self._label(uses_features=self._uses_features)

    def _label(self, *, uses_features: bool) -> str:
        return f"{self.name} (model)" if uses_features else f"{self.name} (embeddings-only)"

    def columns_to_fit(self, train: EmbeddingSource) -> tuple[str, ...]:
        """Return all four columns or none.

        The columns are used in mode "model", and in mode "auto" if ``train`` has all four.
        """
        if self.mode == "model":
            return self.optional_columns
        has_columns = train.columns.issuperset(self.optional_columns)
        if self.mode == "auto" and has_columns:
            return self.optional_columns
        return ()

    @property
    def columns_to_score(self) -> tuple[str, ...]:
        """The columns that the fit used."""
        if self.learned_ and self._uses_features:
            return self.optional_columns
        return ()

    @property
    def _uses_features(self) -> bool:
        return bool(self.learned_["on_features"])

    def _learn(
        self,
        train: Rows,
        failure: Tensor,  # noqa: ARG002
        validation: EmbeddingSource | None,  # noqa: ARG002
    ) -> Learnt:
        chunks = self._factors_of_chunks(train)
        image_factors, text_factors = next(chunks)
        for image_chunk, text_chunk in chunks:
            image_factors = image_factors + image_chunk
            text_factors = text_factors + text_chunk
        uses_features = bool(train.columns)
        tensors = {"on_features": torch.tensor(uses_features)}
        prior_precisions = {}
        for encoder, layer_factors in (("image", image_factors), ("text", text_factors)):
            squared_norm = self._squared_norm(encoder, train)
            fitted_posterior, prior_precision = layer_posterior(
                layer_factors, squared_norm, self.pseudo_count
            )
            tensors[f"{encoder}_inputs"] = fitted_posterior.inputs.cpu()
            tensors[f"{encoder}_outputs"] = fitted_posterior.outputs.cpu()
            tensors[f"{encoder}_prior"] = torch.tensor(prior_precision, dtype=torch.float64)
            prior_precisions[encoder] = prior_precision
        label = self._label(uses_features=uses_features)
        return Learnt(tensors, {"label": label, "prior_precision": prior_precisions})

    def _squared_norm(self, encoder: str, train: Rows) -> float:
        """Return the squared norm ‖P‖² of a last layer's weights P."""
        if not train.columns:  # in an embeddings-only fit P is the identity, so ‖P‖² is D
            return train.source.space.embed_dim
        # every row has the same projection, so the first row is enough
        projection = train.source.column(f"{encoder}_projection", train.index[:1])
        squares = projection.double().square()
        return float(squares.sum())

    def _factors_of_chunks(
        self, train: Rows
    ) -> Iterator[tuple[CurvatureFactors, CurvatureFactors]]:
        """Yield the image layer's and the text layer's factors from every chunk of pairs."""
        # Labelled rows are often sorted by class. They are shuffled, because a text must be matched
        # with images from all classes. Rows with captions are not shuffled: they stay in pools.
        generator = None
        if not train.source.pool_size:
            generator = torch.Generator().manual_seed(self.seed)
        n_chunks = steps_per_epoch(train, self.chunk)
        with track("fit", n_chunks, "chunks") as task:
            for batch in train.steps(self.chunk, generator):
                yield self._chunk_factors(batch, uses_features=bool(train.columns))
                task.advance(1)

    def _chunk_factors(
        self, batch: Batch, *, uses_features: bool
    ) -> tuple[CurvatureFactors, CurvatureFactors]:
        """Compute the image layer's and the text layer's factors from one chunk of pairs."""
        (phi, g), (psi, h) = run_last_layers(batch.to(self.device_), uses_features=uses_features)
        g = float64(g)
        h = float64(h)
        phi = float64(phi)
        psi = float64(psi)
        one_pair_per_image = g.new_ones(len(g))
        image_layer = Layer(phi, g, one_pair_per_image)
        pairs_per_text = torch.bincount(batch.target, minlength=len(h))
        text_layer = Layer(psi, h, pairs_per_text.to(h))
        images = image_layer.directions
        texts = text_layer.directions
        scale = batch.logit_scale
        bias = batch.logit_bias
        image_factors = curvature_factors(image_layer, texts, scale, bias, self.loss)
        text_factors = curvature_factors(text_layer, images, scale, bias, self.loss)
        return image_factors, text_factors

    def _posterior(self, encoder: str, like_tensor: Tensor) -> LayerPosterior:
        """Return a last layer's posterior, with the device and the dtype of ``like_tensor``."""
        inputs = self.learned_[f"{encoder}_inputs"].to(like_tensor)
        outputs = self.learned_[f"{encoder}_outputs"].to(like_tensor)
        return LayerPosterior(inputs, outputs)

    def _score(self, batch: Batch) -> Tensor:
        (phi, g), (psi, h) = run_last_layers(batch, uses_features=self._uses_features)
        image_posterior = self._posterior("image", g)
        g_variance = image_posterior.variance(phi)
        text_posterior = self._posterior("text", g)
        h_variance = text_posterior.variance(psi)
        cosine_mean, cosine_variance = cosine_moments(g, g_variance, h, h_variance)
        scale = batch.logit_scale
        logit_mean = scale * cosine_mean + batch.logit_bias
        logit_variance = scale**2 * cosine_variance
        # the softmax of the softened logits approximates the expected softmax of Gaussian logits
        softened_logits = logit_mean / (1 + math.pi / 8 * logit_variance).sqrt()
        log_odds = failure_log_odds(softened_logits, batch)
        return torch.sigmoid(log_odds)


def run_last_layers(
    batch: Batch, *, uses_features: bool
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Compute the inputs and outputs of both encoders' last layers.

    Returns:
        (phi (B, F), g (B, D)) for the image encoder, (psi (K, F), h (K, D)) for the text encoder.
    """
    if not uses_features:  # the last layer is the identity on the embeddings
        return (batch.image, batch.image), (batch.text, batch.text)
    return (
        run_last_layer(batch, "features", "image_projection", batch.image),
        run_last_layer(batch, "text_features", "text_projection", batch.text),
    )


def run_last_layer(
    batch: Batch, features: str, projection: str, embedding: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the inputs phi and outputs P phi of one encoder's last layer.

    Args:
        batch: Rows with the two columns below.
        features: Name of the column with phi.
        projection: Name of the column with the layer's weights P.
        embedding: The encoder's embeddings. The normalised outputs must equal these embeddings.

    Raises:
        DataError: If P has a wrong shape, or if the outputs do not give the embeddings.
    """
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
    distance = _largest_distance(g, embedding)
    if distance > MAX_DISTANCE:
        raise DataError(
            f"{features!r} times {projection!r} must be the embeddings, "
            f"up to {MAX_DISTANCE} after normalisation. "
            f"An entry is {distance:.2g} away: are these the features of another encoder, "
            "or texts averaged over prompts? "
            "Make the columns with `vilu embed --features`, "
            "or leave them out (bayesvlm: mode=embeddings, icpe: features=false)."
        )
    return phi, g


def _largest_distance(g: Tensor, embedding: Tensor) -> float:
    """Compute the largest distance between a normalised output P phi and the row's embedding.

    ``g`` are the outputs, (B, D) or (K, D), not normalised.
    """
    difference = functional.normalize(g, dim=-1) - embedding
    distance = difference.norm(dim=-1)
    return float(distance.max())
