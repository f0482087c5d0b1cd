"""Make tiny image files, whole and hostile."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vilu.datasets.base import ImageDataset
from vilu.datasets.images import BadImage, ImageLimits, decode_image

SIZE = (24, 20)
LOSSLESS = {
    "PNG": {},
    "WEBP": {"lossless": True, "exact": True},
    "BMP": {},
    "TIFF": {"compression": "tiff_lzw"},
    "PPM": {},
}


def picture(mode: str = "RGB", size: tuple[int, int] = SIZE, seed: int = 0) -> Image.Image:
    """Return random pixels in an 8-bit mode."""
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


def encode(image: Image.Image, format: str, **options: object) -> bytes:  # noqa: A002  Pillow's own name for it
    buffer = BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    """Return a hand-made PNG. The header may state any size, whatever the rows hold."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def deep_png(values: np.ndarray) -> bytes:
    """Return a PNG in 16-bit grey."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return png(values.shape[1], values.shape[0], 16, 0, rows)


def with_png_size(data: bytes, width: int, height: int) -> bytes:
    return data[:8] + chunk(b"IHDR", struct.pack(">II", width, height) + data[24:29]) + data[33:]


def orientation_block(value: int, *, order: str = "<", kind: int = 3, big: bool = False) -> bytes:
    """Return a TIFF structure with one entry, the orientation, as in EXIF."""
    magic = {"<": b"II", ">": b"MM"}[order]
    code = {1: "B", 3: "H", 4: "I"}[kind]
    if big:
        header = magic + struct.pack(order + "HHHQ", 43, 8, 0, 16)
        entry = struct.pack(order + "QHHQ", 1, 0x0112, kind, 1) + struct.pack(
            order + code, value
        ).ljust(8, b"\0")
        return header + entry + bytes(8)
    header = magic + struct.pack(order + "HI", 42, 8)
    entry = struct.pack(order + "HHHI", 1, 0x0112, kind, 1) + struct.pack(
        order + code, value
    ).ljust(4, b"\0")
    return header + entry + bytes(4)


def gif_frames(n_frames: int) -> bytes:
    """Return a GIF with one real frame, then frames without data."""
    whole = encode(Image.new("P", (8, 8)), "GIF")
    empty = b"\x2c" + bytes(8) + b"\0" + b"\x02\0"
    return whole.removesuffix(b";") + empty * (n_frames - 1) + b";"


def outcome(data: bytes, limits: ImageLimits | None = None) -> tuple[str, str]:
    with pytest.raises(BadImage) as caught:
        decode_image(data, limits or ImageLimits())
    assert str(caught.value)
    return caught.value.stage, caught.value.kind


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(decode_image(data).image)


def listed(dataset: ImageDataset) -> list[tuple[str, int | None]]:
    return [(record.key, record.label) for record in dataset.records(0, len(dataset))]


def write_parquet(
    folder: Path, columns: dict, metadata: dict | None = None, **options: object
) -> Path:
    table = pa.table(columns)
    pq.write_table(table.replace_schema_metadata(metadata), folder / "set.parquet", **options)
    return folder / "set.parquet"


def seeds() -> dict[str, bytes]:
    """Return one file per format and pixel layout, to be damaged."""
    exif = b"Exif\0\0" + orientation_block(6)
    other = picture(seed=1)
    return {
        "jpeg": encode(picture(), "JPEG", exif=exif),
        "progressive": encode(picture("L"), "JPEG", progressive=True),
        "cmyk": encode(picture("CMYK"), "JPEG"),
        "png": encode(picture("RGBA"), "PNG", exif=exif),
        "palette": encode(picture("P"), "PNG", transparency=3),
        "deep": deep_png(np.arange(480).reshape(20, 24) * 100),
        "apng": encode(
            picture("RGBA"), "PNG", save_all=True, append_images=[picture("RGBA", seed=1)]
        ),
        "webp": encode(picture("RGBA"), "WEBP", exif=exif),
        "animated webp": encode(picture(), "WEBP", save_all=True, append_images=[other]),
        "gif": encode(picture(), "GIF", save_all=True, append_images=[other]),
        "bmp": encode(picture(), "BMP"),
        "palette bmp": encode(picture("P"), "BMP"),
        "tiff": encode(picture(), "TIFF", save_all=True, append_images=[other]),
        "ppm": encode(picture(), "PPM"),
        "avif": encode(picture(), "AVIF"),
        "pfm": encode(Image.fromarray(np.ones((8, 8), np.float32)), "PPM"),
    }
