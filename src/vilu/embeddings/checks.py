"""Checks on arrays that come from outside, each a DataError that names what was found; names of rows, and hashes."""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Literal, overload

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from vilu.errors import DataError
from vilu.validation import refuse_masked

VALID, NONFINITE, ZERO_NORM, SHORT_POOL = 0, 1, 2, 3
STATUS = ("valid", "nonfinite", "zero_norm", "short_pool")
"""Meaning of the status codes of rows; "short_pool": a good embedding, but not one of a full pool."""

NORM_TOLERANCE = 1e-3  # rounding to float16 moves a unit norm by less than this
SAFE_NORMS = (
    1e-15,
    1e15,
)  # between these no square of a float32 number is lost in a sum of squares in float32
SAFE_VALUES = (
    1e-30,
    1e30,
)  # between these the largest number of a row keeps its direction in float32


def as_array(values: ArrayLike | Tensor, name: str) -> NDArray[np.generic]:
    """An array on the CPU, of what numpy takes or torch holds; of types that numpy lacks as float32."""
    refuse_masked(values, name)
    try:
        if not isinstance(values, Tensor):
            return np.asarray(values)
        values = values.detach().cpu()
        return values.numpy() if values.dtype in NUMPYS else values.float().numpy()
    except (
        TypeError,
        ValueError,
        RuntimeError,
    ) as error:  # ragged lists; what is sparse or quantised
        raise DataError(f"{name} must be an array of numbers: {error}.") from error


NUMPYS = {
    torch.float64,
    torch.float32,
    torch.float16,
    torch.complex64,
    torch.complex128,
    torch.bool,
    torch.int64,
}
NUMPYS |= {
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
}
"""Types of torch that numpy has."""


def as_matrix(values: ArrayLike | Tensor, name: str, *, scaled: bool = True) -> Tensor:
    """(N, D) float32 on the CPU, of any float or integer type, byte order and memory layout; D is at least 1. A copy.

    Rows whose numbers float32 has not are ``scaled`` where only their direction counts; else these
    become infinite.
    """
    array = as_array(values, name)
    if array.dtype.kind not in "fiu":
        raise DataError(f"{name} must hold real numbers. Got dtype {array.dtype} instead.")
    if array.ndim != 2 or array.shape[1] == 0:
        raise DataError(f"{name} must be a matrix (rows, width). Got shape {array.shape} instead.")
    if scaled and array.dtype.kind == "f" and array.dtype.itemsize > 4:
        array = _within_float32(array, name)
    with np.errstate(over="ignore"):
        return torch.from_numpy(array.astype(np.float32, order="C"))


def _within_float32(array: NDArray[Any], name: str) -> NDArray[Any]:
    """Rows of float64 whose numbers float32 cannot hold, times a power of two, which keeps their direction."""
    largest = np.maximum(array.max(axis=1, initial=0), -array.min(axis=1, initial=0))
    beyond = (
        np.isfinite(largest)
        & (largest > 0)
        & ~((largest > SAFE_VALUES[0]) & (largest < SAFE_VALUES[1]))
    )
    if not beyond.any():
        return array
    low, high = largest[beyond].min(), largest[beyond].max()
    warnings.warn(
        f"{np.count_nonzero(beyond)} of {len(array)} {name} rows hold numbers that float32 has not "
        f"(largest ones {low:.3g} to {high:.3g}); they were scaled, which changes no cosine.",
        stacklevel=7,
    )
    array = array.copy()
    array[beyond] = np.ldexp(array[beyond], -np.frexp(largest[beyond])[1][:, None])
    return array


def row_status(rows: Tensor) -> tuple[NDArray[np.uint8], Tensor]:
    """Status code (N,) of every row of an (N, D) float32 matrix, and its Euclidean norms (N,), right for all rows."""
    norms = torch.linalg.vector_norm(rows, dim=1)
    unsafe = ~((norms > SAFE_NORMS[0]) & (norms < SAFE_NORMS[1]))
    if bool(unsafe.any()):
        norms = norms.double()
        norms[unsafe] = torch.linalg.vector_norm(rows[unsafe].double(), dim=1)
    status = np.full(len(rows), VALID, dtype=np.uint8)
    status[(norms == 0).numpy()] = ZERO_NORM
    status[~torch.isfinite(norms).numpy()] = NONFINITE
    return status, norms


def unit_rows(values: ArrayLike | Tensor, name: str) -> tuple[Tensor, NDArray[np.uint8]]:
    """Rows (N, D) float32 of unit norm and their status; rows already of unit norm are left bit for bit."""
    rows, status, norms = normalised(as_matrix(values, name))
    norms.warn(name, stacklevel=6)
    return rows, status


@dataclass
class Norms:
    """Norms of usable rows, and how many of so many rows were not of unit norm and were changed."""

    n_rows: int = 0
    n_changed: int = 0
    low: float = math.inf
    high: float = 0.0

    def __add__(self, other: Norms) -> Norms:
        n_rows, n_changed = self.n_rows + other.n_rows, self.n_changed + other.n_changed
        return Norms(n_rows, n_changed, min(self.low, other.low), max(self.high, other.high))

    def warn(self, name: str, stacklevel: int) -> None:
        """Say that rows were changed, if some were."""
        if self.n_changed:
            warnings.warn(
                f"{self.n_changed} of {self.n_rows} {name} rows are not of unit norm "
                f"(norms {self.low:.3g} to {self.high:.3g}); they were normalised.",
                stacklevel=stacklevel,
            )


def normalised(rows: Tensor) -> tuple[Tensor, NDArray[np.uint8], Norms]:
    """Rows (N, D) of unit norm, their status (N,), and what their norms were."""
    status, norms = row_status(rows)
    usable = torch.from_numpy(status == VALID)
    off = usable & ((norms - 1).abs() > NORM_TOLERANCE)
    if not bool(off.any()):
        return rows, status, Norms(len(rows))
    found = Norms(len(rows), int(off.sum()), norms[usable].min().item(), norms[usable].max().item())
    return torch.where(off[:, None], (rows / norms[:, None]).float(), rows), status, found


def require_usable(values: ArrayLike | Tensor, name: str) -> Tensor:
    """Rows of unit norm, at least one and none of them unusable."""
    rows, status = unit_rows(values, name)
    if not len(rows):
        raise DataError(f"{name} must have at least one row. Got none.")
    if status.any():
        first = int(np.flatnonzero(status)[0])
        raise DataError(
            f"every {name} row must be finite and of non-zero norm. "
            f"Got {np.count_nonzero(status)} bad rows of {len(rows)}, first row {first} ({STATUS[status[first]]})."
        )
    return rows


def check_targets(
    values: ArrayLike | Tensor | None, n_rows: int, n_candidates: int
) -> tuple[Tensor, Tensor]:
    """(N,) int64 targets in -1 ...

    K-1, and (N,) bool which were -2, none of the classes; None: nothing is known.
    """
    if values is None:
        return torch.full((n_rows,), -1, dtype=torch.int64), torch.zeros(n_rows, dtype=torch.bool)
    array = as_array(values, "target")
    if array.shape != (n_rows,):
        raise DataError(
            f"target must have one entry per image row ({n_rows}). Got shape {array.shape} instead."
        )
    if array.size and array.dtype.kind not in "iu":
        raise DataError(
            f"target must hold whole numbers (rows of text). Got dtype {array.dtype} instead."
        )
    if array.size and (array.min() < -2 or array.max() >= n_candidates):
        raise DataError(
            f"target must be a row of text, 0 to {n_candidates - 1}, -1 where unknown, or -2 for none of them. "
            f"Got values from {array.min()} to {array.max()} instead."
        )
    target = torch.from_numpy(array.astype(np.int64))
    return target.clamp(min=-1), target == -2


def check_places(values: ArrayLike | Tensor, n: int, name: str) -> Tensor:
    """(M,) int64 whole numbers from 0 to n - 1."""
    array = as_array(values, name)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise DataError(
            f"{name} must be a vector of whole numbers. Got {array.dtype} of shape {array.shape} instead."
        )
    if array.size and not (array.min() >= 0 and array.max() < n):
        raise DataError(
            f"{name} must be from 0 to {n - 1}. Got {array.min()} to {array.max()} instead."
        )
    return torch.from_numpy(array.astype(np.int64))


def check_class_names(names: Sequence[str] | None, n_candidates: int) -> tuple[str, ...] | None:
    """The K names as a tuple, none blank; names may repeat where the texts do (``source.first_same``)."""
    if names is None:
        return None
    names = tuple(str(name) for name in names)
    if len(names) != n_candidates:
        raise DataError(
            f"class_names must have one name per text row ({n_candidates}). Got {len(names)} instead."
        )
    if blank := [i for i, name in enumerate(names) if not name.strip()]:
        raise DataError(f"class names must not be blank. Name {blank[0]} is.")
    return names


def check_ids(ids: Sequence[str] | None, n_rows: int) -> Sequence[str]:
    """N row identifiers, by default the row numbers."""
    if ids is None:
        return RowNumbers(n_rows)
    if len(ids) != n_rows:
        raise DataError(
            f"ids must have one entry per image row ({n_rows}). Got {len(ids)} instead."
        )
    return tuple(ids) if isinstance(ids, list | np.ndarray) else ids


class Identifiers(Sequence[str]):
    """Identifiers of so many rows, each made when it is asked for."""

    def __init__(self, n_rows: int) -> None:
        self._n_rows = n_rows

    @abstractmethod
    def _of(self, row: int) -> str:
        """The identifier of a row; a method, since a bound one kept here would hold files open until a collection."""

    def __len__(self) -> int:
        return self._n_rows

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        rows = range(len(self))[index]
        return self._several(rows) if isinstance(rows, range) else self._of(rows)

    def _several(self, rows: range) -> list[str]:
        return [self._of(row) for row in rows]


class RowNumbers(Identifiers):
    """Identifiers of rows that came without any: "0", "1", ...; they identify nothing outside their own array."""

    def _of(self, row: int) -> str:
        return str(row)

    def _several(self, rows: range) -> list[str]:
        return list(map(str, rows))


Identity = Literal["pictures", "embeddings", "names"]
"""What tells whether two rows are the same: the encoded bytes of the pictures; embeddings, where nothing is known of
pictures; or identifiers, where neither is known. To a pair its caption belongs, too.
"""

HASH_BYTES = 8


def hash_of_each(items: Iterable[bytes | memoryview]) -> NDArray[np.uint64]:
    """(N,) the first 8 bytes of the BLAKE2b hash of each."""
    digests = b"".join([blake2b(item, digest_size=HASH_BYTES).digest() for item in items])
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


def hash_names(names: Iterable[str]) -> NDArray[np.uint64]:
    """(N,) hashes of identifiers."""
    return hash_of_each(name.encode(errors="surrogatepass") for name in names)


def hash_rows(rows: Tensor) -> NDArray[np.uint64]:
    """(N,) hashes of float rows (N, D), rounded to float16: the same whichever float type an array was kept in."""
    content = memoryview((rows.half() + 0).numpy().astype("<f2").tobytes())  # + 0 makes -0 a 0
    width = 2 * rows.shape[1]
    return hash_of_each(content[start : start + width] for start in range(0, len(content), width))
