"""Embeddings on disk: a folder that says what made it, survives any kill, and is read mapped."""
