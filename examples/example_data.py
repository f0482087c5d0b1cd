"""What the examples work on: photos of clothes that ship with vilu, and simulated embeddings.

No example of its own. The photos are real. The simulated embeddings are those of a model that is
often wrong about half of its images, as it would be about blurred ones, and can know which half
that is.
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
"""The classes of the photos, as they stand in prompts."""

SMALL_MODEL = "compact:128"
"""The model of ``vilu[compact]`` at 128 pixels, where a core embeds about 80 photos a second."""


def photos_on_disk(
    folder: Path,
    n: int,
    *,
    skip: int = 0,
    in_class_folders: bool = False,
    kinds: Collection[str] = NAMES,
) -> dict[str, str]:
    """Write ``n`` random photos of some kinds into a folder; what each shows, by its path in there.

    They are always in the same random order, so that those after ``skip`` are others than those
    before.
    """
    with resources.as_file(resources.files("vilu") / "assets" / "clothing.parquet") as path:
        rows = pq.read_table(path, columns=["image", "label"])
    labels = rows["label"].to_pylist()
    order = np.random.default_rng(0).permutation(len(rows)).tolist()
    of_kinds = [number for number in order if NAMES[labels[number]] in kinds]
    truth = {}
    for number in of_kinds[skip : skip + n]:
        name = NAMES[labels[number]]
        file = folder / (name if in_class_folders else "") / f"{number:04}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(rows["image"][number].as_py())
        truth[file.relative_to(folder).as_posix()] = name
    return truth


class Arrays(NamedTuple):
    """Embeddings as any model gives them."""

    image: NDArray[np.float64]  # (N, D)
    text: NDArray[np.float64]  # (K, D), one row a class
    label: NDArray[np.int64]  # (N,) what the images show


def simulated(
    n: int, *, seed: int, blurred: float = 0.5, classes: int = 6, width: int = 24
) -> Arrays:
    """Images of some classes; the share ``blurred`` is often missed; the last coordinate tells.

    Texts say only roughly where the images of a class lie, as those of real models do.
    """
    world, random = (
        np.random.default_rng(2026),
        np.random.default_rng(seed),
    )  # every call is about the same classes
    centre = world.normal(size=(classes, width))
    centre[:, -1] = 0
    centre /= np.linalg.norm(centre, axis=1, keepdims=True)
    text = centre + 0.15 * world.normal(size=(classes, width))
    text[:, -1] = 0
    label = random.integers(classes, size=n)
    is_blurred = random.random(n) < blurred
    image = (
        centre[label] + random.normal(size=(n, width)) * np.where(is_blurred, 0.5, 0.15)[:, None]
    )
    image[:, -1] = np.where(is_blurred, 1.0, -1.0)
    return Arrays(unit(image), unit(text), label)


def unit(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rows of unit norm."""
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))
