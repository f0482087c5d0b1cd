"""What studies use: methods to compare with, known data sets, studies and their commands."""

from __future__ import annotations

from importlib import resources


def asset(name: str) -> str:
    """The text of a file that comes along."""
    return resources.files(__name__).joinpath("assets", name).read_text(encoding="utf-8")
