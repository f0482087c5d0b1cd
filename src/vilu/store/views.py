"""Augmented views of an image, drawn from its key and a seed alone."""

from __future__ import annotations

import hashlib
import math
from typing import Annotated, Literal

import numpy as np
from PIL import Image
from pydantic import Field

from vilu.document import Model

SMALLEST = 0.5
"""Smallest share of the area that a view shows."""


class Views(Model):
    """V random crops, each mirrored or not, on their way into the model's own preprocessing.

    A crop has the shape of the picture, so that the preprocessing treats it as it treats the picture: a share of the
    area uniform in [1/2, 1], at a uniform place. View v of an image depends on nothing but its key, v and the seed.

    Attributes:
        n: V.
        seed: Of the views.
        recipe: What is drawn; part of what a store is made from.
    """

    n: Annotated[int, Field(ge=1)]
    seed: int = 0
    recipe: Literal["crop of 0.5 to 1 of the area, mirrored with probability 0.5"] = (
        "crop of 0.5 to 1 of the area, mirrored with probability 0.5"
    )

    def of(self, image: Image.Image, key: str) -> list[Image.Image]:
        """The V views of a picture."""
        return [augment(image, *_uniform(self.seed, number, key)) for number in range(self.n)]


def augment(image: Image.Image, area: float, left: float, top: float, mirror: float) -> Image.Image:
    """A crop, mirrored or not, from four numbers in [0, 1)."""
    side = math.sqrt(SMALLEST + (1 - SMALLEST) * area)
    width, height = (max(round(side * length), 1) for length in image.size)
    x, y = int(left * (image.width - width + 1)), int(top * (image.height - height + 1))
    view = image.crop((x, y, x + width, y + height))
    return view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirror < 0.5 else view


def _uniform(seed: int, number: int, key: str) -> tuple[float, float, float, float]:
    """Four numbers in [0, 1) from a hash, which no version of a library will draw otherwise."""
    words = hashlib.sha256(f"{seed} {number} {key}".encode("utf-8", "surrogatepass")).digest()
    area, left, top, mirror = (np.frombuffer(words, "<u8") >> np.uint64(11)) * 2.0**-53
    return float(area), float(left), float(top), float(mirror)
