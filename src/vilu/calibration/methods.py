"""Names of the methods for rules and label sets, in Python, on the command line and in messages."""

from __future__ import annotations

from typing import Literal

RowsMethod = Literal["ltt", "crc", "selection"]
"""Methods that need the labels of all calibration rows before the first test."""

Method = Literal[RowsMethod, "anytime"]
"""All methods for a rule; "anytime" is for labels that arrive one after another."""

SetMethod = Literal["lac", "aps"]
"""Methods for label sets (``vilu.calibration.label_sets``)."""

ClusterRisk = Literal["majority", "ratio"]
"""What a guarantee bounds if rows come in clusters (``vilu.calibration.clusters``)."""
