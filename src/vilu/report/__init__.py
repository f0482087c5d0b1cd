"""Figures, pages and explanations for people. Only this subpackage draws figures."""
