"""Predictors that train a small network on failures."""
