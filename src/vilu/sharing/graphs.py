"""Scores as one graph of image and text for any numbers of both: what torch can export.

A score is the predictor's own code on a ``GraphBatch`` wherever that has no branch on the data or on a size; the few
that have one are written again here, and every export is compared with the predictor (``vilu.sharing.onnx``).

Shapes: N images, K candidate texts, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from vilu.errors import DataError, UsageError
from vilu.nn.attention import CrossAttention
from vilu.nn.experts import Experts
from vilu.nn.heads import FailureHead
from vilu.nn.supervised import FEATURES
from vilu.predictors.base import FailurePredictor
from vilu.predictors.bayes.answer import failure_log_odds
from vilu.predictors.fitted.mcm_ts import MCMTS
from vilu.predictors.fitted.sirc import SIRC
from vilu.predictors.free.doctor import Doctor
from vilu.predictors.free.energy import Energy
from vilu.predictors.free.entropy import Entropy
from vilu.predictors.free.gen import GEN
from vilu.predictors.free.kl_uniform import KLUniform
from vilu.predictors.free.margin import Margin
from vilu.predictors.free.max_logit import MaxLogit
from vilu.predictors.free.mcm import MCM
from vilu.predictors.free.posterior import float64, log_posterior
from vilu.predictors.free.prob_margin import ProbMargin
from vilu.predictors.heads.deep_ensemble import DeepEnsemble
from vilu.predictors.heads.head import HeadPredictor
from vilu.predictors.heads.lmn import LMN
from vilu.predictors.heads.lvu import LVU
from vilu.predictors.heads.pvu import FLOOR, PVU
from vilu.predictors.heads.vilu import ViLU
from vilu.predictors.heads.vilu_plus import ViLUPlus
from vilu.similarity import ZeroShot, of_logits
from vilu.space import EmbeddingSpace
from vilu.types import UNKNOWN, Batch

Score = Callable[[Batch], Tensor]


class GraphBatch(Batch):
    """A batch whose properties are made without a look at values or sizes; all (N, K) logits are there at once."""

    @cached_property
    def logits(self) -> Tensor:
        """(N, K) float32."""
        return (self.image @ self.text.T) * self.logit_scale + self.logit_bias

    @cached_property
    def zero_shot(self) -> ZeroShot:
        """From the logits."""
        return of_logits(self.logits, self.first_equal)

    @cached_property
    def first_equal(self) -> Tensor:
        """(K,) as ``vilu.similarity.first_equal``."""
        _, same = torch.unique(self.text, dim=0, return_inverse=True)
        places = positions(self.text)
        nowhere = torch.full_like(places, self.text.shape[0])
        return nowhere.scatter_reduce(0, same, places, "amin")[same]

    def alike(self, answer: Tensor) -> Tensor:
        """(N, K); all candidates are different answers."""
        return positions(self.text) == answer[:, None]


def positions(rows: Tensor) -> Tensor:
    """0 ... len - 1, of a length that stays open."""
    return torch.arange(rows.shape[0], device=rows.device)


class ScoreGraph(nn.Module):
    """Image and text, and features where the score looks at them, to uncertainty and zero-shot answer.

    Args:
        score: Of a batch.
        space: Its logit scale and bias become constants.
    """

    def __init__(self, score: Score, space: EmbeddingSpace) -> None:
        super().__init__()
        self.score, self.space = score, space

    def forward(self, image: Tensor, text: Tensor, features: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(N,) float64 and (N,) int64."""
        rows = positions(image)
        batch = GraphBatch(
            image=image,
            text=text,
            target=torch.full_like(rows, UNKNOWN),
            index=rows,
            logit_scale=self.space.logit_scale,
            logit_bias=self.space.logit_bias,
            columns={} if features is None else {FEATURES: features},
        )
        return self.score(batch).double(), batch.prediction


class HeadGraph(nn.Module):
    """sigmoid of a ``FailureHead`` whose attention is multiplied out, in one order whatever N and K.

    scale (image W_Q') (text W_K')' is image Q text' with Q (D, D), and what follows the average of the texts is one
    matrix V (H, D); both products are made in float64.
    """

    def __init__(self, head: FailureHead, logit_scale: float) -> None:
        super().__init__()
        self.first, self.first_bias, self.rest = head.first, head.first_bias, head.rest
        if head.attention is not None:
            query, value = multiplied_out(head.attention, head.first["attended"], logit_scale)
            self.query, self.value = nn.Buffer(query), nn.Buffer(value)

    def forward(self, batch: Batch) -> Tensor:
        """(N,) float64."""
        hidden = batch.image @ self.first["image"].T + self.first_bias
        if "attended" in self.first:
            weights = torch.softmax(batch.image @ self.query @ batch.text.T, dim=-1)
            hidden = hidden + weights @ batch.text @ self.value.T
        if "caption" in self.first:
            hidden = hidden + batch.text[batch.prediction] @ self.first["caption"].T
        if "mcm" in self.first:
            hidden = hidden + batch.zero_shot.max_probability[:, None] * self.first["mcm"].T
        return torch.sigmoid(float64(self.rest(hidden).squeeze(-1)))


def multiplied_out(attention: CrossAttention, after: Tensor, logit_scale: float) -> tuple[Tensor, Tensor]:
    """Q (D, D) and V (H, D) of ``HeadGraph``."""
    query, key, scale = attention.bilinear(logit_scale)
    joint, value = scale * (query.double().T @ key.double()), after.double() @ attention.value.double()
    return joint.detach().float(), value.detach().float()


class MeanGraph(nn.Module):
    """Mean over the members of an ensemble."""

    def __init__(self, members: Iterable[HeadGraph]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, batch: Batch) -> Tensor:
        """(N,) float64."""
        return torch.stack([member(batch) for member in self.members]).mean(dim=0)


class PlusGraph(nn.Module):
    """``ViLUPlus``; whether all candidates are training classes is a number of the graph, not a branch.

    Every expert is computed; where a candidate is foreign, the companions have no weight in the pool.
    """

    def __init__(self, experts: Experts, pool: Tensor) -> None:
        super().__init__()
        self.experts = experts
        self.pool, self.alone = nn.Buffer(pool), nn.Buffer(torch.eye(len(pool), dtype=pool.dtype)[0])

    def forward(self, batch: Batch) -> Tensor:
        """(N,) float64."""
        attention, companions = self.experts.attention, self.experts.companions.values()
        weights: Tensor = self.alone
        match = attention.match(batch.text) if len(attention.classes) else None
        logits = [attention(batch, match)]
        if match is not None and len(companions):
            offset = attention.offset(batch)
            logits += [offset + companion(batch)[:, match.row] for companion in companions]
            weights = torch.where(match.known.all(), self.pool, self.alone)
        log_p = float64(torch.stack(logits, dim=1)).log_softmax(dim=-1)
        return torch.sigmoid(failure_log_odds(torch.einsum("m,bmk->bk", weights, log_p), batch))


def head_score(predictor: HeadPredictor) -> Score:
    """The head, or the constant of a degenerate fit."""
    if predictor.constant_ is not None:
        return partial(constant_score, predictor.constant_)
    return head_graph(predictor, predictor.space_)


def head_graph(predictor: HeadPredictor, space: EmbeddingSpace | None) -> HeadGraph:
    """Of a predictor that holds a head.

    Raises:
        DataError: If it holds none.
    """
    if predictor.head_ is None or space is None:
        raise DataError(f"this {predictor.name} holds neither a head nor a constant; its file is damaged.")
    return HeadGraph(predictor.head_, space.logit_scale)


def constant_score(constant: float, batch: Batch) -> Tensor:
    """(N,) the same number for every row."""
    return torch.full_like(batch.image[:, 0], constant, dtype=torch.float64)


def ensemble_score(predictor: DeepEnsemble) -> Score:
    """The members, or the constant of a degenerate fit."""
    if predictor.constant_ is not None:
        return partial(constant_score, predictor.constant_)
    return MeanGraph(head_graph(member, predictor.space_) for member in predictor.members_.values())


def plus_score(predictor: ViLUPlus) -> Score:
    """The experts and their pool.

    Raises:
        DataError: If it holds none.
    """
    if predictor.experts_ is None or predictor.pool_ is None:
        raise DataError(f"this {predictor.name} holds no experts; its file is damaged.")
    return PlusGraph(predictor.experts_, predictor.pool_)


def entropy(batch: Batch) -> Tensor:
    """As ``Entropy``."""
    log_p = log_posterior(batch)
    return -(log_p.exp() * log_p).sum(dim=-1) / log_count(log_p)


def kl_uniform(batch: Batch) -> Tensor:
    """As ``KLUniform``."""
    log_p = log_posterior(batch)
    return log_p.mean(dim=-1) + log_count(log_p)


def log_count(rows: Tensor) -> Tensor:
    """Log K of rows (N, K), K staying open."""
    return torch.ones_like(rows[0]).sum().log()


class NetworkGraph(nn.Module):
    """The network of a ``NetworkPredictor``, and what makes a score of its output."""

    def __init__(self, network: nn.Module, score: Callable[[Batch, Tensor], Tensor]) -> None:
        super().__init__()
        self.network, self.score = network, score

    def forward(self, batch: Batch) -> Tensor:
        """(N,) float64."""
        return self.score(batch, self.network(batch))


def network_score(predictor: PVU | LMN) -> Score:
    """The network.

    Raises:
        DataError: If it holds none.
    """
    if predictor.network_ is None:
        raise DataError(f"this {predictor.name} holds no network; its file is damaged.")
    return NetworkGraph(predictor.network_, softplus if isinstance(predictor, PVU) else predictor._score)


def softplus(_: Batch, output: Tensor) -> Tensor:
    """As ``PVU``; onnxruntime has none in float64."""
    double = float64(output)
    return torch.logaddexp(double, torch.zeros_like(double)) + FLOOR


def own_score(predictor: FailurePredictor) -> Score:
    """The predictor's own code."""
    return predictor._uncertainty


GRAPHS: dict[type[FailurePredictor], Callable[[Any], Score]] = {
    ViLUPlus: plus_score,
    ViLU: head_score,
    LVU: head_score,
    DeepEnsemble: ensemble_score,
    **dict.fromkeys((MCM, Doctor, MaxLogit, Margin, ProbMargin, Energy, GEN, MCMTS, SIRC), own_score),
    Entropy: lambda _: entropy,
    KLUniform: lambda _: kl_uniform,
    PVU: network_score,
    LMN: network_score,
}
"""How the score of a method becomes a graph; what is not here needs more than image and text, or looks at values."""


def score_graph(predictor: FailurePredictor) -> ScoreGraph:
    """The score of a predictor as a module of image (N, D) and text (K, D), N and K open.

    Raises:
        NotFittedError: If it needs ``fit`` first.
        UsageError: If its method has no such graph, or it was never given an embedding space.
    """
    make = GRAPHS.get(type(predictor))
    if make is None:
        known = ", ".join(sorted(cls.name for cls in GRAPHS))
        raise UsageError(f"{predictor.name} cannot be exported as a graph of image and text. These can: {known}.")
    predictor.require_fitted()
    if predictor.space_ is None:
        raise UsageError(
            f"this {predictor.name} knows no embedding space, so the logit scale of its graph is not known. "
            f"Make it with `vilu fit STORE --method {predictor.name}`."
        )
    return ScoreGraph(make(predictor), predictor.space_).eval()
