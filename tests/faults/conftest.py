"""Keep two files out of pytest's collection, because pytest imports every file to find doctests.

These two files register a model that only the tested commands may see.
"""

collect_ignore = ["plugin.py", "server.py"]
