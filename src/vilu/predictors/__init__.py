"""One method, one file; this is the catalogue."""

from __future__ import annotations

import difflib

from vilu.errors import UsageError
from vilu.predictors.bank.delta import DeltaKNN, DeltaKNNMargin, DeltaMDS, DeltaMDSMargin
from vilu.predictors.bank.icpe import ICPE
from vilu.predictors.bank.linear_probe import LinearProbe
from vilu.predictors.bank.mahalanobis import Mahalanobis, RelativeMahalanobis
from vilu.predictors.bank.neighbours import TRINE, KNNDistance, KNNVote, TrustScore, TrustVLM
from vilu.predictors.base import FailurePredictor
from vilu.predictors.bayesvlm import BayesVLM
from vilu.predictors.fitted import MCMTS, SIRC, RelU
from vilu.predictors.heads.networks import LMN, PVU
from vilu.predictors.heads.vilu import LVU, DeepEnsemble, MCDropout, ViLU
from vilu.predictors.heads.vilu_plus import ViLUPlus
from vilu.predictors.probvlm import ProbVLM
from vilu.predictors.stacking import Stacking
from vilu.predictors.views import TTA, PromptDisagreement
from vilu.predictors.zero_shot import GEN, MCM, Doctor, Energy, Entropy, KLUniform, Margin, MaxLogit, ProbMargin

PREDICTORS: dict[str, type[FailurePredictor]] = {
    "vilu_plus": ViLUPlus,
    "vilu": ViLU,
    "lvu": LVU,
    "mcm": MCM,
    "entropy": Entropy,
    "doctor": Doctor,
    "max_logit": MaxLogit,
    "margin": Margin,
    "prob_margin": ProbMargin,
    "energy": Energy,
    "gen": GEN,
    "kl_uniform": KLUniform,
    "mcm_ts": MCMTS,
    "rel_u": RelU,
    "sirc": SIRC,
    "stacking": Stacking,
    "pvu": PVU,
    "lmn": LMN,
    "mc_dropout": MCDropout,
    "deep_ensemble": DeepEnsemble,
    "tta": TTA,
    "prompt_disagreement": PromptDisagreement,
    "knn_distance": KNNDistance,
    "knn_vote": KNNVote,
    "trine": TRINE,
    "trust_score": TrustScore,
    "mahalanobis": Mahalanobis,
    "relative_mahalanobis": RelativeMahalanobis,
    "icpe": ICPE,
    "trustvlm": TrustVLM,
    "delta_knn": DeltaKNN,
    "delta_knn_margin": DeltaKNNMargin,
    "delta_mds": DeltaMDS,
    "delta_mds_margin": DeltaMDSMargin,
    "linear_probe": LinearProbe,
    "probvlm": ProbVLM,
    "bayesvlm": BayesVLM,
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
    "GEN",
    "ICPE",
    "LMN",
    "LVU",
    "MCM",
    "MCMTS",
    "PREDICTORS",
    "PVU",
    "SIRC",
    "TRINE",
    "TTA",
    "BayesVLM",
    "DeepEnsemble",
    "DeltaKNN",
    "DeltaKNNMargin",
    "DeltaMDS",
    "DeltaMDSMargin",
    "Doctor",
    "Energy",
    "Entropy",
    "FailurePredictor",
    "KLUniform",
    "KNNDistance",
    "KNNVote",
    "LinearProbe",
    "MCDropout",
    "Mahalanobis",
    "Margin",
    "MaxLogit",
    "ProbMargin",
    "ProbVLM",
    "PromptDisagreement",
    "RelU",
    "RelativeMahalanobis",
    "Stacking",
    "TrustScore",
    "TrustVLM",
    "ViLU",
    "ViLUPlus",
    "find_method",
]
