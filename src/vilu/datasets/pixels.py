"""Any pixel mode to 8-bit RGB."""

from __future__ import annotations

from enum import IntFlag
from typing import Final

import numpy as np
from PIL import Image

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

    Raises:
        ValueError: If pixel values are not finite, or (from Pillow, which has other exceptions too) a palette or a
            transparency entry does not fit the pixels.
    """
    if image.mode in DEEP_MODES:
        gray, flags = _deep_to_gray(image)
        return gray.convert("RGB"), flags
    if image.has_transparency_data:
        pixels = image.convert("RGBA")
        white = Image.new("RGBA", pixels.size, "white")
        return Image.alpha_composite(white, pixels).convert("RGB"), ImageFlag.ALPHA
    return image.convert("RGB"), ImageFlag(0)


def _deep_to_gray(image: Image.Image) -> tuple[Image.Image, ImageFlag]:
    """8-bit grey of whole numbers 0 ... 65535 (value / 257, rounded) or floats 0 ... 1; other ranges are stretched.

    Pillow's own conversion saturates: nearly all of a 16-bit photo turns white.
    """
    values = np.asarray(image.copy())  # until then, a TIFF gives the size that it would have when turned
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError("pixel values that are not finite")
    start, span, flags = 0.0, 1.0 if values.dtype.kind == "f" else 65535.0, ImageFlag.DEEP
    if low < 0 or high > span:
        start, span, flags = low, high - low or 1.0, flags | ImageFlag.STRETCHED
    scaled = np.subtract(values, start, dtype=np.float64)
    scaled *= 255 / span
    return Image.fromarray(np.rint(scaled, out=scaled).astype(np.uint8)), flags
