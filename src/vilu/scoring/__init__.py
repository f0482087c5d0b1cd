"""Scoring of embeddings by a predictor, in memory or part by part into a folder."""
