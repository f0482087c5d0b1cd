"""What a source of embeddings may carry beside its embeddings, for the methods that need more."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from vilu.embeddings.checks import as_array, as_matrix, require_usable, unit_rows
from vilu.errors import DataError, UsageError

IMAGE_COLUMNS = {
    "features": (
        2,
        "(N, F) output of an image encoder: the VLM's own before its projection, or a second "
        "encoder's",
    ),
    "views": (3, "(N, V, D) unit-norm embeddings of V augmented views of each image"),
    "second_image": (
        2,
        "(N, E) embeddings by a second model, whose products with second_text are its logits",
    ),
}
"""One entry per image: number of dimensions and meaning."""

ANY_NORM = frozenset({"features", "second_image"})  # those of images that need not be of unit norm

TEXT_COLUMNS = {
    "text_features": (2, "(K, F) output of the VLM's text encoder before its projection"),
    "prompts": (3, "(K, P, D) unit-norm embeddings of each candidate in P prompts"),
    "second_text": (
        2,
        "(K, E) embeddings of the candidates by a second model, times its logit scale",
    ),
}
"""One entry per candidate."""

MODEL_COLUMNS = {
    "image_projection": (2, "(D, F) last linear map of the VLM's image encoder"),
    "text_projection": (2, "(D, F) last linear map of the VLM's text encoder"),
    "negatives": (
        2,
        "(M, D) unit-norm embeddings of everyday words, none of which need be a class",
    ),
}
"""Of the model as a whole."""

COLUMNS = IMAGE_COLUMNS | TEXT_COLUMNS | MODEL_COLUMNS

# those that are compared with the embeddings
UNIT_NORM = frozenset({"views", "prompts", "negatives"})

SECOND = frozenset({"second_image", "second_text"})
"""Those that a second source of the same rows brings (``vilu.embeddings.two_models``)."""

HOW = {
    "features": "vilu embed --features",
    "views": "vilu embed --views 8",
    "prompts": "vilu embed --prompts ensemble",
    "negatives": "vilu embed --negatives",
    **dict.fromkeys(SECOND, "--second STORE"),
    **dict.fromkeys(
        ("text_features", "image_projection", "text_projection"), "vilu embed --features"
    ),
}
"""The command that makes a column."""


def check_columns(
    columns: Mapping[str, ArrayLike | Tensor] | None,
    n_rows: int,
    n_texts: int,
    width: int | None = None,
) -> dict[str, Tensor]:
    """Columns as float32 tensors: known by name, of the right shape, finite, of the right norm."""
    checked = {}
    for name, values in (columns or {}).items():
        if name not in COLUMNS:
            raise UsageError(f"there is no column {name!r}. Known: {', '.join(COLUMNS)}.")
        array = as_array(values, f"column {name!r}")
        _require_shape(name, array.shape, n_rows, n_texts)
        rows = array.reshape(-1, array.shape[-1])
        if name not in UNIT_NORM:
            tensor = as_matrix(rows, name, scaled=False)
        else:
            _require_width(name, rows.shape[1], width)
            if name in IMAGE_COLUMNS:  # an image may be unusable, a candidate may not
                tensor, _ = unit_rows(rows, name)
            else:
                tensor = require_usable(rows, name)
        if not bool(torch.isfinite(tensor).all()):
            raise DataError(
                f"column {name!r} has numbers that are not finite, or beyond float32 (3.4e38)."
            )
        checked[name] = tensor.view(array.shape)
    return checked


def _require_shape(name: str, shape: tuple[int, ...], n_rows: int, n_texts: int) -> None:
    """Refuse a column of other dimensions than its meaning has, or with other entries than rows."""
    n_dims, meaning = COLUMNS[name]
    expected: int | str = "one or more"
    if name in IMAGE_COLUMNS:
        expected = n_rows
    elif name in TEXT_COLUMNS:
        expected = n_texts
    fits = len(shape) == n_dims and all(shape[1:])
    if fits and name in MODEL_COLUMNS:
        fits = shape[0] > 0
    elif fits:
        fits = shape[0] == expected
    if not fits:
        raise DataError(
            f"column {name!r} must be {meaning}, with {expected} entries. "
            f"Got shape {shape} instead."
        )


def _require_width(name: str, actual: int, width: int | None) -> None:
    """Refuse another width than that of the embeddings, where this is known."""
    if width and actual != width:
        raise DataError(
            f"column {name!r} must be of the width of the embeddings, {width}. Got {actual}."
        )
