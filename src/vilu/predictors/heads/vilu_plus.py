"""ViLU+: a learned posterior, and a head on how it differs from the zero-shot answer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Annotated, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from vilu.embeddings.similarity import float64
from vilu.embeddings.source import Batch, EmbeddingSource
from vilu.errors import DataError
from vilu.predictors.heads.head import Count, NonNegative, Positive, with_weights
from vilu.predictors.labelled import LabelledPredictor, cross_fitting, failure_log_odds
from vilu.predictors.nn.experts import FEATURES, Adapter, Experts, Inputs, Memory, SupervisedAttention, fit_attention
from vilu.predictors.nn.train import SCORING_BATCH, AdamWConfig, Rows, steps_per_epoch, train_adamw

POOL_SD = 0.2
"""Prior standard deviation of the weights, around the first expert alone."""


def fit_pool(log_p: NDArray[np.float64], target: NDArray[np.int64]) -> NDArray[np.float64]:
    """Weights w >= 0 of a log-linear pool, of largest posterior for the targets under the prior N((1, 0, ...), 0.2^2).

    Args:
        log_p: (N, M, K) log probabilities of M experts.
        target: (N,) true classes.
    """
    from scipy.optimize import minimize

    rows = np.arange(len(target))
    prior = np.eye(log_p.shape[1])[0]

    def objective(weights: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        mixed = np.einsum("m,nmk->nk", weights, log_p)
        log_q = mixed - np.logaddexp.reduce(mixed, axis=1, keepdims=True)
        slope = np.einsum("nk,nmk->m", np.exp(log_q), log_p) - log_p[rows, :, target].sum(axis=0)
        distance = weights - prior
        value = -log_q[rows, target].sum() + (distance**2).sum() / (2 * POOL_SD**2)
        return float(value), slope + distance / POOL_SD**2

    found = minimize(objective, prior, jac=True, method="L-BFGS-B", bounds=[(0, None)] * len(prior))
    weights: NDArray[np.float64] = found.x
    return weights


MEMORY_ROWS = 4_096
"""Up to so many rows are remembered; with more, the network has enough to learn from (docs/methods/vilu_plus.md)."""

FEW_LABELS = 10
"""Per class on average; with fewer, folds lack classes and companions learn nothing that lasts."""

MIN_STEPS, MIN_EPOCHS = 300, 20
POOL, CLASSES, FEATURE_MEAN = "pool", "attention.classes", "attention.inputs.features.mean"
ADAPTER, BANK = "companions.adapter.first.weight", "companions.memory.bank"

Share = Annotated[float, Field(gt=0, lt=1)]


@dataclasses.dataclass
class ViLUPlus(LabelledPredictor):
    """u = P(failure) = 1 - q_t̂, q a log-linear pool of experts on which candidate is true.

    log q_j = sum_m w_m log p_mj - const. The experts: the supervised cross-attention (``SupervisedAttention``, the
    zero-shot logits at a fitted temperature plus a ridge-regularised bilinear form: convex), a small network of the
    image (``Adapter``) and, up to 4,096 rows, attention over the labelled images (``Memory``). They learn from class
    labels, so no failure is needed. w comes from rows that they were not fitted on (cross-fitted, or ``validation``),
    with a prior at the attention alone, which makes q a calibrated probability. With fewer than ten labels a class
    there is the attention alone, and the fewer they are the nearer it stays to the zero-shot posterior. Candidates that
    are not all training classes are scored by the attention alone; captions have no other expert.

    Args:
        features: Look at the column "features" (the image encoder's output before its projection, or a second
            encoder's) beside the embedding where the data carry it; the label of the results says so.
        variance: Prior variance C of the attention's weights.
        sharing: Share rho of it that classes have in common, which is all that unseen candidates benefit from.
        width: Hidden width of the network.
        dropout: Of the network.
        epochs: Passes over the rows in training the network; None: 20, or as many as make 300 steps.
        batch_size: Of the network.
        learning_rate: Of the network (AdamW, cosine).
        weight_decay: Of the network.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps"; not part of what is saved.

    Source: ours; docs/methods/vilu_plus.md has the ablation.
    """

    name: ClassVar[str] = "vilu_plus"
    summary: ClassVar[str] = "supervised cross-attention, network and memory, pooled by likelihood; calibrated"
    reference: ClassVar[str] = "this project, 2026"
    cost: ClassVar[str] = "fit: convex + 300 steps or 20 epochs, cross-fitted; score: 0.8 MFLOP a row"
    optional_columns: ClassVar[tuple[str, ...]] = (FEATURES,)
    is_probability: ClassVar[bool] = True

    features: bool = True
    variance: Positive = 10.0
    sharing: Share = 0.5
    width: Count = 512
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5
    epochs: Count | None = None
    batch_size: Count = 256
    learning_rate: Positive = 2e-3
    weight_decay: NonNegative = 0.2
    device: str = "auto"

    experts_: Experts | None = dataclasses.field(default=None, init=False, repr=False, compare=False)
    pool_: Tensor | None = dataclasses.field(default=None, init=False, repr=False, compare=False)

    @property
    def label(self) -> str:
        """The name, and whether features are an input."""
        return f"{self.name} (features)" if self.columns_to_score else self.name

    def columns_to_fit(self, train: EmbeddingSource) -> tuple[str, ...]:
        """The features, where wanted and there."""
        return self.optional_columns if self.features and train.columns.issuperset(self.optional_columns) else ()

    @property
    def columns_to_score(self) -> tuple[str, ...]:
        """The features, where fitted on them."""
        on_features = self.experts_ is not None and self.experts_.attention.inputs.on_features
        return self.optional_columns if on_features else ()

    def _learn(self, train: Rows, failure: Tensor, validation: EmbeddingSource | None) -> None:
        self.pool_ = torch.ones(1, dtype=torch.float64)
        kinds = self._kinds(train)
        if kinds:
            parts = [
                log_posteriors(self._fit_experts(rows, kinds), held_out, self.device_)
                for rows, held_out in cross_fitting(train, failure, validation, self.seed)
            ]
            log_p, target = (torch.cat(part).numpy() for part in zip(*parts, strict=True))
            self.pool_ = torch.from_numpy(fit_pool(log_p, target))
        self.experts_ = self._fit_experts(train, kinds)

    def _kinds(self, train: Rows) -> tuple[str, ...]:
        """The companions that the training set is large enough, and small enough, for."""
        n = len(train.index)
        if train.source.pool_size is not None or n < FEW_LABELS * train.source.n_candidates:
            return ()
        return ("adapter", "memory") if n <= MEMORY_ROWS else ("adapter",)

    def _fit_experts(self, rows: Rows, kinds: tuple[str, ...]) -> Experts:
        n_classes = 0 if rows.source.pool_size else rows.source.n_candidates
        inputs = Inputs(rows.source.space.embed_dim, feature_dim(rows))
        inputs.fit(rows)
        attention = fit_attention(inputs, rows, n_classes, self.variance, self.sharing, self.device_)
        fits: dict[str, Callable[[SupervisedAttention, Rows], Adapter | Memory]]
        fits = {"adapter": self._fit_adapter, "memory": Memory.of}
        companions = {kind: fits[kind](attention, rows) for kind in kinds}
        return Experts(attention, companions).eval().requires_grad_(requires_grad=False)

    def _fit_adapter(self, attention: SupervisedAttention, rows: Rows) -> Adapter:
        def loss(batch: Batch, residual: Tensor) -> Tensor:
            return functional.cross_entropy(attention.offset(batch) + residual, batch.target)

        epochs = self.epochs or max(MIN_EPOCHS, math.ceil(MIN_STEPS / steps_per_epoch(rows, self.batch_size)))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            adapter = Adapter(attention.inputs, len(attention.classes), self.width, self.dropout)
            config = AdamWConfig(
                epochs, self.batch_size, self.learning_rate, self.weight_decay, self.seed, self.device_
            )
            train_adamw(adapter, loss, rows, config)
        return adapter.eval()

    def _uncertainty(self, batch: Batch) -> Tensor:
        return torch.sigmoid(failure_log_odds(self._pooled(batch), batch))

    def log_posterior(self, batch: Batch) -> Tensor:
        """(B, K) float64, of the pooled experts."""
        return self._pooled(batch).log_softmax(dim=-1)

    def _pooled(self, batch: Batch) -> Tensor:
        """(B, K) weighted log probabilities of the experts."""
        if self.experts_ is None or self.pool_ is None:
            raise DataError(f"this {self.name} holds no experts; its file is damaged.")
        log_p = float64(self.experts_.to(batch.image.device)(batch)).log_softmax(dim=-1)
        weights = self.pool_.to(log_p.device) if log_p.shape[1] > 1 else torch.ones_like(log_p[0, :1, 0])
        return torch.einsum("m,bmk->bk", weights, log_p)

    def _notes(self) -> dict[str, object]:
        return {"pool": None if self.pool_ is None else self.pool_.tolist()}

    def state(self) -> dict[str, Tensor]:
        """Weights of the experts and of the pool."""
        if self.experts_ is None or self.pool_ is None:
            return {}
        return {**{name: t.cpu() for name, t in self.experts_.state_dict().items()}, POOL: self.pool_}

    def restore(self, state: dict[str, Tensor]) -> None:
        """The inverse of ``state``."""
        if not state.keys() >= {CLASSES, FEATURE_MEAN, POOL}:
            raise DataError(f"a {self.name} holds experts and a pool. The file has {', '.join(sorted(state)[:8])}.")
        n_classes, dim = state[CLASSES].shape
        inputs = Inputs(dim, len(state[FEATURE_MEAN]))
        companions: dict[str, Adapter | Memory] = {}
        if ADAPTER in state:
            companions["adapter"] = Adapter(inputs, n_classes, self.width, self.dropout)
        if BANK in state:
            companions["memory"] = Memory(inputs, len(state[BANK]), n_classes)
        experts = Experts(SupervisedAttention(inputs, dim, n_classes, self.sharing), companions)
        self.pool_ = state[POOL]
        weights = {name: tensor for name, tensor in state.items() if name != POOL}
        self.experts_ = with_weights(experts, weights, self.name).requires_grad_(requires_grad=False)


def feature_dim(rows: Rows) -> int:
    """F of the column "features", 0 where it is not looked at."""
    return rows.source.column(FEATURES, rows.index[:1]).shape[1] if FEATURES in rows.columns else 0


def log_posteriors(experts: Experts, rows: Rows, device: torch.device) -> tuple[Tensor, Tensor]:
    """(N, M, K) float64 log probabilities of all experts, and the targets (N,)."""
    log_p, target = [], []
    with torch.no_grad():
        for batch in rows.batches(SCORING_BATCH):
            log_p.append(float64(experts(batch.to(device))).log_softmax(dim=-1).cpu())
            target.append(batch.target)
    return torch.cat(log_p), torch.cat(target)
