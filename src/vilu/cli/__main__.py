"""``python -m vilu.cli``."""

from vilu.cli import main

main()
