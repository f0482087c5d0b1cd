"""Data sets to embed: encoded images with labels or captions, in folders, tables and tar files."""
