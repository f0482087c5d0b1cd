"""Which methods there are, for those who need their names and must not import them."""

from __future__ import annotations

from typing import Any

from vilu.registry import Catalogue

METHODS = Catalogue[Any]("method", "vilu.predictors")
"""The methods by their names; ``catalogue.PREDICTORS`` is the same with its types."""


def methods_with_posterior() -> list[str]:
    """Names of the methods that know answers of their own (``has_posterior``)."""
    return [name for name in METHODS.names() if METHODS[name].has_posterior]
