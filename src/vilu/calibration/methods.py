"""Names of the methods for rules and label sets, in Python, on the command line and in messages."""

from __future__ import annotations

from typing import Literal

RowsMethod = Literal["ltt", "crc", "selection"]
"""Methods that need the labels of all calibration rows before the first test."""

Method = Literal[RowsMethod, "anytime"]
"""All methods for a rule. "anytime" allows a test after every label."""

SetMethod = Literal["lac", "aps"]
"""Methods for label sets (``vilu.calibration.label_sets``)."""

ClusterRisk = Literal["majority", "ratio"]
"""Names of the risks for rows in clusters (``vilu.calibration.clusters``)."""
