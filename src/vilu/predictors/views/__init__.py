"""Scores of how far several looks at one question agree: augmented views of the image, or wordings of the classes."""
