"""A method, a metric, a data set and a backbone for vilu, found by their entry points."""

from pathlib import Path

DATASETS = Path(__file__).with_name("datasets.toml")
"""A file with a table for each data set. Each data set has an entry point that names this file."""

BACKBONES = Path(__file__).with_name("backbones.toml")
"""A file with a table for each backbone. Each backbone has an entry point that names this file."""
