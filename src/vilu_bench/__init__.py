"""What studies use: methods to compare with, known data sets, studies and their commands."""

from __future__ import annotations

from importlib import resources


def asset(name: str) -> str:
    """Text of a file in the package's folder ``assets``."""
    return resources.files(__name__).joinpath("assets", name).read_text(encoding="utf-8")
