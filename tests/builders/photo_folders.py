"""Folders of small photos of a few kinds:
of each kind the model of ``store_fakes`` always says the same.
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
"""Kinds of photos; of the last three the model's answer is wrong."""

SEEDS = (0, 1, 18, 39, 4, 5, 6, 7, 8)
"""Of the kinds: those of which the model is sure, whatever moves in the photo."""


@cache
def seen_directions() -> np.ndarray:
    """(192, K) orthonormal directions of pixels that decide what the model says."""
    model = FakeBackbone()
    return np.linalg.qr((model.projection @ embed_class_names(model, NAMES).T).numpy())[0]


def unseen(pixels: np.ndarray) -> np.ndarray:
    """(8, 8, 3) pixels that move the embedding, but no answer, of pixels (192,)."""
    directions = seen_directions()
    rest = pixels - directions @ (directions.T @ pixels)
    return rest.reshape(3, 8, 8).transpose(1, 2, 0)


def photo(kind: int, number: int, size: int = 24) -> bytes:
    """A PNG of a kind; no two are equal, nor near copies for the model."""
    rng = np.random.default_rng([kind, number])
    kinds = np.random.default_rng(SEEDS[kind]).integers(0, 256, (8, 8, 3))
    cells = 127.5 + 0.8 * (kinds - 127.5) + unseen(rng.normal(0, 24, 3 * 64))
    base = cells.repeat(size // 8, 0).repeat(size // 8, 1)
    pixels = np.clip(base + rng.normal(0, 6, base.shape), 0, 255).astype(np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def answer_to(kind: int) -> int:
    """What the model says of a kind: the place of a name."""
    model = FakeBackbone()
    image = model.encode_images(model.preprocess(Image.open(io.BytesIO(photo(kind, 0))))[None])
    return int((image @ embed_class_names(model, NAMES).T).argmax())


def truth_of(kind: int) -> str:
    """Its right name, which the model misses on the last three kinds."""
    said = answer_to(kind)
    return NAMES[said if kind < KINDS - 3 else (said + 1) % len(NAMES)]


def write_photos(folder: Path, n: int, first: int = 0) -> dict[str, str]:
    """``n`` photos of all kinds in turn, in sub-folders that are no classes; path to right name."""
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
