"""Read the arrays in an ``.npz`` file, or in a folder with ``.npy`` files, in blocks of rows.

The files are not trusted, so headers, sizes and texts are checked before use.
"""

from __future__ import annotations

import lzma
import math
import os
import stat
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from hashlib import blake2b
from io import BytesIO
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray

from vilu.artifacts.disk import convert_os_errors
from vilu.datasets.files import size_and_time
from vilu.errors import DataError, UsageError
from vilu.store.unreadable import NPY_READING_ERRORS, convert_damage_errors

NPZ_READING_ERRORS = (
    *NPY_READING_ERRORS,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    RuntimeError,
)
"""Exceptions from reading a damaged zip file, or an array in a damaged zip file.

``zipfile`` raises RuntimeError if the content is encrypted.
"""

BLOCK_BYTES = 2**24  # number of bytes read at a time: 16 MiB

TEXT_SUFFIXES = frozenset({".txt", ".csv"})
"""Name endings of text files. A text file has an entry per line and no header."""

# Limits against zip bombs: small files that decompress to very many bytes. An array with at most
# ``SMALL_ARRAY_BYTES`` bytes is always accepted. A larger array is refused if it has more than
# ``MAX_COMPRESSION_RATIO`` times as many bytes as the compressed array. Embeddings are accepted,
# because compression hardly makes embeddings smaller.
SMALL_ARRAY_BYTES = 2**28  # 256 MiB
MAX_COMPRESSION_RATIO = 100

# The Unicode codes from the first to the last surrogate are no characters.
FIRST_SURROGATE = 0xD800
LAST_SURROGATE = 0xDFFF
MAX_NAME_CHARACTERS = 2**16  # maximum number of characters in a name
# the dtype kinds that ``array_to_texts`` accepts: whole numbers (i, u), texts (U) and bytes (S)
TEXT_KINDS = "iuUS"


class StoredArray:
    """An array in the format ``.npy``, in a file or in a zip file.

    Opening reads only the header. Rows are read on demand.

    Args:
        location: The array's name in messages: the file name, and for a zip file also the array's
            name in the zip file.
        handle: The open file, at the beginning of the header.
        n_bytes: Number of bytes in header and content together, uncompressed.
        block_bytes: Number of bytes read at a time.
    """

    def __init__(
        self, location: str, handle: IO[bytes], n_bytes: int, block_bytes: int = BLOCK_BYTES
    ) -> None:
        self.location = location
        self.block_bytes = block_bytes
        self._handle = handle
        with convert_reading_errors(location):
            version = np.lib.format.read_magic(handle)
            if version not in HEADER_READERS:
                raise DataError(
                    f"{location} is of version {version} of the format .npy. Save it with "
                    "numpy.save."
                )
            self.shape, self._is_fortran_order, self.dtype = HEADER_READERS[version](handle)
            self._content_start = handle.tell()
        if self.dtype.hasobject:
            raise DataError(
                f"{location} holds Python objects. Only pickle could read them, and pickle can run "
                "code from a file. Save numbers, or texts as numpy.array(names, dtype=str)."
            )
        self._require_content(n_bytes - self._content_start)

    def _require_content(self, n_content_bytes: int) -> None:
        """Raise DataError if the header is invalid, or does not match the content's size.

        ``n_content_bytes`` is the number of bytes after the header.
        """
        has_valid_shape = min(self.shape, default=0) >= 0  # no dimension may be negative
        has_valid_type = self.dtype.itemsize > 0
        has_right_size = self.n_bytes == n_content_bytes
        if has_valid_shape and has_valid_type and has_right_size:
            return
        raise DataError(
            f"{self.location} is damaged: its header says {self.dtype} of shape {self.shape}, and "
            f"{n_content_bytes} bytes follow it. Write it again."
        )

    def __len__(self) -> int:
        return self.shape[0] if self.shape else 0

    @property
    def n_bytes(self) -> int:
        """The content's size in bytes, without the header."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def _bytes_per_row(self) -> int:
        """Size of a row in bytes."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def require_c_order(self) -> None:
        """Raise DataError if the rows are not stored one after the other (C order)."""
        is_vector = len(self.shape) <= 1  # a vector is the same in Fortran order and in C order
        if self._is_fortran_order and not is_vector:
            raise DataError(
                f"{self.location} is in Fortran order, so its rows cannot be read one by one. Save "
                "it in C order, as numpy.save does of numpy.ascontiguousarray(array)."
            )

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Return the rows ``start`` to ``stop - 1``.

        The array must be in C order. Call ``require_c_order`` before.
        """
        n_rows = stop - start
        content = self._read_content(
            start=start * self._bytes_per_row, n_bytes=n_rows * self._bytes_per_row
        )
        return np.frombuffer(content, self.dtype).reshape(n_rows, *self.shape[1:])

    def blocks(self) -> Iterator[NDArray[Any]]:
        """Yield all rows in blocks of about ``block_bytes`` bytes. The array must be in C order."""
        bytes_per_row = max(self._bytes_per_row, 1)  # a row without entries has 0 bytes
        block_rows = max(self.block_bytes // bytes_per_row, 1)
        for start in range(0, len(self), block_rows):
            stop = min(start + block_rows, len(self))
            yield self.read(start, stop)

    def read_whole(self) -> NDArray[Any]:
        """Read and return the whole array, in C or Fortran order."""
        content = self._read_content(start=0, n_bytes=self.n_bytes)
        flat_values = np.frombuffer(content, self.dtype)
        order: Literal["C", "F"] = "F" if self._is_fortran_order else "C"
        return flat_values.reshape(self.shape, order=order)

    def hash(self, advance: Callable[[int], object]) -> str:
        """Return a hash of the array's type, shape and content.

        After each block, ``advance`` is called with the number of bytes in the block.
        """
        header = repr((self.dtype.str, self.shape, self._is_fortran_order)).encode()
        running_hash = blake2b(header, digest_size=16)
        for start in range(0, self.n_bytes, self.block_bytes):
            n_bytes_left = self.n_bytes - start
            block = self._read_content(start=start, n_bytes=min(self.block_bytes, n_bytes_left))
            running_hash.update(block)
            advance(len(block))
        with convert_reading_errors(self.location):
            # No byte may follow the content. In a zip file, ``zipfile`` verifies the array's
            # checksum when this read reaches the end of the array.
            if self._handle.read(1):
                raise DataError(
                    f"{self.location} has more bytes than its header says. Write it again."
                )
        return running_hash.hexdigest()

    def _read_content(self, start: int, n_bytes: int) -> bytearray:
        """Return ``n_bytes`` bytes of the content from ``start`` on.

        The header may state a wrong size. Therefore no memory is allocated in advance, and
        ``content`` grows with every block.
        """
        content = bytearray()
        position_in_file = self._content_start + start
        with convert_reading_errors(self.location):
            if self._handle.tell() != position_in_file:
                self._handle.seek(position_in_file)
            while len(content) < n_bytes:
                n_bytes_left = n_bytes - len(content)
                block = self._handle.read(min(self.block_bytes, n_bytes_left))
                if not block:
                    raise DataError(
                        f"{self.location} ends after {start + len(content)} bytes. Write it again."
                    )
                content += block
        return content


HeaderFacts = tuple[tuple[int, ...], bool, np.dtype[Any]]
"""What a header states: the shape, whether the array is in Fortran order, and the dtype."""

HEADER_READERS: Mapping[tuple[int, int], Callable[[IO[bytes]], HeaderFacts]] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
"""Maps the ``.npy`` format version to the function for reading the header."""


def convert_reading_errors(location: str) -> AbstractContextManager[None]:
    """Return a context manager that converts a damaged file's exceptions into a DataError.

    The DataError's message names the array's ``location``.
    """
    return convert_damage_errors(
        location,
        hint="Write it again with numpy.save.",
        exceptions=NPZ_READING_ERRORS,
        error_class=DataError,
        condition="damaged, or no array",
    )


class ArrayFiles(ExitStack):
    """The arrays in a file or a folder, by name.

    Use ``ArrayFiles`` as a context manager. At the end of the ``with`` block, all files are closed.

    Args:
        path: The file or folder. None: all arrays are in ``files``.
        files: Maps names of further arrays to files. A file is an ``.npy`` file, or a text file
            with an entry per line. These arrays replace arrays with the same names in ``path``.
        block_bytes: Number of bytes read at a time.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        files: Mapping[str, str | os.PathLike[str]] | None = None,
        *,
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        super().__init__()
        self.block_bytes = block_bytes
        # array name -> the array's own file, or the array's entry in the zip file
        self._member_of_array: dict[str, Path | zipfile.ZipInfo] = {}
        self._zip: zipfile.ZipFile | None = None
        # opened file -> the file's size and modification time when it was opened
        self._state_of_file: dict[Path, tuple[int, int] | None] = {}
        path_of_name = {name: Path(file) for name, file in (files or {}).items()}
        if path is None and not path_of_name:
            raise UsageError("there are no arrays: give a source, or files of arrays.")
        if path is None:
            self.path = next(iter(path_of_name.values()))  # messages name the first of ``files``
        else:
            self.path = Path(path)
            with convert_reading_errors(str(path)):
                self._open_source()
        # arrays in ``files`` replace arrays in the source with the same names
        self._member_of_array.update(path_of_name)

    def _open_source(self) -> None:
        """Find the arrays in the folder or zip file. Leave the zip file open."""
        if self.path.is_dir():
            self._member_of_array = _find_files(self.path)
            return
        self._state_of_file[self.path] = size_and_time(self.path)
        self._member_of_array = _find_members(self.path)
        self._zip = self.enter_context(zipfile.ZipFile(self.path))

    @property
    def names(self) -> list[str]:
        """The array names."""
        return list(self._member_of_array)

    def open(self, name: str) -> StoredArray:
        """Open an array. Read and check the array's header."""
        member = self._member_of_array[name]
        if isinstance(member, Path):
            return self._open_file(member, str(member))
        return self._open_member(member, f"{self.path}, array {name!r}")

    def _open_file(self, file: Path, location: str) -> StoredArray:
        with convert_os_errors(f"cannot read {file}"):
            is_file = file.is_file()
        if not is_file:
            raise UsageError(f"{file} is no file. Give an .npy file, or a text file.")
        self._state_of_file[file] = size_and_time(file)
        if file.suffix in TEXT_SUFFIXES:
            content = _lines_to_npy(file)
            return StoredArray(location, BytesIO(content), len(content), self.block_bytes)
        with convert_reading_errors(location):
            handle = self.enter_context(file.open("rb"))
            n_bytes = file.stat().st_size
            return StoredArray(location, handle, n_bytes, self.block_bytes)

    def _open_member(self, member: zipfile.ZipInfo, location: str) -> StoredArray:
        is_encrypted = member.flag_bits & 1  # the lowest bit marks an encrypted entry
        # ``_zip`` is never None if there are members. The type checker needs the comparison.
        if self._zip is None or is_encrypted:
            raise DataError(f"{location} is encrypted. Write it again without a password.")
        with convert_reading_errors(location):
            handle = self.enter_context(self._zip.open(member))
            return StoredArray(location, handle, member.file_size, self.block_bytes)

    def require_unchanged(self) -> None:
        """Raise DataError if a file has changed since it was opened."""
        for path, state in self._state_of_file.items():
            if size_and_time(path) != state:
                raise DataError(
                    f"{path} changed while it was read. When nothing writes to it any more, give "
                    "another output folder, or --overwrite to replace this one."
                )

    def refuse_zip_bomb(self, name: str) -> None:
        """Raise DataError if an array decompresses to far too many bytes."""
        member = self._member_of_array[name]
        if isinstance(member, Path):  # the array is not compressed
            return
        max_bytes = max(SMALL_ARRAY_BYTES, MAX_COMPRESSION_RATIO * member.compress_size)
        if member.file_size > max_bytes:
            raise DataError(
                f"{self.path}, array {name!r}: {member.compress_size:,} compressed bytes would "
                f"become {member.file_size:,} bytes. Embeddings never compress so well, so the "
                "array is not read."
            )


def _lines_to_npy(file: Path) -> bytes:
    """Convert a text file to a ``.npy`` file's content. Each line becomes an entry.

    Empty lines at the end of the text file are left out.
    """
    with convert_damage_errors(
        file,
        hint="Save it as UTF-8, with an entry per line.",
        exceptions=NPZ_READING_ERRORS,
        error_class=DataError,
        condition="no text",
    ):
        text = file.read_text(encoding="utf-8-sig").rstrip("\n")
        lines = text.split("\n") if text else []  # "".split("\n") would give an empty line
        entries = np.array(lines, dtype=np.str_)
    buffer = BytesIO()
    np.save(buffer, entries, allow_pickle=False)
    return buffer.getvalue()


def _find_files(folder: Path) -> dict[str, Path | zipfile.ZipInfo]:
    """Map each array name in a folder to the ``.npy`` file."""
    file_of_array: dict[str, Path | zipfile.ZipInfo] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix != ".npy" or path.name.startswith("."):
            continue
        # refuse a pipe or a device, because reading it may never end
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            raise DataError(f"{path} is no file.")
        file_of_array[path.stem] = path
    if not file_of_array:
        raise DataError(
            f"{folder} holds no .npy file. Give a folder with image.npy, text.npy, ..., or an .npz "
            "file."
        )
    return file_of_array


def _find_members(path: Path) -> dict[str, Path | zipfile.ZipInfo]:
    """Map each array name in an ``.npz`` file to the zip entry."""
    if not path.is_file():
        raise UsageError(
            f"{path} is no file and no folder. Give an .npz file, or a folder of .npy files."
        )
    # Open the file here, so that a file that cannot be opened raises an OSError.
    # ``zipfile.is_zipfile(path)`` would return False instead.
    with path.open("rb") as handle:
        is_zip_file = zipfile.is_zipfile(handle)
    if not is_zip_file:
        raise DataError(
            f"{path} is no .npz file. Give one that numpy.savez wrote, or a folder of .npy files."
        )
    member_of_array: dict[str, Path | zipfile.ZipInfo] = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            if name in member_of_array:
                raise DataError(f"{path} has array {name!r} twice. Write it again.")
            member_of_array[name] = member
    return member_of_array


def array_to_texts(values: NDArray[Any], location: str) -> list[str]:
    """Convert an array of texts, UTF-8 bytes or whole numbers to a list of texts.

    Raises:
        DataError: If the array holds anything else. The message begins with ``location``, the
            array's name.
    """
    if values.dtype.kind not in TEXT_KINDS:
        raise DataError(
            f"{location} must hold texts, as numpy.array(names, dtype=str). Got dtype "
            f"{values.dtype} instead."
        )
    if values.dtype.kind == "U":
        _require_characters(values, location)
    texts: list[str] = []
    with convert_reading_errors(location):
        for value in values.tolist():
            texts.append(value.decode() if isinstance(value, bytes) else str(value))
    return texts


def _require_characters(values: NDArray[Any], location: str) -> None:
    """Raise DataError if an array of texts holds a code that is no character.

    NumPy accepts any code. But UTF-8 cannot encode a surrogate, and no Python string can hold a
    code above ``sys.maxunicode``.
    """
    # NumPy stores every character as a code with 32 bits, in the array's byte order
    code_type = np.dtype("u4").newbyteorder(values.dtype.byteorder)
    codes = np.frombuffer(values.tobytes(), code_type)
    is_surrogate = (codes >= FIRST_SURROGATE) & (codes <= LAST_SURROGATE)
    is_too_large = codes > sys.maxunicode
    wrong_codes = codes[is_surrogate | is_too_large]
    if len(wrong_codes):
        raise DataError(
            f"{location} must hold text: {wrong_codes[0]:#x} is no character. Write it again."
        )
