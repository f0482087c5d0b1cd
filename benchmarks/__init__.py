"""Measurements, as ratios of things timed side by side: ``python -m benchmarks [NAME ...]``."""
