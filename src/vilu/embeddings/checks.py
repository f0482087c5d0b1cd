"""Checks for arrays, names and identifiers from users, and row hashes.

A failed check raises a DataError with the reason.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Literal, overload

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from vilu.callers import warn_caller
from vilu.errors import OUTSIDE, OUTSIDE_NAME, UNKNOWN, DataError, did_you_mean
from vilu.validation import refuse_masked

# status codes of rows. Each code is an index of ``STATUS_NAMES``.
VALID = 0
NONFINITE = 1
ZERO_NORM = 2
SHORT_POOL = 3
STATUS_NAMES = ("valid", "nonfinite", "zero_norm", "short_pool")
"""Name for each status code of a row. The code is the index of the name.

"short_pool": the embedding is usable, but the row belongs to no full pool.
"""

NORM_TOLERANCE = 1e-3
"""A row has unit norm if its norm differs from 1 by at most this number.

Rounding a row's numbers to float16 changes a norm of 1 by less than this tolerance.
"""
SAFE_NORMS = (1e-15, 1e15)
"""A norm computed in float32 is right if the norm is between these bounds.

For a norm outside these bounds, the square of a number may have underflowed or overflowed.
"""
SAFE_VALUES = (1e-30, 1e30)
"""Float32 keeps a row's direction if the row's largest number is between these bounds."""

# kinds of NumPy types (the letters of ``dtype.kind``), grouped by the values an array may hold
INTEGER_KINDS = "iu"
"""Kinds of whole-number arrays: signed (i) or unsigned (u)."""
REAL_KINDS = "fiu"
"""Kinds of real-number arrays: floats (f) or whole numbers."""
TEXT_KINDS = "UTO"
"""Kinds of text arrays: texts with fixed length (U), with any length (T), or objects (O)."""

_REAL_OR_COMPLEX = {torch.float64, torch.float32, torch.float16, torch.complex64, torch.complex128}
_SIGNED = {torch.int64, torch.int32, torch.int16, torch.int8}
_UNSIGNED_OR_BOOL = {torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool}
NUMPY_TYPES = _REAL_OR_COMPLEX | _SIGNED | _UNSIGNED_OR_BOOL
"""Torch data types that also exist in numpy."""


def as_array(values: ArrayLike | Tensor, name: str) -> NDArray[np.generic]:
    """Convert an array-like, or a tensor on any device, to a numpy array.

    A tensor whose data type numpy lacks is converted to float32.
    """
    refuse_masked(values, name)
    try:
        if not isinstance(values, Tensor):
            return np.asarray(values)
        tensor = values.detach().cpu()
        if tensor.dtype not in NUMPY_TYPES:
            tensor = tensor.float()
        return tensor.numpy()
    # raised by ragged lists, and by sparse or quantised tensors
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{name} must be an array of numbers: {error}.") from error


def as_matrix(values: ArrayLike | Tensor, name: str, *, keep_direction: bool = True) -> Tensor:
    """Convert ``values`` to a new float32 matrix (N, D) on the CPU. D must be at least 1.

    The values may have any float or integer type, byte order and memory layout.

    ``keep_direction`` decides what happens to numbers that are too large or too small for float32.
    If true, a row with such numbers is scaled. Scaling keeps the row's direction. If false, such
    numbers become infinite or zero.
    """
    array = as_array(values, name)
    if array.dtype.kind not in REAL_KINDS:
        raise DataError(f"{name} must hold real numbers. Got dtype {array.dtype} instead.")
    if array.ndim != 2 or array.shape[1] == 0:
        raise DataError(f"{name} must be a matrix (rows, width). Got shape {array.shape} instead.")
    is_wide = array.dtype.kind == "f" and array.dtype.itemsize > 4  # more bytes than float32
    if keep_direction and is_wide:
        array = _scale_into_float32(array, name)
    with np.errstate(over="ignore"):  # a number beyond float32 becomes infinite, without a warning
        float32_array = array.astype(np.float32, order="C")
        return torch.from_numpy(float32_array)


def _scale_into_float32(array: NDArray[Any], name: str) -> NDArray[Any]:
    """Scale the rows of an array (N, D) whose largest number is too large or small for float32.

    Scaling keeps a row's direction. A warning is given if a row is scaled.
    """
    # largest absolute number in each row
    highest = array.max(axis=1, initial=0)
    lowest = array.min(axis=1, initial=0)
    largest = np.maximum(highest, -lowest)
    smallest_safe, largest_safe = SAFE_VALUES
    is_safe = (largest > smallest_safe) & (largest < largest_safe)
    has_direction = np.isfinite(largest) & (largest > 0)
    needs_scaling = has_direction & ~is_safe
    if not needs_scaling.any():
        return array
    largest_of_scaled = largest[needs_scaling]  # largest number in each scaled row
    warn_caller(
        f"{np.count_nonzero(needs_scaling)} of {len(array)} {name} rows hold numbers that float32 "
        f"cannot hold (largest numbers {largest_of_scaled.min():.3g} to "
        f"{largest_of_scaled.max():.3g}). These rows were scaled, which changes no cosine."
    )
    # A row is divided by 2^e, to bring its largest number into [1/2, 1). A power of two changes
    # only the exponents of the numbers, so no digit is lost.
    _, exponents = np.frexp(largest_of_scaled)
    exponent_column = exponents[:, None]
    scaled_rows = np.ldexp(array[needs_scaling], -exponent_column)
    array = array.copy()
    array[needs_scaling] = scaled_rows
    return array


def row_status(rows: Tensor) -> tuple[NDArray[np.uint8], Tensor]:
    """Compute status codes (N,) and norms (N,) for the rows of a float32 matrix (N, D).

    The norms are right even for rows with very small or very large numbers.
    """
    norms = torch.linalg.vector_norm(rows, dim=1)
    smallest_safe, largest_safe = SAFE_NORMS
    is_safe = (norms > smallest_safe) & (norms < largest_safe)
    is_unsafe = ~is_safe  # true also for a norm of NaN, because every comparison with NaN is false
    if bool(is_unsafe.any()):
        # In float64, no square of a float32 number underflows or overflows.
        norms = norms.double()
        norms[is_unsafe] = torch.linalg.vector_norm(rows[is_unsafe].double(), dim=1)
    status = np.full(len(rows), VALID, dtype=np.uint8)
    status[(norms == 0).numpy()] = ZERO_NORM
    status[~torch.isfinite(norms).numpy()] = NONFINITE
    return status, norms


def unit_rows(values: ArrayLike | Tensor, name: str) -> tuple[Tensor, NDArray[np.uint8]]:
    """Normalise rows. Return unit rows (N, D) in float32, and the status codes (N,).

    Unit-norm rows stay unchanged. If any row is changed, a warning is given.
    """
    matrix = as_matrix(values, name)
    rows, status, previous_norms = normalise_rows(matrix)
    previous_norms.warn(name)
    return rows, status


@dataclass
class NormSummary:
    """Summary of row norms before normalisation, for a warning.

    The range is known only if a row was normalised. Otherwise ``low`` is infinite, and ``high`` 0.
    """

    n_rows: int = 0  # number of all rows
    n_changed: int = 0  # number of rows that were normalised, because their norm was not 1
    low: float = math.inf  # smallest norm of a usable row
    high: float = 0.0  # largest norm of a usable row

    def __add__(self, other: NormSummary) -> NormSummary:
        return NormSummary(
            n_rows=self.n_rows + other.n_rows,
            n_changed=self.n_changed + other.n_changed,
            low=min(self.low, other.low),
            high=max(self.high, other.high),
        )

    def warn(self, name: str) -> None:
        """Warn if rows were normalised."""
        if self.n_changed:
            warn_caller(
                f"{self.n_changed} of {self.n_rows} {name} rows are not of unit norm "
                f"(norms {self.low:.3g} to {self.high:.3g}); they were normalised."
            )


def normalise_rows(rows: Tensor) -> tuple[Tensor, NDArray[np.uint8], NormSummary]:
    """Normalise rows. Return rows (N, D), status codes (N,), and a summary of the former norms.

    Unit-norm rows, and rows that are not usable, stay unchanged.
    """
    status, norms = row_status(rows)
    is_usable = torch.from_numpy(status == VALID)
    is_changed = is_usable & ((norms - 1).abs() > NORM_TOLERANCE)
    if not bool(is_changed.any()):
        return rows, status, NormSummary(n_rows=len(rows))
    normalised_rows = (rows / norms[:, None]).float()
    normalised_rows = torch.where(is_changed[:, None], normalised_rows, rows)
    usable_norms = norms[is_usable]
    n_changed = int(is_changed.sum())
    low = float(usable_norms.min())
    high = float(usable_norms.max())
    previous_norms = NormSummary(n_rows=len(rows), n_changed=n_changed, low=low, high=high)
    return normalised_rows, status, previous_norms


def require_usable_rows(values: ArrayLike | Tensor, name: str) -> Tensor:
    """Normalise rows (N, D). There must be a row, and every row must be usable.

    Raises:
        DataError: If there is no row, or if a row is not usable.
    """
    rows, status = unit_rows(values, name)
    if not len(rows):
        raise DataError(f"{name} must have at least one row. Got none.")
    bad_rows = np.flatnonzero(status != VALID)
    if len(bad_rows):
        first = int(bad_rows[0])
        raise DataError(
            f"every {name} row must be finite and of non-zero norm. "
            f"Got {len(bad_rows)} bad rows of {len(rows)}, "
            f"first row {first} ({STATUS_NAMES[status[first]]})."
        )
    return rows


def check_targets(
    values: ArrayLike | Tensor | None,
    n_rows: int,
    n_candidates: int,
    class_names: Sequence[str] | None = None,
) -> tuple[Tensor, Tensor]:
    """Check targets. Return int64 targets (N,), and a mask (N,) of rows outside all classes.

    ``values`` are candidate indices or names. An unknown target is -1 or "". A row outside all
    classes has the target -2 or "(outside)". The mask marks such a row, and its returned target is
    -1. So the returned targets are from -1 to K - 1. If ``values`` is None, all are unknown.
    """
    if values is None:
        unknown_targets = torch.full((n_rows,), UNKNOWN, dtype=torch.int64)
        return unknown_targets, torch.zeros(n_rows, dtype=torch.bool)
    array = as_array(values, "target")
    if array.shape != (n_rows,):
        raise DataError(
            f"target must have one entry per image row ({n_rows}). Got shape {array.shape} instead."
        )
    names = _texts_or_none(array)
    if names is not None:
        special_codes = {"": UNKNOWN, OUTSIDE_NAME: OUTSIDE}
        array = _indices_of_names(names, "target", class_names, special_codes)
    if array.size and array.dtype.kind not in INTEGER_KINDS:
        raise DataError(
            "target must hold whole numbers (rows of text, -1 where unknown), or names of classes "
            f'("" where unknown). Got dtype {array.dtype} instead.'
        )
    if array.size and (array.min() < OUTSIDE or array.max() >= n_candidates):
        raise DataError(
            f"target must be a row of text, 0 to {n_candidates - 1}, -1 where unknown, or -2 for "
            f"none of them. Got values from {array.min()} to {array.max()} instead."
        )
    target = torch.from_numpy(array.astype(np.int64))
    is_outside = target == OUTSIDE
    return target.clamp(min=UNKNOWN), is_outside  # rows outside get an unknown target


def check_answers(
    values: ArrayLike | Tensor, n_rows: int, class_names: Sequence[str] | None, n_candidates: int
) -> Tensor:
    """Check answers, given as candidate indices or names. Return the indices (N,) int64."""
    array = as_array(values, "answer")
    if array.shape != (n_rows,):
        raise DataError(
            f"answer must have one entry per image row ({n_rows}). Got shape {array.shape} instead."
        )
    names = _texts_or_none(array)
    if names is not None:
        array = _indices_of_names(names, "answer", class_names, special_codes={})
    if array.size and array.dtype.kind not in INTEGER_KINDS:
        raise DataError(
            "answer must hold rows of text, or names of candidates. "
            f"Got dtype {array.dtype} instead."
        )
    if array.size and (array.min() < 0 or array.max() >= n_candidates):
        raise DataError(
            f"answer must be a row of text, 0 to {n_candidates - 1}. An answer that is none of the "
            f"candidates cannot be judged. Got values from {array.min()} to {array.max()} instead."
        )
    answer = array.astype(np.int64)
    return torch.from_numpy(answer)


def _texts_or_none(array: NDArray[np.generic]) -> list[str] | None:
    """Return the texts (N,) in an array. None if the array does not hold texts.

    An entry None in the array becomes the text "".
    """
    if not array.size or array.dtype.kind not in TEXT_KINDS:
        return None
    texts: list[str] = []
    for value in array.tolist():
        text = "" if value is None else value
        if not isinstance(text, str):
            return None
        texts.append(text)
    return texts


def _indices_of_names(
    names: Sequence[str],
    argument: str,
    class_names: Sequence[str] | None,
    special_codes: Mapping[str, int],
) -> NDArray[np.generic]:
    """Return the indices (N,) int64 of the candidates with these names (N,).

    Args:
        names: Names from a user.
        argument: The argument that holds these names: "target" or "answer".
        class_names: Candidate names. None raises a DataError, because the candidates have no
            names.
        special_codes: Maps further allowed names to codes. These names are no candidates.
    """
    if class_names is None:
        raise DataError(
            f"{argument} holds names, and the candidates have none: give class_names too."
        )
    index_of_name = dict(special_codes)
    index_of_name.update({name: index for index, name in enumerate(class_names)})
    unknown_names = sorted({name for name in names if name not in index_of_name})
    if unknown_names:
        first_unknown = ", ".join(repr(name) for name in unknown_names[:5])
        suggestion = did_you_mean(unknown_names[0], class_names)
        raise DataError(
            f"{argument} must hold names of the {len(class_names)} candidates. "
            f"Got {first_unknown} too.{suggestion} {_REMEDIES[argument]}"
        )
    return np.array([index_of_name[name] for name in names], np.int64)


_REMEDIES = {
    "target": f"Add the class, or write {OUTSIDE_NAME!r} for a picture of none of the classes.",
    "answer": "Such an answer cannot be judged. Add the candidate, or leave these rows out.",
}
"""Maps an argument to the advice in the message about a name that is no candidate."""


def check_indices(values: ArrayLike | Tensor, n_items: int, name: str) -> Tensor:
    """Check that ``values`` (M,) are indices of ``n_items`` items, and return them as int64.

    Messages call the indices ``name``.
    """
    array = as_array(values, name)
    # an empty list becomes a float64 array, and is accepted
    is_whole = array.dtype.kind in INTEGER_KINDS or array.size == 0
    if array.ndim != 1 or not is_whole:
        raise DataError(
            f"{name} must be a vector of whole numbers. "
            f"Got {array.dtype} of shape {array.shape} instead."
        )
    if array.size and (array.min() < 0 or array.max() >= n_items):
        raise DataError(
            f"{name} must be from 0 to {n_items - 1}. Got {array.min()} to {array.max()} instead."
        )
    indices = array.astype(np.int64)
    return torch.from_numpy(indices)


def check_class_names(names: Sequence[str] | None, n_candidates: int) -> tuple[str, ...] | None:
    """Check the number of class names, and that no name is blank. Return the names as a tuple.

    Classes with the same text may have the same name (``source.index_of_first_same_answer``).
    """
    if names is None:
        return None
    names = tuple(str(name) for name in names)
    if len(names) != n_candidates:
        raise DataError(
            f"class_names must have one name per text row ({n_candidates}). "
            f"Got {len(names)} instead."
        )
    for number, name in enumerate(names):
        if not name.strip():
            raise DataError(f"class names must not be blank. Name {number} is blank.")
    return names


def check_ids(ids: Sequence[str] | None, n_rows: int) -> Sequence[str]:
    """Check the number of row identifiers. If ``ids`` is None, return the row numbers instead."""
    if ids is None:
        return RowNumbers(n_rows)
    if len(ids) != n_rows:
        raise DataError(
            f"ids must have one entry per image row ({n_rows}). Got {len(ids)} instead."
        )
    if isinstance(ids, list | np.ndarray):
        return tuple(ids)
    return ids


class Identifiers(Sequence[str]):
    """A sequence of row identifiers. Each identifier is made on demand."""

    def __init__(self, n_rows: int) -> None:
        self._n_rows = n_rows

    @abstractmethod
    def _identifier(self, row: int) -> str:
        """Return a row's identifier. Subclasses override this method.

        A subclass must not store a method of the source that has the identifiers. Otherwise, the
        source and the identifiers would refer to each other, and the source's files would stay open
        until the garbage collector runs.
        """

    def __len__(self) -> int:
        return self._n_rows

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        # A slice of a range is a range of row numbers. An index into a range gives a single row
        # number, and may be negative.
        row_or_rows = range(len(self))[index]
        if isinstance(row_or_rows, range):
            return self._identifiers(row_or_rows)
        return self._identifier(row_or_rows)

    def _identifiers(self, rows: range) -> list[str]:
        """Return the identifiers of several rows."""
        return [self._identifier(row) for row in rows]


class RowNumbers(Identifiers):
    """Row numbers as identifiers, if no identifiers were given: "0", "1", ...

    Row numbers cannot identify a row in another source.
    """

    def _identifier(self, row: int) -> str:
        return str(row)

    def _identifiers(self, rows: range) -> list[str]:
        return [str(row) for row in rows]


IdentityKind = Literal["pictures", "embeddings", "rows", "names"]
"""The data to compare in order to recognise equal rows.

"pictures" are the encoded picture bytes, "embeddings" the numbers in the embeddings, "rows" the
identifiers in a table of answers, and "names" the row identifiers in other sources. "pictures"
and "embeddings" include the caption of an image-caption pair.
"""

HASH_BYTES = 8
"""Number of bytes in a hash."""


def hash_items(items: Iterable[bytes | memoryview]) -> NDArray[np.uint64]:
    """Hash each item: return BLAKE2b digests (N,) of 8 bytes, as whole numbers."""
    digests = [blake2b(item, digest_size=HASH_BYTES).digest() for item in items]
    joined_digests = b"".join(digests)
    return np.frombuffer(joined_digests, dtype="<u8").astype(np.uint64)


def hash_names(names: Iterable[str]) -> NDArray[np.uint64]:
    """Return hashes (N,) of identifiers."""
    encoded_names = (name.encode(errors="surrogatepass") for name in names)
    return hash_items(encoded_names)


def hash_rows(rows: Tensor) -> NDArray[np.uint64]:
    """Return hashes (N,) of float rows (N, D), rounded to float16 first.

    Because of the rounding, a row stored in float32 has the same hash as in float16.
    """
    rounded_rows = rows.half() + 0  # adding 0 turns -0 into 0
    float16_rows = rounded_rows.numpy()
    content = memoryview(float16_rows.astype("<f2").tobytes())
    row_bytes = 2 * rows.shape[1]  # a number in float16 has 2 bytes
    starts = range(0, len(content), row_bytes)
    return hash_items(content[start : start + row_bytes] for start in starts)
