"""What is written, hashed and sealed, and what is believed when it is read."""
