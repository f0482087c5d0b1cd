"""Write folders with small photos in several kinds.

For a kind, the model from ``store_fakes`` always gives the same answer.
"""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tests.builders.store_fakes import NAMES, FakeBackbone
from vilu.backbones.zeroshot import embed_class_names

KINDS = 9
"""Number of photo kinds. For the last three, the model's answer is wrong."""

SEEDS = (0, 1, 18, 39, 4, 5, 6, 7, 8)
"""A seed per kind. The model is sure about these kinds, whatever moves in the photo."""


@cache
def seen_directions() -> np.ndarray:
    """Return orthonormal pixel directions (192, K) that decide the model's answer."""
    model = FakeBackbone()
    return np.linalg.qr((model.projection @ embed_class_names(model, NAMES).T).numpy())[0]


def unseen(pixels: np.ndarray) -> np.ndarray:
    """Return pixels (8, 8, 3), without the directions that decide the answer.

    The result, made from pixels (192,), moves the embedding and changes no answer.
    """
    directions = seen_directions()
    rest = pixels - directions @ (directions.T @ pixels)
    return rest.reshape(3, 8, 8).transpose(1, 2, 0)


def photo(kind: int, number: int, size: int = 24) -> bytes:
    """Return a PNG for a kind. No two are equal or near copies for the model."""
    rng = np.random.default_rng([kind, number])
    kinds = np.random.default_rng(SEEDS[kind]).integers(0, 256, (8, 8, 3))
    cells = 127.5 + 0.8 * (kinds - 127.5) + unseen(rng.normal(0, 24, 3 * 64))
    base = cells.repeat(size // 8, 0).repeat(size // 8, 1)
    pixels = np.clip(base + rng.normal(0, 6, base.shape), 0, 255).astype(np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def answer_to(kind: int) -> int:
    """Return the model's answer for a kind, as the index of a name."""
    model = FakeBackbone()
    image = model.encode_images(model.preprocess(Image.open(io.BytesIO(photo(kind, 0))))[None])
    return int((image @ embed_class_names(model, NAMES).T).argmax())


def truth_of(kind: int) -> str:
    """Return the right name for a kind. The model misses it for the last three kinds."""
    said = answer_to(kind)
    return NAMES[said if kind < KINDS - 3 else (said + 1) % len(NAMES)]


def write_photos(folder: Path, n: int, first: int = 0) -> dict[str, str]:
    """Write ``n`` photos, all kinds in turn, and return the right name by path.

    The sub-folders are no classes.
    """
    torch.manual_seed(0)
    truths = [truth_of(kind) for kind in range(KINDS)]
    labels = {}
    for number in range(first, first + n):
        kind = number % KINDS
        path = folder / f"day {number % 2}" / f"{number:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo(kind, number))
        labels[path.relative_to(folder).as_posix()] = truths[kind]
    return labels
