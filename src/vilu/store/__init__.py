"""Embeddings on disk: folders that record their inputs, and are resumed and memory-mapped."""
