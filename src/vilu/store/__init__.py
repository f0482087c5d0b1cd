"""Embeddings on disk: a folder that records its inputs, can be resumed and is memory-mapped."""
