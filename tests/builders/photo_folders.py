"""Folders of small photos of a few kinds: of each kind the model of ``store_fakes`` always says the same."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tests.builders.store_fakes import NAMES, FakeBackbone
from vilu.backbones.zeroshot import class_texts

KINDS = 9
"""Kinds of photos; of the last three the model's answer is wrong."""


def photo(kind: int, number: int, size: int = 24) -> bytes:
    """A PNG of a kind; no two are equal."""
    rng = np.random.default_rng([kind, number])
    base = (
        np.random.default_rng(kind)
        .integers(0, 256, (8, 8, 3))
        .repeat(size // 8, 0)
        .repeat(size // 8, 1)
    )
    pixels = np.clip(base + rng.normal(0, 6, base.shape), 0, 255).astype(np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def answer_to(kind: int) -> int:
    """What the model says of a kind: the place of a name."""
    model = FakeBackbone()
    image = model.encode_images(model.preprocess(Image.open(io.BytesIO(photo(kind, 0))))[None])
    return int((image @ class_texts(model, NAMES).T).argmax())


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
