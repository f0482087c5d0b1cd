"""From a folder of photos to decisions, and back with labels."""
