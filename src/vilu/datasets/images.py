"""Encoded images and captions, hostile until decoded: formats, sizes, orientation, pixels, text."""

from __future__ import annotations

import errno
import struct
import unicodedata
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import IntFlag
from functools import partial
from importlib import resources
from io import BytesIO
from itertools import repeat
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

import numpy as np
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from vilu.artifacts.tables import parse_csv
from vilu.datasets.base import ImageRecord
from vilu.datasets.files import MAX_FILE_BYTES
from vilu.errors import DataError, UsageError

if TYPE_CHECKING:
    import pyarrow as pa

ORIENTATION: Final = 0x0112
# type codes BYTE, SHORT, LONG; the norm says SHORT, cameras write others
_INTEGERS: Final = {1: "B", 3: "H", 4: "I"}
BYTE_ORDER: Final = {b"II*\0": "<", b"MM\0*": ">", b"II+\0": "<", b"MM\0+": ">"}


def orientation(block: bytes) -> int | None:
    """The orientation of a TIFF file or EXIF block (EXIF 3.0, tag 0x0112), 1 to 8, or None.

    Raises:
        ValueError: If the block is damaged.
    """
    block = block.removeprefix(b"Exif\0\0")
    try:
        value = _orientation_tag(block)
    except (struct.error, KeyError, OverflowError) as error:
        raise ValueError(f"damaged EXIF block: {error!r}") from error
    if value is None:
        return None
    if not 0 <= value <= 8:
        raise ValueError(f"EXIF orientation must be 1 to 8. Got {value} instead.")
    return value or None  # 0 is written for "unknown"


def _orientation_tag(block: bytes) -> int | None:
    """The number under the orientation tag of the first directory; None where it has none."""
    layout = _layout(block)
    directory = layout.read(layout.offset_code, block, layout.first_offset)
    n_entries = layout.read(layout.count_code, block, directory)
    begin = directory + struct.calcsize(layout.count_code)
    # a hostile count may promise more entries than the block has room for
    for entry in range(begin, len(block), layout.entry_bytes)[:n_entries]:
        tag, kind = struct.unpack_from(layout.order + "HH", block, entry)
        if tag == ORIENTATION:
            # tag and type take four bytes, then comes the number of values, as wide as an offset
            value_at = entry + 4 + struct.calcsize(layout.offset_code)
            return layout.read(_INTEGERS[kind], block, value_at)
    return None


def count_directories(data: bytes, limit: int) -> int:
    """Number of pages of a TIFF file.

    Counting stops at ``limit``, at a loop, and where the chain leaves the file.
    """
    seen: set[int] = set()
    with suppress(struct.error, OverflowError):
        layout = _layout(data)
        directory = layout.read(layout.offset_code, data, layout.first_offset)
        while directory and directory not in seen and len(seen) < limit:
            n_entries = layout.read(layout.count_code, data, directory)
            seen.add(directory)
            # the offset of the next directory stands behind the entries of this one
            first_entry = directory + struct.calcsize(layout.count_code)
            next_at = first_entry + n_entries * layout.entry_bytes
            directory = layout.read(layout.offset_code, data, next_at)
    return len(seen)


class _Layout(NamedTuple):
    """How numbers stand in a TIFF file, with codes of ``struct``."""

    order: str  # byte order
    count_code: str  # of the number of entries of a directory
    offset_code: str  # of a place in the file
    entry_bytes: int
    first_offset: int  # where the place of the first directory stands

    def read(self, code: str, block: bytes, place: int) -> int:
        """The number of this code at a place."""
        (number,) = struct.unpack_from(self.order + code, block, place)
        return int(number)


def _layout(block: bytes) -> _Layout:
    """The layout of classic TIFF or, with a plus sign in its first bytes, of BigTIFF."""
    order = BYTE_ORDER[block[:4]]
    if b"+" in block[:4]:
        return _Layout(order, count_code="Q", offset_code="Q", entry_bytes=20, first_offset=8)
    return _Layout(order, count_code="H", offset_code="I", entry_bytes=12, first_offset=4)


class _JpegFile(JpegImagePlugin.JpegImageFile):
    """A JPEG whose EXIF block is left alone on opening, where a damaged one would warn."""

    def _read_dpi_from_exif(self) -> None:
        """The resolution in print, which nothing here needs."""


OPENERS: dict[str, Callable[[BytesIO], ImageFile.ImageFile]] = {
    "JPEG": _JpegFile,
    "PNG": PngImagePlugin.PngImageFile,
    "WebP": WebPImagePlugin.WebPImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "PPM": PpmImagePlugin.PpmImageFile,
}
"""The formats that are decoded."""

MAX_FRAMES = 10_000  # counting stops here: a hostile file can hold millions of empty frames
_TABLE = (
    resources.files("vilu").joinpath("assets", "image_signatures.csv").read_text(encoding="utf-8")
)
_SIGNATURES = [
    (int(row["offset"]), bytes.fromhex(row["bytes"]), row["format"])
    for row in parse_csv(_TABLE.splitlines(), "image_signatures.csv")[1]
]
"""Where in a file which bytes stand, by format."""


def sniff(data: bytes) -> str | None:
    """Name of the format: a key of ``OPENERS``, or one that is not decoded.

    None if the data look like no image.
    """
    for offset, magic, name in _SIGNATURES:
        if data.startswith(magic, offset):
            return name
    if _looks_like_svg(data):
        return "SVG"
    return None


def _looks_like_svg(data: bytes) -> bool:
    """Whether the text begins with an SVG element; a heading of XML or a comment may precede it."""
    head = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n")
    if head.startswith((b"<?xml", b"<!--")):
        return b"<svg" in head
    return head.startswith(b"<svg")


def count_frames(name: str, data: bytes, image: ImageFile.ImageFile) -> int:
    """Number of frames, at most ``MAX_FRAMES``, without decoding any.

    GIF and TIFF are counted here: Pillow's count is quadratic in the frames of a TIFF and has no
    limit.
    """
    if name == "GIF":
        return _count_gif_frames(data)
    if name == "TIFF":
        return max(count_directories(data, MAX_FRAMES), 1)
    return min(getattr(image, "n_frames", 1), MAX_FRAMES)


GIF_IMAGE: Final = 0x2C  # first byte of a frame
GIF_EXTENSION: Final = 0x21  # first byte of a block that is no frame
GIF_BLOCKS: Final = frozenset({GIF_IMAGE, GIF_EXTENSION})


def _count_gif_frames(data: bytes) -> int:
    frames = 0
    with suppress(IndexError):  # no trailer: what came before it counts
        position = 13 + _colour_table_bytes(data[10])
        while frames < MAX_FRAMES and data[position] in GIF_BLOCKS:
            if data[position] == GIF_IMAGE:
                frames += 1
                position += 11 + _colour_table_bytes(data[position + 9])
            else:
                position += 2
            # the data follow in chunks, each behind its length; a length of zero ends them
            while data[position]:
                position += data[position] + 1
            position += 1
    return max(frames, 1)


def _colour_table_bytes(flags: int) -> int:
    """Bytes of the colour table that the flags of a GIF announce: 2^(n + 1) colours of three."""
    has_table = flags & 0x80
    if not has_table:
        return 0
    return 3 << (flags & 7) + 1


DEEP_MODES: Final = frozenset({"I;16", "I;16L", "I;16B", "I;16N", "I", "F"})
MODES: Final = DEEP_MODES | {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"}
"""The modes that are converted."""


class ImageFlag(IntFlag):
    """What was done to an image, or noticed; stored as a bit mask."""

    ANIMATED = 1  # more than one frame; the first was taken
    ALPHA = 2  # transparency composited on white
    DEEP = 4  # more than 8 bits a channel, scaled down
    STRETCHED = 8  # values of no known range: the lowest to black, the highest to white
    BAD_EXIF = 16  # EXIF present and unreadable


def to_rgb(image: Image.Image) -> tuple[Image.Image, ImageFlag]:
    """RGB pixels of a loaded image of one of ``MODES``, and what was done to them.

    It raises what is in ``CORRUPT``.
    """
    if image.mode in DEEP_MODES:
        gray, flags = _deep_to_gray(image)
        return gray.convert("RGB"), flags
    if image.has_transparency_data:
        pixels = image.convert("RGBA")
        white = Image.new("RGBA", pixels.size, "white")
        composite = Image.alpha_composite(white, pixels)
        return composite.convert("RGB"), ImageFlag.ALPHA
    return image.convert("RGB"), ImageFlag(0)


def _deep_to_gray(image: Image.Image) -> tuple[Image.Image, ImageFlag]:
    """8-bit grey of whole numbers 0 ... 65535 (value / 257, rounded) or of floats 0 ... 1.

    Other ranges are stretched. Pillow's own conversion saturates: nearly all of a 16-bit photo
    turns white.
    """
    # before it is copied, a TIFF gives the size that it would have when turned
    values = np.asarray(image.copy())
    low = float(values.min())
    high = float(values.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError("pixel values that are not finite")
    black = 0.0
    span = 65535.0
    if values.dtype.kind == "f":
        span = 1.0
    flags = ImageFlag.DEEP
    if low < 0 or high > span:
        black = low
        span = high - low or 1.0  # an image of one value has no range
        flags |= ImageFlag.STRETCHED
    scaled = np.subtract(values, black, dtype=np.float64)
    scaled *= 255 / span
    grey = np.rint(scaled, out=scaled).astype(np.uint8)
    return Image.fromarray(grey), flags


Stage = Literal["open", "decode", "geometry", "text"]
OfPicture = Literal[
    "empty", "unidentified", "unsupported", "truncated", "decode_error", "bomb", "bad_geometry"
]
OfFile = Literal["too_large", "read_error", "not_a_file", "bad_path"]
OfShard = Literal["truncated_shard", "bad_shard"]
"""One record that stands for all that a shard has lost, however much that is."""
OfSample = Literal["interleaved", "duplicate", "missing_image"]
OfText = Literal["missing_caption", "bad_text", "empty_text", "bad_label"]
Kind = OfPicture | OfFile | OfShard | OfSample | OfText

CORRUPT: Final = (
    OSError,  # data cut short, a codec's error, a header field that makes no sense
    # how Pillow's parsers say "not this format after all", also in the middle of a file
    SyntaxError,
    # values out of range: tile outside the image, oversized text chunk, unknown conversion
    ValueError,
    EOFError,  # a header without a first frame
    struct.error,  # a field that the file is too short for
    zlib.error,  # compressed profiles and text
    LookupError,  # IndexError, KeyError: tables indexed by what the file says
    TypeError,  # a TIFF tag of another type or count than its meaning needs
    AttributeError,  # the same, where a tag is taken for text
    ArithmeticError,  # OverflowError, ZeroDivisionError: rationals and sizes of a hostile header
    MemoryError,  # a codec asked for what the header promised
    AssertionError,  # Pillow states its own expectations of a file in this way
    Warning,  # raised under `-W error` only: Pillow warns of damaged TIFF tags
)
"""What Pillow raises on damaged files.

Of 200,000 mutated files all that failed did so with the first three or the last (Pillow 13); its
source lets the others through in one version or another.
"""


class BadImage(DataError):  # noqa: N818  the name of a kind of input, as the error table calls it
    """An image that cannot be used; one row of the error table, never the end of a run.

    It failed in a stage: "open" (bytes and header), "geometry" (size), "decode" (pixels), "text"
    (caption, label). The kind says what was wrong, for counting.
    """

    def __init__(self, stage: Stage, kind: Kind, message: str) -> None:
        super().__init__(message)
        self.stage: Stage = stage
        self.kind: Kind = kind

    def __reduce__(self) -> tuple[type[BadImage], tuple[Stage, Kind, str]]:
        """For the way back from a worker process."""
        return BadImage, (self.stage, self.kind, str(self))


@dataclass(frozen=True)
class ImageLimits:
    """What is refused before any pixel is decoded.

    Attributes:
        max_pixels: Largest width x height; at most Pillow's own limit, so that this one always
            speaks first.
        min_side: Shortest side in pixels.
        max_aspect: Largest ratio of the sides: resizing the short side of a 1 x 5000 picture of 99
            bytes to 224 makes one of 1 GB.
        max_bytes: Largest encoded size.
    """

    max_pixels: int = 50_000_000
    min_side: int = 8
    max_aspect: float = 20.0
    max_bytes: int = MAX_FILE_BYTES

    def __post_init__(self) -> None:
        _require_limit("max_pixels", self.max_pixels, 89_478_485)
        _require_limit("max_bytes", self.max_bytes, MAX_FILE_BYTES)
        if self.min_side < 1 or self.max_aspect < 1:
            raise UsageError(
                f"min_side and max_aspect must be at least 1. Got {self.min_side} and "
                f"{self.max_aspect} instead."
            )


def _require_limit(name: str, limit: int, ceiling: int) -> None:
    if not 1 <= limit <= ceiling:
        raise UsageError(f"{name} must be from 1 to {ceiling}. Got {limit} instead.")


@dataclass(frozen=True)
class DecodedImage:
    """A picture and what is worth recording about its file."""

    # RGB pixels of the first frame, as stored (EXIF orientation is not applied: CLIP's
    # preprocessing doesn't)
    image: Image.Image
    width: int  # width in the file
    height: int  # height in the file
    n_frames: int  # number of frames (counting stops at ``MAX_FRAMES``)
    # the EXIF (or TIFF) orientation tag, 1 to 8; None where there is none
    exif_orientation: int | None
    flags: ImageFlag  # what was done to the pixels, or noticed


DEFAULT_LIMITS: Final = ImageLimits()


def read_image(record: ImageRecord, limits: ImageLimits = DEFAULT_LIMITS) -> DecodedImage:
    """Read and decode one record."""
    try:
        data = record.read()
    except OSError as error:
        kind: Kind = "read_error"
        if error.errno == errno.EFBIG:
            kind = "too_large"
        raise BadImage("open", kind, f"cannot read the file: {error}") from error
    return decode_image(data, limits)


def decode_image(data: bytes, limits: ImageLimits = DEFAULT_LIMITS) -> DecodedImage:
    """Decode the first frame of an encoded image to 8-bit RGB.

    Thread-safe; warning filters are left alone.

    Grey, palette, CMYK and YCbCr are converted; transparency is composited on white; 16-bit grey is
    divided by 257 (Pillow's own conversion saturates it); 32-bit integers and floats that fit no
    known range are stretched.

    Raises:
        BadImage: If the bytes are no image of an accepted format, break a limit, or are damaged.
        UsageError: If ``PIL.ImageFile.LOAD_TRUNCATED_IMAGES`` was switched on: half pictures would
            pass for whole ones.
    """
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise UsageError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is on, which hides damaged files. Switch it off."
        )
    name = _require_format(data, limits)
    with _damage("open", f"damaged {name} header"):
        file = OPENERS[name](BytesIO(data))
    with file as opened:
        _require_geometry(*opened.size, limits)
        with _damage("decode", "damaged pixels"):
            if name == "TIFF":  # Pillow would turn the pixels by the tag on loading
                opened.getexif().pop(ORIENTATION, None)
            opened.load()
        exif = opened.info.get("exif")
        if name == "TIFF":  # the file is its own EXIF block
            exif = data
        exif_orientation, flags = _orientation(exif)
        n_frames = count_frames(name, data, opened)
        if n_frames > 1:
            flags |= ImageFlag.ANIMATED
        if opened.mode not in MODES:
            raise BadImage("decode", "unsupported", f"pixel mode {opened.mode} is not converted")
        with _damage("decode", f"cannot convert {opened.mode} to RGB"):
            image, conversion = to_rgb(opened)
    return DecodedImage(
        image, image.width, image.height, n_frames, exif_orientation, flags | conversion
    )


def _require_format(data: bytes, limits: ImageLimits) -> str:
    if not data:
        raise BadImage("open", "empty", "the file has no bytes")
    if len(data) > limits.max_bytes:
        raise BadImage(
            "open", "too_large", f"{len(data)} bytes; at most {limits.max_bytes} are read"
        )
    name = sniff(data)
    if name is None:
        raise BadImage(
            "open", "unidentified", f"no image: {len(data)} bytes of no format that is known"
        )
    if name not in OPENERS:
        raise BadImage(
            "open",
            "unsupported",
            f"{name} is not decoded; convert it to one of {', '.join(OPENERS)}",
        )
    return name


@contextmanager
def _damage(stage: Stage, what: str) -> Iterator[None]:
    """What Pillow raises on a hostile file, as ``BadImage``."""
    try:
        yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImage(stage, "bomb", str(error)) from error
    except CORRUPT as error:
        kind: Kind = "decode_error"
        if "truncated" in str(error).lower():
            kind = "truncated"
        reason = f"{type(error).__name__}: {error}"[:200]
        raise BadImage(stage, kind, f"{what}: {reason}") from error


def _require_geometry(width: int, height: int, limits: ImageLimits) -> None:
    if width * height > limits.max_pixels:
        raise BadImage(
            "geometry",
            "bomb",
            f"{width} x {height} pixels; at most {limits.max_pixels} are decoded",
        )
    short, long = sorted((width, height))
    if short < limits.min_side or long > limits.max_aspect * short:
        raise BadImage(
            "geometry",
            "bad_geometry",
            f"{width} x {height} pixels; sides must be at least {limits.min_side} and of ratio "
            f"{limits.max_aspect:g}",
        )


def _orientation(exif: object) -> tuple[int | None, ImageFlag]:
    if not isinstance(exif, bytes):
        return None, ImageFlag(0)
    try:
        return orientation(exif), ImageFlag(0)
    except ValueError:  # metadata never fails a picture; the flag tells
        return None, ImageFlag.BAD_EXIF


MAX_CAPTION_BYTES: Final = 2**20
"""Longer captions are refused; the longest text that a model reads is a few hundred bytes."""

INVISIBLE: Final = frozenset({"Cc", "Cf", "Zs", "Zl", "Zp"})
"""Unicode categories of controls, marks without a shape, and blanks.

Not Cn: signs newer than this Python's tables.
"""


def read_caption(record: ImageRecord) -> str:
    """The caption of a record."""
    if record.caption is None:
        return decode_caption(None)
    try:
        return record.caption()
    except OSError as error:
        raise BadImage("text", "read_error", f"cannot read the caption: {error}") from error


def decode_caption(data: bytes | None) -> str:
    r"""Text of a caption without outer white space; else as written (no Unicode normalisation).

    A byte order mark at the beginning is no part of the text.

    Raises:
        BadImage: Stage "text"; kind "missing_caption" (None), "too_large" (more than
            ``MAX_CAPTION_BYTES``), "bad_text" (not UTF-8) or "empty_text" (nothing in it can be
            seen).

    Examples:
        >>> from vilu.datasets.images import decode_caption
        >>> decode_caption(b"  a red fox\n")
        'a red fox'
    """
    if data is None:
        raise BadImage("text", "missing_caption", "the image has no caption")
    if len(data) > MAX_CAPTION_BYTES:
        raise BadImage(
            "text",
            "too_large",
            f"a caption of {len(data)} bytes; at most {MAX_CAPTION_BYTES} are read",
        )
    try:
        text = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise BadImage(
            "text", "bad_text", f"the caption must be UTF-8: {error.reason} at byte {error.start}"
        ) from error
    if all(unicodedata.category(character) in INVISIBLE for character in text):
        raise BadImage("text", "empty_text", "the caption is blank")
    return text


def caption_readers(
    captions: pa.Array | None, start: int, stop: int
) -> Iterator[Callable[[], str] | None]:
    """``ImageRecord.caption`` of rows start ... stop - 1 of a column of bytes.

    Without a column it is None for each row.
    """
    if captions is None:
        return repeat(None, max(stop - start, 0))
    return (partial(decode_caption, cell.as_py()) for cell in captions[start:stop])
