"""Damages pictures by noise, blur, compression and the like. The shown objects stay the same.

The kinds of damage are from Hendrycks and Dietterich (ICLR 2019). The code and the strengths
are ours. Strengths in pixels are scaled with the picture size.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from hashlib import blake2b
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from vilu.datasets.base import ChosenImages, ImageDataset, ImageRecord
from vilu.datasets.images import decode_image
from vilu.errors import UsageError

MAX_SEVERITY: Final = 5  # severities are 1 to 5
REFERENCE_SIDE: Final = 32  # strengths in pixels are for a picture with this short side

Rng = np.random.Generator
DamageFunction = Callable[[Image.Image, float, Rng], Image.Image]
"""Function from an image, a strength and a random generator to the damaged image."""


def gaussian_noise(image: Image.Image, strength: float, rng: Rng) -> Image.Image:
    """Add normal noise with standard deviation ``strength`` to every value in [0, 1]."""
    pixels = _to_pixels(image)
    noise = rng.standard_normal(pixels.shape, dtype=np.float32)
    return _to_image(pixels + strength * noise)


def shot_noise(image: Image.Image, strength: float, rng: Rng) -> Image.Image:
    """Add Poisson noise, as if the value 1 were an expected count of ``strength`` photons."""
    expected_counts = _to_pixels(image) * strength
    n_photons = rng.poisson(expected_counts).astype(np.float32)
    return _to_image(n_photons / strength)


def blur(image: Image.Image, strength: float, rng: Rng) -> Image.Image:  # noqa: ARG001
    """Blur with a Gaussian. For a picture with a short side of 32, the radius is ``strength``."""
    radius = strength * min(image.size) / REFERENCE_SIDE
    gaussian = ImageFilter.GaussianBlur(radius)
    return image.filter(gaussian)


def low_contrast(image: Image.Image, strength: float, rng: Rng) -> Image.Image:  # noqa: ARG001
    """Multiply every pixel's difference from the mean colour by ``strength``."""
    pixels = _to_pixels(image)
    mean = pixels.mean(axis=(0, 1), dtype=np.float64).astype(np.float32)
    return _to_image(mean + strength * (pixels - mean))


def brightness(image: Image.Image, strength: float, rng: Rng) -> Image.Image:  # noqa: ARG001
    """Add ``strength`` to every value in [0, 1]."""
    return _to_image(_to_pixels(image) + np.float32(strength))


def jpeg(image: Image.Image, strength: float, rng: Rng) -> Image.Image:  # noqa: ARG001
    """Compress as JPEG with quality ``strength``."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=round(strength))
    return Image.open(buffer, formats=["JPEG"]).convert("RGB")


def pixelate(image: Image.Image, strength: float, rng: Rng) -> Image.Image:  # noqa: ARG001
    """Shrink both sides to the share ``strength``, by averaging pixels.

    Then restore the size by repeating pixels.
    """
    small_size = _scaled_size(image, strength)
    small = image.resize(small_size, Image.Resampling.BOX)
    return small.resize(image.size, Image.Resampling.NEAREST)


def low_resolution(image: Image.Image, strength: float, rng: Rng) -> Image.Image:  # noqa: ARG001
    """Shrink both sides to the share ``strength``, and then restore the size.

    Both steps have a bicubic filter. At severity 3 a side of 32 pixels is resized to 16 and back to
    32.
    """
    small_size = _scaled_size(image, strength)
    small = image.resize(small_size, Image.Resampling.BICUBIC)
    return small.resize(image.size, Image.Resampling.BICUBIC)


DAMAGE_KINDS: Final[dict[str, tuple[DamageFunction, tuple[float, ...]]]] = {
    "gaussian_noise": (gaussian_noise, (0.02, 0.04, 0.07, 0.10, 0.14)),
    "shot_noise": (shot_noise, (500, 250, 120, 60, 30)),
    "blur": (blur, (0.5, 0.7, 0.9, 1.2, 1.6)),
    "low_contrast": (low_contrast, (0.75, 0.55, 0.4, 0.28, 0.18)),
    "brightness": (brightness, (0.08, 0.15, 0.22, 0.3, 0.4)),
    "jpeg": (jpeg, (70, 50, 35, 22, 12)),
    "pixelate": (pixelate, (0.85, 0.7, 0.6, 0.5, 0.4)),
    "low_resolution": (low_resolution, (0.75, 0.625, 0.5, 0.375, 0.25)),
}
"""Maps a kind of damage to the function and to five strengths, one for each severity."""


class ShiftedImages(ChosenImages):
    """A data set with damaged pictures. A hash of the picture's key chooses the kind of damage.

    Damaged pictures are PNGs. The undamaged picture identifies a row, so a picture and the
    damaged form have the same identity.
    """

    def __init__(self, images: ImageDataset, kinds: Sequence[str], severity: int) -> None:
        unknown = [kind for kind in kinds if kind not in DAMAGE_KINDS]
        if unknown or not kinds:
            refused = ", ".join(unknown) if unknown else "none"
            known_kinds = ", ".join(DAMAGE_KINDS)
            raise UsageError(f"kinds of shift are {known_kinds}. Got {refused} instead.")
        if not 1 <= severity <= MAX_SEVERITY:
            raise UsageError(f"severity must be 1 to {MAX_SEVERITY}. Got {severity} instead.")
        self._strengths = {}
        for kind in kinds:
            _, strengths = DAMAGE_KINDS[kind]
            self._strengths[kind] = strengths[severity - 1]
        super().__init__(images, range(len(images)), {"shift": self._strengths})
        self.source = f"{images.source} ({'+'.join(kinds)}, severity {severity})"

    def records(self, start: int, stop: int) -> Iterator[ImageRecord]:
        """Yield records for the images start ... stop - 1. An image is damaged when it is read."""
        for record in super().records(start, stop):
            read = partial(_damaged_png, record, self._strengths)
            # without ``content``, the undamaged file's bytes identify the row
            undamaged = record.content or record.read
            yield replace(record, read=read, content=undamaged)


def _damaged_png(record: ImageRecord, strengths: dict[str, float]) -> bytes:
    """Make the damaged picture as a PNG.

    A hash of the key seeds the choice of the damage, and the noise. So with the same ``strengths``,
    a picture is always damaged in the same way.
    """
    key = record.key.encode()
    key_hash = blake2b(key, digest_size=16).digest()
    seed = int.from_bytes(key_hash, "big")
    rng = np.random.default_rng(seed)
    kinds = list(strengths)
    kind = kinds[rng.integers(len(kinds))]
    damage, _ = DAMAGE_KINDS[kind]
    image = decode_image(record.read()).image
    damaged = damage(image, strengths[kind], rng)
    buffer = io.BytesIO()
    damaged.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _to_pixels(image: Image.Image) -> NDArray[np.float32]:
    return np.asarray(image, dtype=np.float32) / np.float32(255)


def _to_image(pixels: NDArray[np.float32]) -> Image.Image:
    levels = np.rint(pixels.clip(0, 1) * 255)
    return Image.fromarray(levels.astype(np.uint8))


def _scaled_size(image: Image.Image, share: float) -> tuple[int, int]:
    width, height = (max(round(side * share), 1) for side in image.size)
    return width, height
