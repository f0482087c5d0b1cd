"""Names of decisions, and names of the reasons why an answer is not accepted."""

from __future__ import annotations

ACCEPT = "accept"
"""Decision about an answer that is accepted."""

REVIEW = "review"
"""Decision about an answer that is not accepted: a person or another model should review it."""

ABOVE = "above_threshold"
"""Reason why an answer is not accepted: its uncertainty is above the threshold."""

NOT_COVERED = "not_covered"
"""Reason why an answer is not accepted: the guarantee is about certain photos, not about this."""

OUTSIDE_REASON = "outside"
"""Reason why an answer is not accepted: probably the picture is of none of the classes.

This is more probable than a picture of one of the classes with a wrong answer.
"""
