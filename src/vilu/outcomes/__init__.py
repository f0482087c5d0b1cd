"""What was said, whether it was wrong, and every table of it."""
