"""Failure heads: ViLU and LVU, trained from new weights or from the weights of an earlier fit."""
