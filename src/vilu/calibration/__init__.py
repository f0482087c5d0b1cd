"""Probabilities of failure, rules with a guarantee, and monitors of a guarantee."""
