"""Looking for doctests imports every file;
these two register a model, which is for the commands under test alone.
"""

collect_ignore = ["plugin.py", "server.py"]
