"""Decode images and captions from untrusted bytes: format, size, orientation, pixels, text."""

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
from importlib import import_module, resources
from io import BytesIO
from itertools import repeat
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

import numpy as np
from PIL import (
    AvifImagePlugin,
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
from vilu.datasets.files import MAX_FILE_BYTES, RAW_SUFFIXES
from vilu.errors import DataError, UsageError

if TYPE_CHECKING:
    import pyarrow as pa

ORIENTATION_TAG: Final = 0x0112  # the orientation tag's number
# Maps a number type in TIFF to its code in ``struct``. The types are BYTE (1), SHORT (3) and LONG
# (4). The standard prescribes SHORT for the orientation, but cameras also write BYTE and LONG.
_INTEGER_CODES: Final = {1: "B", 3: "H", 4: "I"}
# Maps a TIFF file's first four bytes to the byte order's code in ``struct``. "+" marks BigTIFF.
BYTE_ORDER_CODES: Final = {b"II*\0": "<", b"MM\0*": ">", b"II+\0": "<", b"MM\0+": ">"}


def read_orientation(block: bytes) -> int | None:
    """Return the orientation (1 to 8) in a TIFF file or EXIF block, or None if not stated.

    Source: EXIF 3.0, tag 0x0112.

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
    if value == 0:  # means "unknown"
        return None
    if not 1 <= value <= 8:
        raise ValueError(f"EXIF orientation must be 1 to 8. Got {value} instead.")
    return value


def _orientation_tag(block: bytes) -> int | None:
    """Return the orientation tag's value in the first directory. Without the tag, return None."""
    layout = _tiff_layout(block)
    directory = layout.read(layout.offset_code, block, layout.first_offset)
    n_entries = layout.read(layout.count_code, block, directory)
    first_entry = directory + struct.calcsize(layout.count_code)
    # A damaged block may state too many entries. So the range ends at the block's end.
    possible_positions = range(first_entry, len(block), layout.entry_bytes)
    for position in possible_positions[:n_entries]:
        tag, value_type = struct.unpack_from(layout.order + "HH", block, position)
        if tag == ORIENTATION_TAG:
            # an entry consists of tag and type (four bytes), the number of values (as wide as an
            # offset), and the value
            value_position = position + 4 + struct.calcsize(layout.offset_code)
            return layout.read(_INTEGER_CODES[value_type], block, value_position)
    return None


def count_directories(data: bytes, limit: int) -> int:
    """Return the number of directories (pages) in a TIFF file.

    Counting stops at ``limit``, at a directory counted before, and at an offset outside the file.
    """
    counted_directories: set[int] = set()
    with suppress(struct.error, OverflowError):
        layout = _tiff_layout(data)
        directory = layout.read(layout.offset_code, data, layout.first_offset)
        # ``directory`` is a directory's offset, or 0 after the last directory
        while directory and directory not in counted_directories:
            if len(counted_directories) == limit:
                break
            n_entries = layout.read(layout.count_code, data, directory)
            counted_directories.add(directory)
            # the next directory's offset is behind this directory's entries
            first_entry = directory + struct.calcsize(layout.count_code)
            end_of_entries = first_entry + n_entries * layout.entry_bytes
            directory = layout.read(layout.offset_code, data, end_of_entries)
    return len(counted_directories)


class _TiffLayout(NamedTuple):
    """The number format in a TIFF file. The codes are format characters for ``struct``."""

    order: str  # code for the byte order
    count_code: str  # code for a directory's entry count
    offset_code: str  # code for an offset: a position in the file
    entry_bytes: int  # size of a directory entry
    first_offset: int  # where the first directory's offset is

    def read(self, code: str, block: bytes, position: int) -> int:
        """Return the number with this code at a position."""
        (number,) = struct.unpack_from(self.order + code, block, position)
        return int(number)


def _tiff_layout(block: bytes) -> _TiffLayout:
    """Return classic TIFF's layout, or BigTIFF's layout if the first four bytes contain "+"."""
    order = BYTE_ORDER_CODES[block[:4]]
    if b"+" in block[:4]:
        return _TiffLayout(order, count_code="Q", offset_code="Q", entry_bytes=20, first_offset=8)
    return _TiffLayout(order, count_code="H", offset_code="I", entry_bytes=12, first_offset=4)


class _JpegFile(JpegImagePlugin.JpegImageFile):
    """A JPEG file, opened without reading the EXIF block.

    Pillow would warn about a damaged block.
    """

    def _read_dpi_from_exif(self) -> None:
        """Do nothing: the print resolution is not needed."""


NEEDS_PILLOW_HEIF: Final = "needs_pillow_heif"
"""Error kind for HEIC photos if the extra vilu[heic] is not installed."""


def _open_heic(file: BytesIO) -> ImageFile.ImageFile:
    """Open a HEIC photo. Only the HEIC decoder rotates photos upright.

    Raises:
        BadImage: If pillow-heif is not installed.
    """
    try:
        plugin = import_module("pillow_heif")
    except ImportError as error:
        raise BadImage(
            "HEIC is decoded by pillow-heif: pip install 'vilu[heic]', or export the photo as JPEG",
            stage="open",
            kind=NEEDS_PILLOW_HEIF,
        ) from error
    image: ImageFile.ImageFile = plugin.HeifImageFile(file)
    return image


OPENERS: dict[str, Callable[[BytesIO], ImageFile.ImageFile]] = {
    "JPEG": _JpegFile,
    "PNG": PngImagePlugin.PngImageFile,
    "WebP": WebPImagePlugin.WebPImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "PPM": PpmImagePlugin.PpmImageFile,
    "AVIF": AvifImagePlugin.AvifImageFile,
    "HEIC": _open_heic,
}
"""Maps a decoded format's name to the class or function that opens a file in this format."""

MAX_FRAMES = 10_000  # counting stops here, since a file can hold millions of empty frames
_SIGNATURE_FILE = resources.files("vilu").joinpath("assets", "image_signatures.csv")
_SIGNATURE_TABLE = _SIGNATURE_FILE.read_text(encoding="utf-8")
_, _SIGNATURE_ROWS = parse_csv(_SIGNATURE_TABLE.splitlines(), "image_signatures.csv")
_SIGNATURES = [
    (int(row["offset"]), bytes.fromhex(row["bytes"]), row["format"]) for row in _SIGNATURE_ROWS
]
"""Format signatures: a position in the file, the bytes there, and the format's name."""


def detect_format(data: bytes) -> str | None:
    """Return the format name for encoded bytes. If the bytes look like no image, return None.

    The name is a key in ``OPENERS``, or the name of a format without a decoder here.
    """
    for offset, magic, name in _SIGNATURES:
        if data.startswith(magic, offset):
            return name
    if _looks_like_svg(data):
        return "SVG"
    return None


def _looks_like_svg(data: bytes) -> bool:
    """Return whether the data begin with SVG, possibly after an XML declaration or comment."""
    head = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n")  # without byte order mark and white space
    if head.startswith((b"<?xml", b"<!--")):
        return b"<svg" in head
    return head.startswith(b"<svg")


def count_frames(format_name: str, data: bytes, image: ImageFile.ImageFile) -> int:
    """Return the number of frames, at most ``MAX_FRAMES``, without decoding a frame.

    Pillow could count GIF and TIFF frames, but without a limit. For TIFF, Pillow's time is also
    quadratic in the number of frames.
    """
    if format_name == "GIF":
        return _count_gif_frames(data)
    if format_name == "TIFF":
        return max(count_directories(data, MAX_FRAMES), 1)
    return min(getattr(image, "n_frames", 1), MAX_FRAMES)


GIF_IMAGE: Final = 0x2C  # first byte of a frame
GIF_EXTENSION: Final = 0x21  # first byte of a block without a frame
GIF_BLOCKS: Final = frozenset({GIF_IMAGE, GIF_EXTENSION})


def _count_gif_frames(data: bytes) -> int:
    """Return the number of frames in a GIF, at least 1 (source: the GIF89a specification)."""
    n_frames = 0
    # in a truncated GIF, IndexError ends the counting, and the frames so far are returned
    with suppress(IndexError):
        # the header has 13 bytes. Byte 10 has the flags of the colour table after the header.
        position = 13 + _colour_table_bytes(data[10])
        while n_frames < MAX_FRAMES and data[position] in GIF_BLOCKS:
            if data[position] == GIF_IMAGE:
                n_frames += 1
                # A frame's data come after 11 bytes and a colour table. Byte 9 has this table's
                # flags.
                position += 11 + _colour_table_bytes(data[position + 9])
            else:
                # an extension's data come after 2 bytes
                position += 2
            # The data are chunks: a byte with the chunk's length, then the chunk's bytes. A chunk
            # of length 0 ends the block.
            while data[position] > 0:
                position += data[position] + 1
            position += 1
    return max(n_frames, 1)


def _colour_table_bytes(flags: int) -> int:
    """Return a colour table's size in bytes, or 0 if there is no table.

    The first bit in ``flags`` says whether there is a table. The last three bits are a number n:
    the table has 2^(n + 1) colours with 3 bytes each.
    """
    has_table = flags & 0b1000_0000
    if not has_table:
        return 0
    n = flags & 0b111
    n_colours: int = 2 ** (n + 1)
    return 3 * n_colours


DEEP_MODES: Final = frozenset({"I;16", "I;16L", "I;16B", "I;16N", "I", "F"})
"""Pillow's pixel modes with a single channel and more than 8 bits."""
_MODES_UP_TO_8_BITS = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"}
CONVERTIBLE_MODES: Final = DEEP_MODES | _MODES_UP_TO_8_BITS
"""Pillow's pixel modes that are converted to RGB."""


class ImageFlag(IntFlag):
    """An image's conversions and defects, as a bit mask."""

    ANIMATED = 1  # there are several frames, and the first frame is used
    ALPHA = 2  # transparent pixels were put on white
    DEEP = 4  # more than 8 bits per channel were scaled to 8
    STRETCHED = 8  # values were out of range: now the lowest value is black, the highest white
    BAD_EXIF = 16  # the EXIF block cannot be read


def to_rgb(image: Image.Image) -> tuple[Image.Image, ImageFlag]:
    """Convert a loaded image with a mode in ``CONVERTIBLE_MODES`` to RGB.

    Returns the RGB image, and flags for the conversion. A damaged image raises an exception in
    ``DECODING_ERRORS``.
    """
    if image.mode in DEEP_MODES:
        grey, flags = _deep_to_grey(image)
        return grey.convert("RGB"), flags
    if image.has_transparency_data:
        pixels = image.convert("RGBA")
        white = Image.new("RGBA", pixels.size, "white")
        composite = Image.alpha_composite(white, pixels)
        return composite.convert("RGB"), ImageFlag.ALPHA
    return image.convert("RGB"), ImageFlag(0)


def _deep_to_grey(image: Image.Image) -> tuple[Image.Image, ImageFlag]:
    """Convert 16-bit, 32-bit or float grey to 8 bits.

    Whole numbers from 0 to 65535 are divided by 257 and rounded. Floats from 0 to 1 are multiplied
    by 255. Values in a different range are stretched to 0 to 255. Pillow would clip the values at
    255 instead, and a 16-bit photo would become nearly all white.
    """
    # The pixels are copied first. A TIFF with an orientation tag states the size after rotation,
    # but a copy has the pixels' size.
    values = np.asarray(image.copy())
    low = float(values.min())
    high = float(values.max())
    is_finite = np.isfinite(low) and np.isfinite(high)
    if not is_finite:
        raise ValueError("pixel values that are not finite")
    black = 0.0
    span = 1.0 if values.dtype.kind == "f" else 65535.0  # white minus black
    flags = ImageFlag.DEEP
    if low < 0 or high > span:
        black = low
        span = high - low
        flags |= ImageFlag.STRETCHED
    if span == 0:  # all pixels have the same value, and become black
        span = 1.0
    scaled = np.subtract(values, black, dtype=np.float64)
    scaled *= 255 / span
    grey = np.rint(scaled, out=scaled).astype(np.uint8)
    return Image.fromarray(grey), flags


ReadingStage = Literal["open", "decode", "geometry", "text"]
"""The steps in reading an image, named in ``BadImage.stage`` if a step fails."""

# The error kinds (``BadImage.kind``), grouped by the cause: the picture, the file, the shard, a
# sample's members in a shard, or the text.
PictureErrorKind = Literal[
    "empty",
    "unidentified",
    "unsupported",
    "needs_pillow_heif",
    "raw_photo",
    "truncated",
    "decode_error",
    "bomb",
    "bad_geometry",
]
FileErrorKind = Literal["too_large", "read_error", "not_a_file", "bad_path"]
ShardErrorKind = Literal["truncated_shard", "bad_shard"]
"""Errors for a whole shard: a single record reports all images lost from the shard."""
SampleErrorKind = Literal["interleaved", "duplicate", "missing_image"]
TextErrorKind = Literal["missing_caption", "bad_text", "empty_text", "bad_label"]
ErrorKind = PictureErrorKind | FileErrorKind | ShardErrorKind | SampleErrorKind | TextErrorKind

DECODING_ERRORS: Final = (
    OSError,  # truncated data, codec error, impossible header field
    SyntaxError,  # a part does not have the file's format
    ValueError,  # a value is out of range: tile outside the image, oversized text chunk
    EOFError,  # a header without a first frame
    struct.error,  # the file is too short for a field
    zlib.error,  # damaged compressed profile or text
    LookupError,  # IndexError, KeyError: a value in the file is used as an index
    TypeError,  # a TIFF tag with a wrong type or count
    AttributeError,  # a TIFF tag with a wrong type, used as text
    ArithmeticError,  # OverflowError, ZeroDivisionError: wrong rationals or sizes in a header
    RuntimeError,  # libheif: a limit on memory is reached
    MemoryError,  # a codec allocates memory for the size in a header
    AssertionError,  # Pillow checks some file properties with assertions
    Warning,  # Pillow warns about damaged TIFF tags, and the warning raises under `-W error`
)
"""Exceptions that Pillow raises for damaged files.

In a test with 200,000 mutated files (Pillow 13), only the first three exceptions and the last were
raised. According to Pillow's source code, some Pillow versions can raise all these exceptions.
"""


class BadImage(DataError):  # noqa: N818  named after the kind of input
    """The error for an unusable image. The image becomes an error row, and the run continues.

    Attributes:
        stage: Failed step: "open" (bytes and header), "geometry" (size), "decode" (pixels) or
            "text" (caption, label).
        kind: Error kind, for counting errors.
    """

    def __init__(self, message: str, *, stage: ReadingStage, kind: ErrorKind) -> None:
        super().__init__(message)
        self.stage: ReadingStage = stage
        self.kind: ErrorKind = kind

    def __reduce__(self) -> tuple[Callable[[str], BadImage], tuple[str]]:
        """Return a function with arguments that makes this error again when unpickling.

        This method is needed because workers send errors to the driver as pickles.
        """
        return partial(BadImage, stage=self.stage, kind=self.kind), (str(self),)


@dataclass(frozen=True)
class ImageLimits:
    """Limits for images, checked before pixels are decoded.

    Attributes:
        max_pixels: Maximum of width x height. ``max_pixels`` may not exceed Pillow's limit, so that
            ``max_pixels`` is always reached first.
        min_side: The shorter side's minimum length in pixels.
        max_aspect: Maximum ratio between the longer and the shorter side. Without this limit, a
            file with 99 bytes could fill 1 GB: 1 x 5000 pixels, resized until the shorter side is
            224.
        max_bytes: Maximum encoded size in bytes.
    """

    max_pixels: int = 50_000_000
    min_side: int = 8
    max_aspect: float = 20.0
    max_bytes: int = MAX_FILE_BYTES

    def __post_init__(self) -> None:
        _require_limit("max_pixels", self.max_pixels, ceiling=89_478_485)  # Pillow's limit
        _require_limit("max_bytes", self.max_bytes, ceiling=MAX_FILE_BYTES)
        if self.min_side < 1 or self.max_aspect < 1:
            raise UsageError(
                f"min_side and max_aspect must be at least 1. Got {self.min_side} and "
                f"{self.max_aspect} instead."
            )


def _require_limit(name: str, limit: int, ceiling: int) -> None:
    """Raise UsageError if the limit ``name`` is not from 1 to ``ceiling``."""
    if not 1 <= limit <= ceiling:
        raise UsageError(f"{name} must be from 1 to {ceiling}. Got {limit} instead.")


@dataclass(frozen=True)
class DecodedImage:
    """A decoded image, and facts about the file.

    Attributes:
        image: The first frame's RGB pixels, perhaps at a reduced size. The pixels are not rotated
            by the EXIF orientation, because CLIP's preprocessing does not rotate either. Only HEIC
            photos are upright, because the HEIC decoder rotates photos.
        width: Width in the file.
        height: Height in the file.
        n_frames: Number of frames (counting stops at ``MAX_FRAMES``).
        exif_orientation: Orientation tag in EXIF or TIFF, 1 to 8. None where there is no such tag.
        flags: Conversions and defects.
    """

    image: Image.Image
    width: int
    height: int
    n_frames: int
    exif_orientation: int | None
    flags: ImageFlag


DEFAULT_LIMITS: Final = ImageLimits()


def read_image(
    record: ImageRecord, limits: ImageLimits = DEFAULT_LIMITS, *, jpeg_side: int | None = None
) -> DecodedImage:
    """Read and decode a record with ``decode_image``. Raise BadImage if this fails."""
    if record.key.lower().endswith(RAW_SUFFIXES):
        # The name decides, because the bytes cannot: most RAW formats are TIFF files with a small
        # preview as first frame.
        suffix = record.key.rpartition(".")[2]
        raise _raw_photo_error(suffix.upper())
    try:
        data = record.read()
    except OSError as error:
        kind: ErrorKind = "read_error"
        if error.errno == errno.EFBIG:
            kind = "too_large"
        raise BadImage(f"cannot read the file: {error}", stage="open", kind=kind) from error
    return decode_image(data, limits, jpeg_side=jpeg_side)


def decode_image(
    data: bytes, limits: ImageLimits = DEFAULT_LIMITS, *, jpeg_side: int | None = None
) -> DecodedImage:
    """Decode an encoded image's first frame to 8-bit RGB.

    Grey, palette, CMYK and YCbCr are converted. Transparent pixels are put on white. Grey with more
    than 8 bits is scaled to 8 bits (``_deep_to_grey``).

    This function is thread-safe and does not change warning filters.

    Args:
        data: The file's bytes.
        limits: Limits on size and shape, checked before pixels are decoded.
        jpeg_side: The least length to which a JPEG's shorter side may be reduced. The JPEG is then
            decoded at 1/2, 1/4 or 1/8 size, if the shorter side keeps at least this length. This
            takes a fraction of the time. None: JPEGs are decoded in full.

    Raises:
        BadImage: If the bytes are not an image in an accepted format, break a limit, or are
            damaged.
        UsageError: If ``PIL.ImageFile.LOAD_TRUNCATED_IMAGES`` is on, because Pillow then does not
            report truncated images.
    """
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise UsageError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is on, which hides damaged files. Switch it off."
        )
    format_name = _require_format(data, limits)
    with convert_pillow_errors("open", f"damaged {format_name} header"):
        file = OPENERS[format_name](BytesIO(data))
    with file as opened_image:
        _require_geometry(*opened_image.size, limits)
        size_in_file = opened_image.size
        with convert_pillow_errors("decode", "damaged pixels"):
            if format_name == "TIFF":
                # Pillow rotates a TIFF's pixels by the orientation tag. So the tag is removed.
                opened_image.getexif().pop(ORIENTATION_TAG, None)
            if format_name == "JPEG" and jpeg_side is not None:
                opened_image.draft(None, (jpeg_side, jpeg_side))  # for ``load`` at a reduced size
            opened_image.load()
        exif = opened_image.info.get("exif")
        if format_name == "TIFF":  # a TIFF file has the format of an EXIF block
            exif = data
        exif_orientation, flags = _orientation_and_flag(exif)
        n_frames = count_frames(format_name, data, opened_image)
        if n_frames > 1:
            flags |= ImageFlag.ANIMATED
        if opened_image.mode not in CONVERTIBLE_MODES:
            raise BadImage(
                f"pixel mode {opened_image.mode} is not converted",
                stage="decode",
                kind="unsupported",
            )
        with convert_pillow_errors("decode", f"cannot convert {opened_image.mode} to RGB"):
            image, conversion_flags = to_rgb(opened_image)
    # A JPEG may be decoded at a reduced size, so the full size is taken from the header. A TIFF's
    # header may state the size after rotation, so the size is taken from the pixels.
    width, height = size_in_file if format_name == "JPEG" else image.size
    return DecodedImage(
        image,
        width=width,
        height=height,
        n_frames=n_frames,
        exif_orientation=exif_orientation,
        flags=flags | conversion_flags,
    )


def _require_format(data: bytes, limits: ImageLimits) -> str:
    """Return the format name for encoded bytes.

    Raise BadImage for no bytes, too many bytes, or a format that is unknown or without decoder.
    """
    if not data:
        raise BadImage("the file has no bytes", stage="open", kind="empty")
    if len(data) > limits.max_bytes:
        raise BadImage(
            f"{len(data)} bytes; at most {limits.max_bytes} are read",
            stage="open",
            kind="too_large",
        )
    format_name = detect_format(data)
    if format_name is None:
        raise BadImage(
            f"no image: {len(data)} bytes of an unknown format", stage="open", kind="unidentified"
        )
    if format_name.startswith("RAW"):
        raw_format = format_name.removeprefix("RAW ")
        raise _raw_photo_error(raw_format)
    if format_name not in OPENERS:
        decoded_formats = ", ".join(OPENERS)
        raise BadImage(
            f"{format_name} is not decoded; convert it to one of {decoded_formats}",
            stage="open",
            kind="unsupported",
        )
    return format_name


def _raw_photo_error(format_name: str) -> BadImage:
    """Return the error for a RAW photo, with advice."""
    return BadImage(
        f"{format_name} is a RAW photo, which is not developed here: export it as JPEG or TIFF, or "
        "take the JPEG that the camera wrote beside it",
        stage="open",
        kind="raw_photo",
    )


def n_pixels_in_header(data: bytes) -> int:
    """Return the number of pixels according to an encoded image's header.

    If the header is damaged, or if the format has no decoder here, the result is 0.
    ``decode_image`` raises an error for such data.
    """
    format_name = detect_format(data) or ""
    opener = OPENERS.get(format_name)
    if opener is None:
        return 0
    try:
        with convert_pillow_errors("open", "damaged header"):
            file = opener(BytesIO(data))
    except BadImage:
        return 0
    with file as opened_image:
        width, height = opened_image.size
    return int(width * height)


@contextmanager
def convert_pillow_errors(stage: ReadingStage, message: str) -> Iterator[None]:
    """Turn Pillow's exceptions for a damaged file into ``BadImage``.

    The error says "MESSAGE: REASON". REASON is Pillow's exception.
    """
    try:
        yield
    except BadImage:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImage(str(error), stage=stage, kind="bomb") from error
    except DECODING_ERRORS as error:
        kind: ErrorKind = "decode_error"
        if "truncated" in str(error).lower():
            kind = "truncated"
        reason = f"{type(error).__name__}: {error}"[:200]
        raise BadImage(f"{message}: {reason}", stage=stage, kind=kind) from error


def _require_geometry(width: int, height: int, limits: ImageLimits) -> None:
    """Raise BadImage if the size breaks a limit."""
    if width * height > limits.max_pixels:
        raise BadImage(
            f"{width} x {height} pixels; at most {limits.max_pixels} are decoded",
            stage="geometry",
            kind="bomb",
        )
    short_side, long_side = sorted((width, height))
    if short_side < limits.min_side or long_side > limits.max_aspect * short_side:
        raise BadImage(
            f"{width} x {height} pixels; sides must be at least {limits.min_side}, and their "
            f"ratio at most {limits.max_aspect:g}",
            stage="geometry",
            kind="bad_geometry",
        )


def _orientation_and_flag(exif: object) -> tuple[int | None, ImageFlag]:
    """Return the orientation in an EXIF block, and a flag if the block is damaged."""
    if not isinstance(exif, bytes):
        return None, ImageFlag(0)
    try:
        return read_orientation(exif), ImageFlag(0)
    except ValueError:  # the block is damaged, but the image is still used
        return None, ImageFlag.BAD_EXIF


MAX_CAPTION_BYTES: Final = 2**20
"""Longer captions are errors. Models read at most a few hundred bytes."""

INVISIBLE_CATEGORIES: Final = frozenset({"Cc", "Cf", "Zs", "Zl", "Zp"})
"""Unicode categories of control characters, invisible marks, and blanks.

Category Cn (unassigned) is not included. In an old Python version, Cn also has visible characters,
added to Unicode since that version.
"""


def read_caption(record: ImageRecord) -> str:
    """Return a record's caption. Raise BadImage if the caption is missing or cannot be read."""
    if record.caption is None:
        return decode_caption(None)  # raises BadImage
    try:
        return record.caption()
    except OSError as error:
        raise BadImage(
            f"cannot read the caption: {error}", stage="text", kind="read_error"
        ) from error


def decode_caption(data: bytes | None) -> str:
    r"""Return a caption's text, without outer white space and without a byte order mark.

    There is no Unicode normalisation.

    Raises:
        BadImage: Stage "text", with kind "missing_caption" (None), "too_large" (more than
            ``MAX_CAPTION_BYTES``), "bad_text" (not UTF-8) or "empty_text" (no visible character).

    Examples:
        >>> from vilu.datasets.images import decode_caption
        >>> decode_caption(b"  a red fox\n")
        'a red fox'
    """
    if data is None:
        raise BadImage("the image has no caption", stage="text", kind="missing_caption")
    if len(data) > MAX_CAPTION_BYTES:
        raise BadImage(
            f"a caption of {len(data)} bytes; at most {MAX_CAPTION_BYTES} are read",
            stage="text",
            kind="too_large",
        )
    try:
        text = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise BadImage(
            f"the caption must be UTF-8: {error.reason} at byte {error.start}",
            stage="text",
            kind="bad_text",
        ) from error
    is_blank = all(unicodedata.category(character) in INVISIBLE_CATEGORIES for character in text)
    if is_blank:
        raise BadImage("the caption is blank", stage="text", kind="empty_text")
    return text


def caption_readers(
    captions: pa.Array | None, start: int, stop: int
) -> Iterator[Callable[[], str] | None]:
    """Yield a caption reader for each row start ... stop - 1.

    A caption reader is a function without arguments that returns the row's caption.

    ``captions`` is the column with the captions' bytes. If ``captions`` is None, None is yielded
    for each row.
    """
    if captions is None:
        return repeat(None, max(stop - start, 0))
    return (partial(decode_caption, cell.as_py()) for cell in captions[start:stop])
