"""Explanations of suspicious answers, and groupings of the failures of a data set."""
