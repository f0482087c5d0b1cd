"""What a decision is called, and why an answer is not accepted."""

from __future__ import annotations

ACCEPT = "accept"
REVIEW = "review"
"""What a person or another model looks at, since it is not accepted."""

ABOVE = "above_threshold"
OUTSIDE_REASON = "outside"
"""Why an answer is not accepted: its uncertainty.

And where the picture is rather of none of the classes, that.
"""
