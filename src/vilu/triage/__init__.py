"""From a photo folder to decisions, and back with labels."""
