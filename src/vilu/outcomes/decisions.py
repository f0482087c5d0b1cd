"""Names of decisions, and of reasons why an answer is not accepted."""

from __future__ import annotations

ACCEPT = "accept"
REVIEW = "review"
"""Decision about an answer that is not accepted: a person or another model should review it."""

ABOVE = "above_threshold"
"""Reason of an answer that is not accepted: its uncertainty is above the threshold."""

OUTSIDE_REASON = "outside"
"""The same, if the picture is more probably out of distribution than answered wrongly."""
