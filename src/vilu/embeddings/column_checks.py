"""Checks for columns from users (``vilu.embeddings.columns`` defines the columns)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from vilu.embeddings.checks import as_array, as_matrix, require_usable_rows, unit_rows
from vilu.embeddings.columns import (
    COLUMNS,
    IMAGE_COLUMNS,
    MODEL_COLUMNS,
    UNIT_NORM_COLUMNS,
)
from vilu.errors import DataError, UsageError


def check_columns(
    columns: Mapping[str, ArrayLike | Tensor] | None,
    n_rows: int,
    n_texts: int,
    width: int | None = None,
) -> dict[str, Tensor]:
    """Check columns and convert them to float32 tensors.

    Every column must have a known name, the right shape and finite numbers. The columns in
    ``UNIT_NORM_COLUMNS`` must be as wide as the embeddings, and are normalised.

    Args:
        columns: A user's columns, by name.
        n_rows: Number of images.
        n_texts: Number of candidates.
        width: Width of the embeddings. None or 0 if unknown.
    """
    checked_columns = {}
    for name, values in (columns or {}).items():
        if name not in COLUMNS:
            raise UsageError(f"there is no column {name!r}. Known: {', '.join(COLUMNS)}.")
        array = as_array(values, f"column {name!r}")
        _require_shape(name, array.shape, n_rows, n_texts)
        rows = array.reshape(-1, array.shape[-1])
        if name not in UNIT_NORM_COLUMNS:
            tensor = as_matrix(rows, name, keep_direction=False)
        else:
            _require_width(name, rows.shape[1], width)
            if name in IMAGE_COLUMNS:  # a view of an image may have norm zero
                tensor, _ = unit_rows(rows, name)
            else:
                tensor = require_usable_rows(rows, name)
        if not bool(torch.isfinite(tensor).all()):
            raise DataError(
                f"column {name!r} has numbers that are not finite, or beyond float32 (3.4e38)."
            )
        checked_columns[name] = tensor.view(array.shape)
    return checked_columns


def _require_shape(name: str, shape: tuple[int, ...], n_rows: int, n_texts: int) -> None:
    """Raise DataError if a column has the wrong number of dimensions or entries."""
    n_dims, meaning = COLUMNS[name]
    n_entries = shape[0] if shape else 0
    expected_entries: int | str = n_rows if name in IMAGE_COLUMNS else n_texts
    has_right_length = n_entries == expected_entries
    if name in MODEL_COLUMNS:
        expected_entries = "one or more"
        has_right_length = n_entries > 0
    has_right_dims = len(shape) == n_dims
    has_empty_entries = 0 in shape[1:]
    if not has_right_dims or not has_right_length or has_empty_entries:
        raise DataError(
            f"column {name!r} must be {meaning}, with {expected_entries} entries. "
            f"Got shape {shape} instead."
        )


def _require_width(name: str, actual_width: int, width: int | None) -> None:
    """Raise DataError if a column is not as wide as the embeddings.

    If ``width`` is None or 0, the embeddings' width is unknown, and every column passes.
    """
    if width and actual_width != width:
        raise DataError(
            f"column {name!r} must be of the width of the embeddings, {width}. Got {actual_width}."
        )
