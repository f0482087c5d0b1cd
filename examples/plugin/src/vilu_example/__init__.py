"""A method, a metric, a data set and a backbone for vilu, found by their entry points."""

from pathlib import Path

DATASETS = Path(__file__).with_name("datasets.toml")
"""Tables of data sets, a table for each; each has an entry point of its name that leads here."""

BACKBONES = Path(__file__).with_name("backbones.toml")
"""The same of backbones."""
