"""This package's methods by name. A method is imported on first use."""

from __future__ import annotations

from vilu.predictors.contract.catalogue import PREDICTORS

ZERO_SHOT_MODULE = "vilu.predictors.zero_shot"

METHODS = {
    "vilu_plus": "vilu.predictors.plus.vilu_plus:ViLUPlus",
    "vilu_zero": "vilu.predictors.plus.vilu_zero:ViLUZero",
    "vilu": "vilu.predictors.vilu.vilu:ViLU",
    "lvu": "vilu.predictors.vilu.vilu:LVU",
    "mcm": f"{ZERO_SHOT_MODULE}:MCM",
    "entropy": f"{ZERO_SHOT_MODULE}:Entropy",
    "doctor": f"{ZERO_SHOT_MODULE}:Doctor",
    "max_logit": f"{ZERO_SHOT_MODULE}:MaxLogit",
    "margin": f"{ZERO_SHOT_MODULE}:Margin",
    "prob_margin": f"{ZERO_SHOT_MODULE}:ProbMargin",
    "energy": f"{ZERO_SHOT_MODULE}:Energy",
    "gen": f"{ZERO_SHOT_MODULE}:GEN",
    "kl_uniform": f"{ZERO_SHOT_MODULE}:KLUniform",
    "neglabel": "vilu.predictors.plus.ood:NegLabel",
    "mcm_ts": "vilu.predictors.temperature:MCMTS",
    "duo": "vilu.predictors.temperature:Duo",
    "stacking": "vilu.predictors.stacking:Stacking",
    "class_gaussians": "vilu.predictors.bank.class_gaussians:ClassGaussians",
    "linear_probe": "vilu.predictors.bank.linear_probe:LinearProbe",
}
"""Maps a method name to "MODULE:CLASS". Method lists have this order.

``vilu_bench`` adds further methods.
"""

PREDICTORS.add_addresses(METHODS)

__all__ = ["METHODS", "PREDICTORS"]
