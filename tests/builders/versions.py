"""Pretend that the installed vilu is newer than it is."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import pytest

OLDER = importlib.metadata.version("vilu")
NEWER = "99.98.97"


def raise_version(patch: pytest.MonkeyPatch) -> None:
    """Raise the version wherever it is read from now on."""
    installed = importlib.metadata.distribution

    def distribution(name: str) -> Any:
        found = installed(name)
        if name != "vilu":
            return found
        kind = type("Newer", (type(found),), {"version": NEWER})
        return kind(found._path)

    patch.setattr(importlib.metadata, "distribution", distribution)
    assert importlib.metadata.version("vilu") == NEWER != OLDER
