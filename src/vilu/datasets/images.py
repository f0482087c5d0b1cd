"""Untrusted bytes to an RGB picture: one function, one exception, and no setting that other threads can see."""

from __future__ import annotations

import errno
import struct
import zlib
from dataclasses import dataclass
from io import BytesIO
from typing import Final, Literal

from PIL import Image, ImageFile

from vilu.datasets.base import Record
from vilu.datasets.files import MAX_FILE_BYTES
from vilu.datasets.formats import OPENERS, count_frames, sniff
from vilu.datasets.pixels import MODES, ImageFlag, to_rgb
from vilu.datasets.tiff import ORIENTATION, orientation
from vilu.errors import DataError, UsageError

Stage = Literal["open", "decode", "geometry", "text"]
Kind = Literal[
    "empty",
    "unidentified",
    "unsupported",
    "truncated",
    "decode_error",
    "bomb",
    "bad_geometry",
    "too_large",
    "read_error",
    "truncated_shard",
    "bad_shard",
    "interleaved",
    "duplicate",
    "missing_image",
    "not_a_file",
    "bad_path",
    "missing_caption",
    "bad_text",
    "empty_text",
    "bad_label",
]

CORRUPT: Final = (
    OSError,  # data cut short, a codec's error, a header field that makes no sense
    SyntaxError,  # how Pillow's parsers say "not this format after all", also in the middle of a file
    ValueError,  # values out of range: tile outside the image, oversized text chunk, unknown conversion
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
"""What Pillow raises on damaged files: of 200,000 mutated ones all that failed did so with the first three or the last
(Pillow 13); its source lets the others through in one version or another."""


class BadImage(DataError):  # noqa: N818  the name of a kind of input, as the error table calls it
    """An image that cannot be used; one row of the error table, never the end of a run.

    Attributes:
        stage: Where it failed: "open" (bytes and header), "geometry" (size), "decode" (pixels), "text" (caption,
            label).
        kind: What was wrong, for counting.
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
        max_pixels: Largest width x height; at most Pillow's own limit, so that this one always speaks first.
        min_side: Shortest side in pixels.
        max_aspect: Largest ratio of the sides: resizing the short side of a 1 x 5000 picture of 99 bytes to 224 makes
            one of 1 GB.
        max_bytes: Largest encoded size.
    """

    max_pixels: int = 50_000_000
    min_side: int = 8
    max_aspect: float = 20.0
    max_bytes: int = MAX_FILE_BYTES

    def __post_init__(self) -> None:
        ceilings = {"max_pixels": 89_478_485, "max_bytes": MAX_FILE_BYTES}
        for name, ceiling in ceilings.items():
            if not 1 <= getattr(self, name) <= ceiling:
                raise UsageError(f"{name} must be from 1 to {ceiling}. Got {getattr(self, name)} instead.")
        if self.min_side < 1 or self.max_aspect < 1:
            raise UsageError(
                f"min_side and max_aspect must be at least 1. Got {self.min_side} and {self.max_aspect} instead."
            )


@dataclass(frozen=True)
class DecodedImage:
    """A picture and what is worth recording about its file.

    Attributes:
        image: RGB pixels of the first frame, as stored (EXIF orientation is not applied: CLIP's preprocessing doesn't).
        width: Width in the file.
        height: Height in the file.
        n_frames: Number of frames (counting stops at ``formats.MAX_FRAMES``).
        exif_orientation: The EXIF (or TIFF) orientation tag, 1 to 8; None where there is none.
        flags: What was done to the pixels, or noticed.
    """

    image: Image.Image
    width: int
    height: int
    n_frames: int
    exif_orientation: int | None
    flags: ImageFlag


DEFAULT_LIMITS: Final = ImageLimits()


def read_image(record: Record, limits: ImageLimits = DEFAULT_LIMITS) -> DecodedImage:
    """Read and decode one record.

    Raises:
        BadImage: As ``decode_image``; kind "read_error" (or "too_large") where the bytes could not be had.
    """
    try:
        data = record.read()
    except OSError as error:
        kind: Kind = "too_large" if error.errno == errno.EFBIG else "read_error"
        raise BadImage("open", kind, f"cannot read the file: {error}") from error
    return decode_image(data, limits)


def decode_image(data: bytes, limits: ImageLimits = DEFAULT_LIMITS) -> DecodedImage:
    """Decode the first frame of an encoded image to 8-bit RGB. Thread-safe; warning filters are left alone.

    Grey, palette, CMYK and YCbCr are converted; transparency is composited on white; 16-bit grey is divided by 257
    (Pillow's own conversion saturates it); 32-bit integers and floats that fit no known range are stretched.

    Raises:
        BadImage: If the bytes are no image of an accepted format, break a limit, or are damaged.
        UsageError: If ``PIL.ImageFile.LOAD_TRUNCATED_IMAGES`` was switched on: half pictures would pass for whole ones.
    """
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise UsageError("PIL.ImageFile.LOAD_TRUNCATED_IMAGES is on, which hides damaged files. Switch it off.")
    name = _require_format(data, limits)
    with _open(name, data) as opened:
        _require_geometry(*opened.size, limits)
        _load(name, opened)
        exif = data if name == "TIFF" else opened.info.get("exif")
        exif_orientation, flags = _orientation(exif)
        n_frames = count_frames(name, data, opened)
        if n_frames > 1:
            flags |= ImageFlag.ANIMATED
        image, conversion = _convert(opened)
    return DecodedImage(image, image.width, image.height, n_frames, exif_orientation, flags | conversion)


def _require_format(data: bytes, limits: ImageLimits) -> str:
    if not data:
        raise BadImage("open", "empty", "the file has no bytes")
    if len(data) > limits.max_bytes:
        raise BadImage("open", "too_large", f"{len(data)} bytes; at most {limits.max_bytes} are read")
    name = sniff(data)
    if name is None:
        raise BadImage("open", "unidentified", f"no image: it begins with {data[:16]!r}")
    if name not in OPENERS:
        raise BadImage("open", "unsupported", f"{name} is not decoded; convert it to one of {', '.join(OPENERS)}")
    return name


def _open(name: str, data: bytes) -> ImageFile.ImageFile:
    try:
        return OPENERS[name](BytesIO(data))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImage("open", "bomb", str(error)) from error
    except CORRUPT as error:
        raise BadImage("open", _kind(error), f"damaged {name} header: {_text(error)}") from error


def _require_geometry(width: int, height: int, limits: ImageLimits) -> None:
    if width * height > limits.max_pixels:
        raise BadImage("geometry", "bomb", f"{width} x {height} pixels; at most {limits.max_pixels} are decoded")
    short, long = sorted((width, height))
    if short < limits.min_side or long > limits.max_aspect * short:
        raise BadImage(
            "geometry",
            "bad_geometry",
            f"{width} x {height} pixels; sides must be at least {limits.min_side} and of ratio {limits.max_aspect:g}",
        )


def _orientation(exif: object) -> tuple[int | None, ImageFlag]:
    if not isinstance(exif, bytes):
        return None, ImageFlag(0)
    try:
        return orientation(exif), ImageFlag(0)
    except ValueError:  # metadata never fails a picture; the flag tells
        return None, ImageFlag.BAD_EXIF


def _load(name: str, image: ImageFile.ImageFile) -> None:
    try:
        if name == "TIFF":  # Pillow would turn the pixels by the tag on loading
            image.getexif().pop(ORIENTATION, None)
        image.load()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImage("decode", "bomb", str(error)) from error
    except CORRUPT as error:
        raise BadImage("decode", _kind(error), f"damaged pixels: {_text(error)}") from error


def _convert(image: ImageFile.ImageFile) -> tuple[Image.Image, ImageFlag]:
    if image.mode not in MODES:
        raise BadImage("decode", "unsupported", f"pixel mode {image.mode} is not converted")
    try:
        return to_rgb(image)
    except CORRUPT as error:
        raise BadImage("decode", _kind(error), f"cannot convert {image.mode} to RGB: {_text(error)}") from error


def _kind(error: BaseException) -> Kind:
    return "truncated" if "truncated" in str(error).lower() else "decode_error"


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:200]
