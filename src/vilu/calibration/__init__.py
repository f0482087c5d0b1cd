"""Failure probabilities, rules with a guarantee, and monitors for a guarantee."""
