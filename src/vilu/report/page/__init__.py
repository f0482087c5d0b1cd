"""Scores as a self-contained HTML page."""
