"""Answers of any model as a table: read, fitted, calibrated and scored without embeddings."""
