"""ViLU+ and ViLU-zero, and how both detect images that show none of the classes."""
