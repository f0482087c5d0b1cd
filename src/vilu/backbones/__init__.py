"""Encoders of images and texts. No other package imports open_clip or transformers."""
