"""Reading pickled numpy arrays without running anything that the pickle asks for.

A pickle is a program. Here each name that it may call is bound to an inert stand-in of ours: nothing is imported, and
numpy itself never sees shapes or types that were not checked (its own ``__setstate__`` trusts them).
"""

from __future__ import annotations

import io
import itertools
import pickle
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from vilu.errors import DataError

MAX_BYTES: Final = 256 * 2**20
"""Larger pickles are refused; the largest of CIFAR has 155 MB."""


MAX_TUPLES: Final = 64
"""More that are no arguments of a call are refused: hashing one in the other, Python would run out of stack."""

TUPLES: Final = frozenset({"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "FROZENSET"})
MEMO: Final = frozenset({"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"})


class PickledArray:
    """Stands for a numpy array: keeps the state that would have been restored."""

    def __init__(self) -> None:
        self.state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state

    def as_bytes(self, width: int) -> NDArray[np.uint8]:
        """The array, if it is (n, width) uint8 with n at least 1.

        Raises:
            ValueError: If it is anything else.
        """
        state = self.state[-4:] if isinstance(self.state, tuple) else None
        match state:  # numpy's (version, shape, dtype, whether in Fortran order, raw bytes)
            case ((int(n), int(columns)), PickledType("u1" | "uint8" | "B"), bool(fortran), bytes() | str() as raw):
                content = raw.encode("latin-1") if isinstance(raw, str) else raw  # str: written by Python 2
                if n > 0 and columns == width and len(content) == n * width:
                    return np.frombuffer(content, dtype=np.uint8).reshape((n, width), order="F" if fortran else "C")
        raise ValueError(f"an array of shape (n, {width}) and type uint8 was expected")


class PickledType:
    """Stands for a numpy dtype: keeps its code."""

    __match_args__ = ("code",)

    def __init__(self, code: object, *_flags: object) -> None:
        self.code = code

    def __setstate__(self, state: object) -> None:
        """Byte order and alignment, which bytes do not have."""


def _reconstruct(*_arguments: object) -> PickledArray:
    return PickledArray()


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"encoding {encoding!r} is not allowed")
    return text.encode("latin-1")


_ALLOWED: Final[dict[tuple[str, str], Callable[..., Any]]] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): PickledArray,
    ("numpy", "dtype"): PickledType,
    ("_codecs", "encode"): _encode,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no array needs")
        return _ALLOWED[module, name]


def _require_shallow(content: bytes) -> None:
    """Refuse tuples that could be nested without end; an array and its labels have a handful.

    Raises:
        ValueError: If there are too many, or the opcodes make no sense.
    """
    steps = (opcode.name for opcode, _, _ in pickletools.genops(content) if opcode.name not in MEMO)
    kept = sum(name in TUPLES and following != "REDUCE" for name, following in itertools.pairwise(steps))
    if kept > MAX_TUPLES:
        raise ValueError(f"it holds {kept} tuples, and an array needs no more than {MAX_TUPLES}")


def read_pickle(file: Path) -> dict[str, object]:
    """The dictionary in a pickle of built-in types and ``PickledArray``; keys of bytes become text.

    Raises:
        DataError: If the file is too large, damaged, no dictionary, or names anything but the parts of an array.
    """
    try:
        if file.stat().st_size > MAX_BYTES:
            raise DataError(f"{file} is too large: at most {MAX_BYTES} bytes of pickle are read.")
        raw = file.read_bytes()
        _require_shallow(raw)
        content = _Unpickler(io.BytesIO(raw), encoding="latin1").load()
    except (
        pickle.UnpicklingError,  # refused names, opcodes out of place
        OSError,  # the file cannot be read
        EOFError,  # cut short
        ValueError,  # opcodes with impossible arguments
        TypeError,  # calls of a stand-in with other arguments than numpy writes
        LookupError,  # a memo or mark that is not there
        AttributeError,  # state for an object that takes none
        OverflowError,  # sizes beyond the machine's
        MemoryError,  # sizes beyond its memory
    ) as error:
        raise DataError(
            f"{file} was refused: {error}. Only pickled arrays are read; unpack the archive again."
        ) from error
    if not isinstance(content, dict):
        raise DataError(f"{file} must hold a dictionary. Found {type(content).__name__}. Unpack the archive again.")
    return {key.decode("latin-1") if isinstance(key, bytes) else str(key): value for key, value in content.items()}
