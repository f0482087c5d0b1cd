"""Pixels and strings to vectors: the only package that imports open_clip, timm or transformers."""
