"""Files: what is written, and what is believed when it is read."""
