"""A method, a metric and a data set for vilu, each found by an entry point of pyproject.toml."""

from pathlib import Path

DATASETS = Path(__file__).with_name("datasets.toml")
"""Tables of data sets, a table for each; each has an entry point of its name that leads here."""
