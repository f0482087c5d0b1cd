"""The methods of this package; what each of them is stands in its own class."""

from __future__ import annotations

from vilu.predictors.base import FailurePredictor
from vilu.predictors.catalogue import PREDICTORS, add_predictor, find_method
from vilu.predictors.class_gaussians import ClassGaussians
from vilu.predictors.fitted import MCMTS, Duo
from vilu.predictors.heads.vilu import LVU, ViLU
from vilu.predictors.heads.vilu_plus import ViLUPlus
from vilu.predictors.heads.vilu_zero import ViLUZero
from vilu.predictors.linear_probe import LinearProbe
from vilu.predictors.outside import NegLabel
from vilu.predictors.stacking import Stacking
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
    ViLUPlus,
    ViLUZero,
    ViLU,
    LVU,
    MCM,
    Entropy,
    Doctor,
    MaxLogit,
    Margin,
    ProbMargin,
    Energy,
    GEN,
    KLUniform,
    NegLabel,
    MCMTS,
    Duo,
    Stacking,
    ClassGaussians,
    LinearProbe,
)
"""Ours, in the order in which they are listed; those of ``vilu_bench`` come by entry points."""

for _method in METHODS:
    add_predictor(_method)

__all__ = [
    "LVU",
    "MCM",
    "PREDICTORS",
    "Doctor",
    "Entropy",
    "FailurePredictor",
    "Margin",
    "MaxLogit",
    "ViLU",
    "ViLUPlus",
    "find_method",
]
"""What others name; every method is in ``PREDICTORS``."""
