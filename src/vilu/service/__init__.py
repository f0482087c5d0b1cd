"""Decisions over HTTP: the service of ``vilu serve``."""
