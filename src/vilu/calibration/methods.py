"""Names of the methods that make a rule or label sets: of Python, the command line and messages."""

from __future__ import annotations

from typing import Literal

RowsMethod = Literal["ltt", "crc", "selection"]
"""Methods whose calibration rows are all there before anybody looks."""

Method = Literal[RowsMethod, "anytime"]
"""All methods of a rule; "anytime" is for labels one after another."""

SetMethod = Literal["lac", "aps"]
"""Methods of label sets (``vilu.calibration.label_sets``)."""
