"""ViLU+ and ViLU-zero, and their detection of images of none of the classes."""
