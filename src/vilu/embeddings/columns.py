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
        "(N, F) output of an image encoder: the VLM's own before its projection, or a second encoder's",
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

UNIT_NORM = frozenset(
    {"views", "prompts", "negatives"}
)  # those that are compared with the embeddings

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
    given: Mapping[str, ArrayLike | Tensor] | None,
    n_rows: int,
    n_texts: int,
    width: int | None = None,
) -> dict[str, Tensor]:
    """Columns as float32 tensors: known by name, of the right shape, all finite, of unit norm where they are to be."""
    checked = {}
    for name, values in (given or {}).items():
        if name not in COLUMNS:
            raise UsageError(f"there is no column {name!r}. Known: {', '.join(COLUMNS)}.")
        array = as_array(values, f"column {name!r}")
        n_dims, meaning = COLUMNS[name]
        expected = (
            n_rows if name in IMAGE_COLUMNS else n_texts if name in TEXT_COLUMNS else "one or more"
        )
        fits = array.ndim == n_dims and all(array.shape[1:])
        if not fits or (len(array) != expected if name not in MODEL_COLUMNS else not len(array)):
            raise DataError(
                f"column {name!r} must be {meaning}, with {expected} entries. Got shape {array.shape} instead."
            )
        rows = array.reshape(-1, array.shape[-1])
        if name not in UNIT_NORM:
            tensor = as_matrix(rows, name, scaled=False)
        elif array.shape[-1] == (width or array.shape[-1]):
            tensor = (
                unit_rows(rows, name)[0] if name in IMAGE_COLUMNS else require_usable(rows, name)
            )
        else:
            raise DataError(
                f"column {name!r} must be of the width of the embeddings, {width}. Got {array.shape[-1]}."
            )
        if not bool(torch.isfinite(tensor).all()):
            raise DataError(
                f"column {name!r} has numbers that are not finite, or beyond float32 (3.4e38)."
            )
        checked[name] = tensor.view(array.shape)
    return checked
