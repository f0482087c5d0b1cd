"""The columns of ``Outcomes``: checked on their way in, null where unknown on their way to a file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vilu.errors import DataError
from vilu.metrics.counts import real_vector

if TYPE_CHECKING:
    import pyarrow as pa

UNKNOWN = -1
"""A failure, prediction or target that is not known."""


def check_codes(values: ArrayLike, name: str, last: int | None) -> NDArray[np.int64]:
    """Whole numbers (N,) from -1 to ``last`` (None: no upper bound)."""
    numbers = real_vector(values, name)
    top = np.inf if last is None else last
    bad = np.flatnonzero(~((numbers >= UNKNOWN) & (numbers <= top) & (numbers == np.rint(numbers))))
    if len(bad):
        raise DataError(
            f"{name} must hold whole numbers from {UNKNOWN} (unknown) to {top:g}. "
            f"Got {numbers[bad[0]]:g} in row {bad[0]} instead."
        )
    return numbers.astype(np.int64)


def check_texts(
    values: Sequence[str | None] | None, name: str, *, optional: bool = False
) -> tuple[str | None, ...] | None:
    """Texts, each of which may be None where that is optional."""
    if values is None:
        return None
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise DataError(f"{name} must be a list of texts. Got {type(values).__name__} instead.")
    texts = tuple(values)
    for row, text in enumerate(texts):
        if not (isinstance(text, str) or (optional and text is None)):
            raise DataError(f"{name} must hold texts. Got {text!r} in row {row} instead.")
    return texts


def nullable_codes(codes: NDArray[np.int64] | None, n: int) -> pa.Array:
    """Arrow int32 column, null where unknown."""
    import pyarrow as pa

    if codes is None:
        return pa.nulls(n, pa.int32())
    return pa.array(codes, pa.int32(), mask=codes == UNKNOWN)


def check_probabilities(values: ArrayLike | None, name: str) -> NDArray[np.float64] | None:
    """Numbers (N,) in [0, 1], or NaN where there is none."""
    if values is None:
        return None
    numbers = real_vector(values, name)
    if not bool((((numbers >= 0) & (numbers <= 1)) | np.isnan(numbers)).all()):
        raise DataError(f"{name} must be in [0, 1], or NaN where there is none.")
    return numbers


def extra_columns(
    probability: NDArray[np.float64] | None, texts: Mapping[str, Sequence[str | None] | None]
) -> dict[str, pa.Array]:
    """Columns of what there is of a probability and of texts."""
    import pyarrow as pa

    numbers = {} if probability is None else {"failure_probability": pa.array(probability, mask=np.isnan(probability))}
    return numbers | {name: pa.array(values, pa.string()) for name, values in texts.items() if values is not None}


def plain_values(column: pa.ChunkedArray) -> NDArray[np.int64] | NDArray[np.float64] | list[str | None]:
    """Whole numbers with -1 for null, numbers with NaN, or texts with None."""
    import pyarrow as pa

    if pa.types.is_string(column.type):
        texts: list[str | None] = column.to_pylist()
        return texts
    if pa.types.is_floating(column.type):
        return np.asarray(column.fill_null(np.nan).to_numpy(), dtype=np.float64)
    return np.asarray(column.fill_null(UNKNOWN).to_numpy(), dtype=np.int64)
