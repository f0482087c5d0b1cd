"""Captions: from untrusted bytes to text, by one rule for files in tars and for columns of tables."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator
from functools import partial
from itertools import repeat
from typing import TYPE_CHECKING, Final

from vilu.datasets.base import ImageRecord
from vilu.datasets.images import BadImage

if TYPE_CHECKING:
    import pyarrow as pa

MAX_CAPTION_BYTES: Final = 2**20
"""Longer captions are refused; the longest text that a model reads is a few hundred bytes."""

INVISIBLE: Final = frozenset({"Cc", "Cf", "Zs", "Zl", "Zp"})
"""Unicode categories of controls, marks without a shape, and blanks. Not Cn: signs newer than this Python's tables."""


def read_caption(record: ImageRecord) -> str:
    """The caption of a record."""
    try:
        return decode_caption(None) if record.caption is None else record.caption()
    except OSError as error:
        raise BadImage("text", "read_error", f"cannot read the caption: {error}") from error


def decode_caption(data: bytes | None) -> str:
    r"""Text of a caption without outer white space; otherwise as written (no Unicode normalisation).

    A byte order mark at the beginning is no part of the text.

    Raises:
        BadImage: Stage "text"; kind "missing_caption" (None), "too_large" (more than ``MAX_CAPTION_BYTES``), "bad_text"
            (not UTF-8) or "empty_text" (nothing in it can be seen).

    Example:
        >>> decode_caption(b"  a red fox\n")
        'a red fox'
    """
    if data is None:
        raise BadImage("text", "missing_caption", "the image has no caption")
    if len(data) > MAX_CAPTION_BYTES:
        raise BadImage("text", "too_large", f"a caption of {len(data)} bytes; at most {MAX_CAPTION_BYTES} are read")
    try:
        text = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise BadImage(
            "text", "bad_text", f"the caption must be UTF-8: {error.reason} at byte {error.start}"
        ) from error
    if all(unicodedata.category(character) in INVISIBLE for character in text):
        raise BadImage("text", "empty_text", "the caption is blank")
    return text


def caption_readers(captions: pa.Array | None, start: int, stop: int) -> Iterator[Callable[[], str] | None]:
    """``ImageRecord.caption`` of rows start ... stop - 1 of a column of bytes; None for each where there is none."""
    if captions is None:
        return repeat(None, max(stop - start, 0))
    return (partial(_read_cell, cell) for cell in captions[start:stop])


def _read_cell(cell: pa.Scalar) -> str:
    return decode_caption(cell.as_py())
