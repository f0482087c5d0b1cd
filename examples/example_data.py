"""What the examples work on: photos of clothes that ship with vilu, and simulated embeddings.

This file is no example of its own. The photos are real. The simulated embeddings stand for a model
that is often wrong about some of its images, as models are about blurred photos. In the
embeddings these images can be recognised.
"""

from __future__ import annotations

from collections.abc import Collection
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

NAMES = ("dress", "hat", "sweater", "coat", "jeans", "shirt", "shoe", "shorts", "skirt", "t-shirt")
"""The names of the classes, as in prompts."""

SMALL_MODEL = "compact:128"
"""The model of ``vilu[compact]`` at 128 pixels. One core embeds about 80 photos per second."""


def photos_on_disk(
    folder: Path,
    n: int,
    *,
    skip: int = 0,
    in_class_folders: bool = False,
    kinds: Collection[str] = NAMES,
) -> dict[str, str]:
    """Write ``n`` random photos into a folder, and return their classes by path.

    Args:
        folder: The folder. The returned paths are relative to it.
        n: Number of photos.
        skip: Number of photos to leave out first. The random order is always the same, so calls
            can write different photos.
        in_class_folders: Whether each class has a folder of its own.
        kinds: Classes of the photos.
    """
    with resources.as_file(resources.files("vilu") / "assets" / "clothing.parquet") as path:
        table = pq.read_table(path, columns=["image", "label"])
    class_names = [NAMES[label] for label in table["label"].to_pylist()]
    random_order = np.random.default_rng(0).permutation(len(table)).tolist()
    rows_of_kinds = [row for row in random_order if class_names[row] in kinds]

    class_by_path = {}
    for row in rows_of_kinds[skip : skip + n]:
        class_name = class_names[row]
        photo_folder = folder / class_name if in_class_folders else folder
        photo_folder.mkdir(parents=True, exist_ok=True)
        photo_path = photo_folder / f"{row:04}.jpg"
        photo_path.write_bytes(table["image"][row].as_py())
        relative_path = photo_path.relative_to(folder).as_posix()
        class_by_path[relative_path] = class_name
    return class_by_path


class Arrays(NamedTuple):
    """Embeddings of images and class texts, and the labels."""

    image: NDArray[np.float64]  # (N, D)
    text: NDArray[np.float64]  # (K, D), one row per class
    label: NDArray[np.int64]  # (N,) the true class of each image


def simulated(
    n: int, *, seed: int, blurred: float = 0.5, classes: int = 6, width: int = 24
) -> Arrays:
    """Simulate the embeddings of ``n`` images and of their class texts.

    The texts lie only near the centres of their classes, as those of real models do.

    Args:
        n: Number of images.
        seed: Seed of the images. The classes are the same for all seeds.
        blurred: Share of blurred images. Answers about these are often wrong. The last
            coordinate is positive for blurred images, and negative for sharp ones.
        classes: Number of classes.
        width: Number of coordinates.
    """
    class_generator = np.random.default_rng(2026)
    centre = class_generator.normal(size=(classes, width))
    centre[:, -1] = 0
    centre = unit(centre)
    text = centre + 0.15 * class_generator.normal(size=(classes, width))
    text[:, -1] = 0

    image_generator = np.random.default_rng(seed)
    label = image_generator.integers(classes, size=n)
    is_blurred = image_generator.random(n) < blurred
    noise_size = np.where(is_blurred, 0.5, 0.15)
    noise = image_generator.normal(size=(n, width)) * noise_size[:, None]
    image = centre[label] + noise
    image[:, -1] = np.where(is_blurred, 1.0, -1.0)
    return Arrays(unit(image), unit(text), label)


def unit(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Divide each row by its norm."""
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / norm)
