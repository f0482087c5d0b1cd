"""The methods of this package by name. A method is imported when it is first used."""

from __future__ import annotations

from vilu.predictors.contract.catalogue import PREDICTORS

ZERO_SHOT = "vilu.predictors.zero_shot"

METHODS = {
    "vilu_plus": "vilu.predictors.plus.vilu_plus:ViLUPlus",
    "vilu_zero": "vilu.predictors.plus.vilu_zero:ViLUZero",
    "vilu": "vilu.predictors.vilu.vilu:ViLU",
    "lvu": "vilu.predictors.vilu.vilu:LVU",
    "mcm": f"{ZERO_SHOT}:MCM",
    "entropy": f"{ZERO_SHOT}:Entropy",
    "doctor": f"{ZERO_SHOT}:Doctor",
    "max_logit": f"{ZERO_SHOT}:MaxLogit",
    "margin": f"{ZERO_SHOT}:Margin",
    "prob_margin": f"{ZERO_SHOT}:ProbMargin",
    "energy": f"{ZERO_SHOT}:Energy",
    "gen": f"{ZERO_SHOT}:GEN",
    "kl_uniform": f"{ZERO_SHOT}:KLUniform",
    "neglabel": "vilu.predictors.plus.ood:NegLabel",
    "mcm_ts": "vilu.predictors.temperature:MCMTS",
    "duo": "vilu.predictors.temperature:Duo",
    "stacking": "vilu.predictors.stacking:Stacking",
    "class_gaussians": "vilu.predictors.bank.class_gaussians:ClassGaussians",
    "linear_probe": "vilu.predictors.bank.linear_probe:LinearProbe",
}
"""Module and class of every method, in the order of lists. ``vilu_bench`` adds its own methods."""

PREDICTORS.offer(METHODS)

__all__ = ["METHODS", "PREDICTORS"]
