"""Monitoring: tests whether a guarantee still holds for later rows."""
