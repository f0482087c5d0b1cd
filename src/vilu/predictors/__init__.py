"""One method, one file; this is the catalogue."""

from __future__ import annotations

import difflib

from vilu.errors import UsageError
from vilu.predictors.base import FailurePredictor
from vilu.predictors.free.doctor import Doctor
from vilu.predictors.free.entropy import Entropy
from vilu.predictors.free.margin import Margin
from vilu.predictors.free.max_logit import MaxLogit
from vilu.predictors.free.mcm import MCM
from vilu.predictors.heads.lvu import LVU
from vilu.predictors.heads.vilu import ViLU

PREDICTORS: dict[str, type[FailurePredictor]] = {
    "vilu": ViLU,
    "lvu": LVU,
    "mcm": MCM,
    "entropy": Entropy,
    "doctor": Doctor,
    "max_logit": MaxLogit,
    "margin": Margin,
}
"""Every method by its name."""


def find_method(name: str) -> type[FailurePredictor]:
    """The class of a method.

    Raises:
        UsageError: If there is none of this name; the nearest is named.
    """
    if name not in PREDICTORS:
        near = difflib.get_close_matches(name, PREDICTORS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"there is no method {name!r}; known are {', '.join(PREDICTORS)}.{hint}")
    return PREDICTORS[name]


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
    "find_method",
]
