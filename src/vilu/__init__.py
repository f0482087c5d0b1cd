"""vilu: how likely is the answer of a frozen vision-language model wrong?

Public names are imported on first use, so that ``import vilu`` loads neither torch nor a backbone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vilu.space import EmbeddingSpace
    from vilu.types import Batch, Embeddings, EmbeddingSource, PairEmbeddings

__version__ = "0.1.0"

_HOME = {
    "EmbeddingSpace": "vilu.space",
    "Batch": "vilu.types",
    "EmbeddingSource": "vilu.types",
    "Embeddings": "vilu.types",
    "PairEmbeddings": "vilu.types",
}

__all__ = [
    "Batch",
    "EmbeddingSource",
    "EmbeddingSpace",
    "Embeddings",
    "PairEmbeddings",
    "__version__",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'vilu' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
