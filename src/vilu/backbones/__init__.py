"""Encoders of images and texts: the only package that imports open_clip or transformers."""
