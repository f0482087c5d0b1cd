"""Pictures made harder without changing what is in them: noise, blur, and what weather, optics and files do.

After the corruptions of Hendrycks and Dietterich (ICLR 2019): their ways of damage, our own code
and strengths, which are relative to the size of the picture where it matters.
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

from vilu.datasets.base import Chosen, ImageDataset, ImageRecord
from vilu.datasets.images import decode_image
from vilu.errors import UsageError

SEVERITIES: Final = 5
REFERENCE_SIDE: Final = 32  # short side of a picture to which strengths in pixels refer

Change = Callable[[Image.Image, float, np.random.Generator], Image.Image]


def gaussian_noise(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """Adds a normal number of standard deviation ``strength`` to every value in [0, 1]."""
    pixels = _pixels(image)
    return _image(pixels + strength * rng.standard_normal(pixels.shape, dtype=np.float32))


def shot_noise(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """Counts ``strength`` photons per full value."""
    return _image(rng.poisson(_pixels(image) * strength).astype(np.float32) / strength)


def blur(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:  # noqa: ARG001
    """A Gaussian of ``strength`` pixels of a picture of ``REFERENCE_SIDE``."""
    return image.filter(ImageFilter.GaussianBlur(strength * min(image.size) / REFERENCE_SIDE))


def low_contrast(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:  # noqa: ARG001
    """Keeps a share ``strength`` of the distance from the mean colour."""
    pixels = _pixels(image)
    mean = pixels.mean(axis=(0, 1), dtype=np.float64).astype(np.float32)
    return _image(mean + strength * (pixels - mean))


def brightness(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:  # noqa: ARG001
    """Adds ``strength`` to every value in [0, 1]."""
    return _image(_pixels(image) + np.float32(strength))


def jpeg(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:  # noqa: ARG001
    """Compresses at quality ``strength``."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=round(strength))
    return Image.open(buffer, formats=["JPEG"]).convert("RGB")


def pixelate(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:  # noqa: ARG001
    """Blocks: averages down to a share ``strength`` of the sides and repeats pixels back."""
    return image.resize(_scaled(image, strength), Image.Resampling.BOX).resize(
        image.size, Image.Resampling.NEAREST
    )


def low_resolution(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:  # noqa: ARG001
    """Resizes down to a share ``strength`` of the sides and back, both bicubic: 32 to 16 to 32 at severity 3."""
    return image.resize(_scaled(image, strength), Image.Resampling.BICUBIC).resize(
        image.size, Image.Resampling.BICUBIC
    )


KINDS: Final[dict[str, tuple[Change, tuple[float, ...]]]] = {
    "gaussian_noise": (gaussian_noise, (0.02, 0.04, 0.07, 0.10, 0.14)),
    "shot_noise": (shot_noise, (500, 250, 120, 60, 30)),
    "blur": (blur, (0.5, 0.7, 0.9, 1.2, 1.6)),
    "low_contrast": (low_contrast, (0.75, 0.55, 0.4, 0.28, 0.18)),
    "brightness": (brightness, (0.08, 0.15, 0.22, 0.3, 0.4)),
    "jpeg": (jpeg, (70, 50, 35, 22, 12)),
    "pixelate": (pixelate, (0.85, 0.7, 0.6, 0.5, 0.4)),
    "low_resolution": (low_resolution, (0.75, 0.625, 0.5, 0.375, 0.25)),
}
"""Ways of damage with their strengths at severity 1 to 5."""


class ShiftedImages(Chosen):
    """A data set whose every picture is damaged, each in one way that a hash of its key chooses.

    A picture and its damaged form are known to be the same row. What comes out is a PNG.
    """

    def __init__(self, images: ImageDataset, kinds: Sequence[str], severity: int) -> None:
        unknown = [kind for kind in kinds if kind not in KINDS]
        if unknown or not kinds:
            raise UsageError(
                f"kinds of shift are {', '.join(KINDS)}. Got {', '.join(unknown) or 'none'} instead."
            )
        if not 1 <= severity <= SEVERITIES:
            raise UsageError(f"severity must be 1 to {SEVERITIES}. Got {severity} instead.")
        self._strengths = {kind: KINDS[kind][1][severity - 1] for kind in kinds}
        super().__init__(images, range(len(images)), {"shift": self._strengths})
        self.source = f"{images.source} ({'+'.join(kinds)}, severity {severity})"

    def records(self, start: int, stop: int) -> Iterator[ImageRecord]:
        """The images at positions start ... stop - 1, damaged when they are read."""
        for record in super().records(start, stop):
            whole = record.content or record.read
            yield replace(record, read=partial(_damaged, record, self._strengths), content=whole)


def _damaged(record: ImageRecord, strengths: dict[str, float]) -> bytes:
    rng = np.random.default_rng(
        int.from_bytes(blake2b(record.key.encode(), digest_size=16).digest(), "big")
    )
    kind = list(strengths)[rng.integers(len(strengths))]
    change, _ = KINDS[kind]
    buffer = io.BytesIO()
    change(decode_image(record.read()).image, strengths[kind], rng).save(
        buffer, "PNG", compress_level=1
    )
    return buffer.getvalue()


def _pixels(image: Image.Image) -> NDArray[np.float32]:
    return np.asarray(image, dtype=np.float32) / np.float32(255)


def _image(pixels: NDArray[np.float32]) -> Image.Image:
    return Image.fromarray(np.rint(pixels.clip(0, 1) * 255).astype(np.uint8))


def _scaled(image: Image.Image, share: float) -> tuple[int, int]:
    width, height = (max(round(side * share), 1) for side in image.size)
    return width, height
