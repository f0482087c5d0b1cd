"""Encoders for images and texts. Only this package loads models with open_clip or transformers."""
