"""The directory structure that TIFF files and EXIF blocks share, read without Pillow.

Pillow's parser warns of damage, and a warning is an error or not by filters that all threads share; and its count of
pages is quadratic and has no limit.
"""

from __future__ import annotations

import struct
from typing import Final

ORIENTATION: Final = 0x0112
_INTEGERS: Final = {1: "B", 3: "H", 4: "I"}  # type codes BYTE, SHORT, LONG; the norm says SHORT, cameras write others
BYTE_ORDER: Final = {b"II*\0": "<", b"MM\0*": ">", b"II+\0": "<", b"MM\0+": ">"}


def orientation(block: bytes) -> int | None:
    """The orientation, 1 to 8, of a TIFF file or an EXIF block (EXIF 3.0, tag 0x0112); None where there is none.

    Raises:
        ValueError: If the block is damaged.
    """
    block = block.removeprefix(b"Exif\0\0")
    try:
        order, count, entry, pointer = _layout(block)
        (offset,) = struct.unpack_from(order + pointer, block, 8 if pointer == "Q" else 4)
        (entries,) = struct.unpack_from(order + count, block, offset)
        for position in range(offset + struct.calcsize(count), len(block), entry)[:entries]:
            tag, kind = struct.unpack_from(order + "HH", block, position)
            if tag == ORIENTATION:
                (value,) = struct.unpack_from(order + _INTEGERS[kind], block, position + 4 + struct.calcsize(pointer))
                break
        else:
            return None
    except (struct.error, KeyError, OverflowError) as error:
        raise ValueError(f"damaged EXIF block: {error!r}") from error
    if not 0 <= value <= 8:
        raise ValueError(f"EXIF orientation must be 1 to 8. Got {value} instead.")
    return int(value) or None  # 0 is written for "unknown"


def count_directories(data: bytes, limit: int) -> int:
    """Number of pages of a TIFF file; counting stops at ``limit``, at a loop, and where the chain leaves the file."""
    seen: set[int] = set()
    try:
        order, count, entry, pointer = _layout(data)
        (offset,) = struct.unpack_from(order + pointer, data, 8 if pointer == "Q" else 4)
        while offset and offset not in seen and len(seen) < limit:
            (entries,) = struct.unpack_from(order + count, data, offset)
            seen.add(offset)
            (offset,) = struct.unpack_from(order + pointer, data, offset + struct.calcsize(count) + entries * entry)
    except (struct.error, OverflowError):
        return len(seen)
    return len(seen)


def _layout(block: bytes) -> tuple[str, str, int, str]:
    """Byte order, code of the entry count, bytes per entry, code of an offset; classic TIFF or BigTIFF."""
    order = BYTE_ORDER[block[:4]]
    return (order, "Q", 20, "Q") if b"+" in block[:4] else (order, "H", 12, "I")
