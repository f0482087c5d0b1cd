"""Methods for comparison with the methods of ``vilu``."""
