"""Writing, hashing and sealing of files, and their checks when they are read."""
