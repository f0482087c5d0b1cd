"""ViLU+ and ViLU-zero, and what they know of pictures of none of the classes."""
