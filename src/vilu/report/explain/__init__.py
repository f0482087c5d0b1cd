"""Explanations for suspicious answers, and groupings of a data set's failures."""
