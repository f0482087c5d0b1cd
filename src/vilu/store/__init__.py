"""Embeddings on disk: a folder that says what made it, survives a kill at any moment, and is read memory-mapped."""
