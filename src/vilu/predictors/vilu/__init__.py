"""Failure heads: ViLU and LVU, new or begun from another fit."""
