"""Figures, pages and explanations for people. No other subpackage draws figures."""
