"""Monitoring: tests whether a guarantee still holds for rows that arrive later."""
