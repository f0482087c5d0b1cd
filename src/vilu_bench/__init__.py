"""Studies to compare methods: further methods, known data sets, and the commands on studies."""

from __future__ import annotations

from importlib import resources


def read_asset(name: str) -> str:
    """Read the text of a file in the package's folder ``assets``."""
    file = resources.files(__name__).joinpath("assets", name)
    return file.read_text(encoding="utf-8")
