"""Provide the shared parts of tiny trees for known data sets.

The images show their class, and are dealt to classes and splits.
"""

from __future__ import annotations

import colorsys
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from tests.builders.image_files import encode

CLASSES = 12
THREE = ("train", "test", "train", "test", "validation")
TWO = ("train", "test")
"""Splits for a class's images, in turn.

If a class has four images and ``TWO``, two are for training and two for testing.
"""


@dataclass(frozen=True)
class Row:
    """One image: class, number in the class (from 1), number overall (from 1), and split."""

    label: int
    number: int
    position: int
    split: str


def picture(label: int, number: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    """Return an image with stripes in its class's hue. Its number shifts the stripes and adds
    noise.
    """
    rng = np.random.default_rng([label, number])
    width, height = size
    x = np.arange(width)[None, :] + rng.uniform(0, width)
    y = np.arange(height)[:, None]
    stripes = 0.5 + 0.5 * np.sin(
        (x * np.cos(label) + y * np.sin(label)) * (0.2 + 0.05 * (label % 5))
    )
    hue = np.array(colorsys.hsv_to_rgb(label / CLASSES % 1, 0.8, 0.9))
    noise = rng.normal(0, rng.choice([0.05, 0.35], p=[0.7, 0.3]), (height, width, 3))
    pixels = (0.35 + 0.65 * stripes)[:, :, None] * hue + noise
    return Image.fromarray((pixels.clip(0, 1) * 255).astype(np.uint8))


def rows(n: int, n_classes: int, turns: tuple[str, ...]) -> Iterator[Row]:
    """Yield ``n`` images, dealt to the classes in turn. A class's images are dealt to splits in
    turn.
    """
    for position in range(n):
        number = position // n_classes
        yield Row(position % n_classes, number + 1, position + 1, turns[number % len(turns)])


def save(path: Path, row: Row) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(picture(row.label, row.number), "JPEG", quality=90))


def write_list(home: Path, file: str, images: str, entries: list[tuple[Row, str, str]]) -> None:
    """Write CoOp's list for these images, and the images."""
    splits: dict[str, list[list[object]]] = {"train": [], "val": [], "test": []}
    for row, path, class_name in entries:
        save(home / images / path, row)
        splits["val" if row.split == "validation" else row.split].append(
            [path, row.label, class_name]
        )
    (home / f"split_zhou_{file}.json").write_text(json.dumps(splits))


def lines(path: Path, content: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in content))
