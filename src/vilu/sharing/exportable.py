"""Which methods have a score that is a graph of image and text, and how it is made."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vilu.errors import DataError, UsageError
from vilu.predictors.base import FailurePredictor
from vilu.predictors.fitted.mcm_ts import MCMTS
from vilu.predictors.fitted.sirc import SIRC
from vilu.predictors.free.doctor import Doctor
from vilu.predictors.free.energy import Energy
from vilu.predictors.free.entropy import Entropy
from vilu.predictors.free.kl_uniform import KLUniform
from vilu.predictors.free.margin import Margin
from vilu.predictors.free.max_logit import MaxLogit
from vilu.predictors.free.mcm import MCM
from vilu.predictors.free.posterior import log_posterior
from vilu.predictors.free.prob_margin import ProbMargin
from vilu.predictors.heads.deep_ensemble import DeepEnsemble
from vilu.predictors.heads.head import HeadPredictor
from vilu.predictors.heads.lmn import LMN
from vilu.predictors.heads.lvu import LVU
from vilu.predictors.heads.pvu import FLOOR, PVU
from vilu.predictors.heads.vilu import ViLU
from vilu.predictors.heads.vilu_plus import ViLUPlus
from vilu.sharing.graphs import HeadGraph, MeanGraph, NetworkGraph, PlusGraph, Score, ScoreGraph
from vilu.similarity import float64
from vilu.space import EmbeddingSpace
from vilu.types import Batch


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
    **dict.fromkeys((MCM, Doctor, MaxLogit, Margin, ProbMargin, Energy, MCMTS, SIRC), own_score),
    Entropy: lambda _: entropy,
    KLUniform: lambda _: kl_uniform,
    PVU: network_score,
    LMN: network_score,
}
"""How the score of a method becomes a graph.

What is not here needs more than image and text, looks at values, or (GEN) needs an expm1, which ONNX has not.
"""


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
