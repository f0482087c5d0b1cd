"""Predictor and embeddings to scores, in memory or part by part."""
