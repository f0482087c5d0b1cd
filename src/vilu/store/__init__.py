"""Embeddings on disk, in resumable and memory-mapped folders with a record of all inputs."""
