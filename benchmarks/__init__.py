"""Measurements: mostly ratios of times taken side by side. ``python -m benchmarks [NAME ...]``."""
