"""Predictors that put a distribution on the embeddings."""
