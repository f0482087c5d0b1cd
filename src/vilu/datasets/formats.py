"""Which image format some bytes are, by their signature alone, and how many frames they hold.

Formats are told apart here and opened by class, rather than by ``PIL.Image.open``: no more parsers see untrusted bytes
than the allow-list names, no external program is ever run, and Pillow's size check cannot warn (a warning turns into
an error, or is shown once only, by filters that all threads share).
"""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO

from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from vilu.datasets.tiff import BYTE_ORDER, count_directories


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

SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    *(".avif", ".heic", ".heif", ".jp2", ".jxl", ".svg", ".psd"),
)
"""File name endings that mean an image; those of the last line so that it is reported as unsupported, not missed."""

MAX_FRAMES = 10_000
"""Counting stops here: a hostile file can hold millions of empty frames."""

_SIGNATURES = (
    (0, b"\xff\xd8\xff", "JPEG"),
    (0, b"\x89PNG\r\n\x1a\n", "PNG"),
    (8, b"WEBP", "WebP"),
    (0, b"GIF87a", "GIF"),
    (0, b"GIF89a", "GIF"),
    (0, b"BM", "BMP"),
    *((0, magic, "TIFF") for magic in BYTE_ORDER),
    *((0, magic, "PPM") for magic in (b"P1", b"P2", b"P3", b"P4", b"P5", b"P6", b"Pf")),
    *((4, b"ftyp" + brand, "AVIF") for brand in (b"avif", b"avis")),
    *((4, b"ftyp" + brand, "HEIC") for brand in (b"heic", b"heix", b"hevc", b"mif1", b"msf1")),
    (0, b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (0, b"\0\0\0\x0cJXL ", "JPEG XL"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"8BPS", "PSD"),
    (0, b"\0\0\1\0", "ICO"),
    (0, b"%!PS", "EPS"),
    (0, b"%PDF", "PDF"),
    (0, b"\x76\x2f\x31\x01", "OpenEXR"),
    (0, b"#?RADIANCE", "Radiance HDR"),
    (0, b"qoif", "QOI"),
    (0, b"DDS ", "DDS"),
)


def sniff(data: bytes) -> str | None:
    """Name of the format (a key of ``OPENERS``, or one that is not decoded); None if it looks like no image."""
    for offset, magic, name in _SIGNATURES:
        if data.startswith(magic, offset):
            return name
    head = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n")
    is_svg = head.startswith(b"<svg") or (head.startswith((b"<?xml", b"<!--")) and b"<svg" in head)
    return "SVG" if is_svg else None


def count_frames(name: str, data: bytes, image: ImageFile.ImageFile) -> int:
    """Number of frames, at most ``MAX_FRAMES``, without decoding any.

    GIF and TIFF are counted here: Pillow's count is quadratic in the frames of a TIFF and has no limit.
    """
    if name == "GIF":
        return _count_gif_frames(data)
    if name == "TIFF":
        return max(count_directories(data, MAX_FRAMES), 1)
    return min(getattr(image, "n_frames", 1), MAX_FRAMES)


def _count_gif_frames(data: bytes) -> int:
    def colour_table(flags: int) -> int:
        return 3 << (flags & 7) + 1 if flags & 0x80 else 0

    frames = 0
    try:
        position = 13 + colour_table(data[10])
        while frames < MAX_FRAMES and data[position] in b"\x2c\x21":
            if data[position] == 0x2C:
                frames += 1
                position += 11 + colour_table(data[position + 9])
            else:
                position += 2
            while data[position]:
                position += data[position] + 1
            position += 1
    except IndexError:  # no trailer: what came before it counts
        return max(frames, 1)
    return max(frames, 1)
