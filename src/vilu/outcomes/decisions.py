"""Decision names, and names for the reasons why an answer is not accepted."""

from __future__ import annotations

ACCEPT = "accept"
"""Decision to accept an answer."""

REVIEW = "review"
"""Decision not to accept an answer: a person or another model should review the answer."""

ABOVE = "above_threshold"
"""Reason why an answer is not accepted: the uncertainty is above the threshold."""

NOT_COVERED = "not_covered"
"""Reason why an answer is not accepted: the photo is not among the photos of the guarantee."""

OUTSIDE_REASON = "outside"
"""Reason why an answer is not accepted: the picture is probably outside all classes.

This is more probable than a wrong answer about a picture within the classes.
"""
