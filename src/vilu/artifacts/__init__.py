"""Files: writing, hashing, sealing with a digest, and checks during reading."""
