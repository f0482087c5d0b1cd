"""The names of all methods, for modules that must not import the methods themselves."""

from __future__ import annotations

from typing import Any

from vilu.registry import Catalogue

METHODS = Catalogue[Any]("method", "vilu.predictors")
"""The methods by name. ``catalogue.PREDICTORS`` is the same object with precise types."""


def methods_with_posterior() -> list[str]:
    """Names of the methods that have a posterior of their own (``has_posterior``)."""
    return [name for name in METHODS.names() if METHODS[name].has_posterior]
