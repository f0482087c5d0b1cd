"""The methods of this package; what each of them is stands in its own class."""

from __future__ import annotations

from vilu.predictors.bank.classes import LinearProbe, TrustVLM
from vilu.predictors.bank.delta import DeltaKNN, DeltaKNNMargin, DeltaMDS, DeltaMDSMargin
from vilu.predictors.bank.gaussians import ICPE, ClassGaussians, Mahalanobis, RelativeMahalanobis
from vilu.predictors.bank.neighbours import TRINE, KNNDistance, KNNVote, TrustScore
from vilu.predictors.base import FailurePredictor
from vilu.predictors.bayesvlm import BayesVLM
from vilu.predictors.catalogue import PREDICTORS, add_predictor, find_method
from vilu.predictors.fitted import MCMTS, SIRC, Duo, RelU
from vilu.predictors.heads.networks import LMN, PVU
from vilu.predictors.heads.vilu import LVU, DeepEnsemble, MCDropout, ViLU
from vilu.predictors.heads.vilu_plus import ViLUPlus
from vilu.predictors.heads.vilu_zero import ViLUZero
from vilu.predictors.outside import NegLabel
from vilu.predictors.probvlm import ProbVLM
from vilu.predictors.stacking import Stacking
from vilu.predictors.views import TTA, PromptDisagreement
from vilu.predictors.zero_shot import (
    GEN,
    MCM,
    Doctor,
    Energy,
    Entropy,
    KLUniform,
    Margin,
    MaxLogit,
    ProbMargin,
)

METHODS: tuple[type[FailurePredictor], ...] = (
    ViLUPlus, ViLUZero, ViLU, LVU, MCM, Entropy, Doctor, MaxLogit, Margin, ProbMargin, Energy, GEN, KLUniform,
    NegLabel, MCMTS, Duo, RelU, SIRC, Stacking, PVU, LMN, MCDropout, DeepEnsemble, TTA, PromptDisagreement, KNNDistance,
    KNNVote, TRINE, TrustScore, Mahalanobis, RelativeMahalanobis, ICPE, ClassGaussians, TrustVLM, DeltaKNN,
    DeltaKNNMargin, DeltaMDS, DeltaMDSMargin, LinearProbe, ProbVLM, BayesVLM,
)  # fmt: skip
"""Ours, in the order in which they are listed."""

for _method in METHODS:
    add_predictor(_method)

__all__ = [
    "LVU", "MCM", "PREDICTORS", "Doctor", "Entropy", "FailurePredictor", "Margin", "MaxLogit", "ViLU", "ViLUPlus",
    "find_method",
]  # fmt: skip
"""What others name; every method is in ``PREDICTORS``."""
