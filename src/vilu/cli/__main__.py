"""``python -m vilu.cli``."""

from vilu.cli import entry

entry()
