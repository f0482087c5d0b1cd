"""A model for the kept stores, whose numbers are those of any machine:
whole numbers, one root and one division.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

import vilu

D = 12
NAMES = ("car", "cat", "cup", "dog")


def word(text: str) -> NDArray[np.int64]:
    """(D,) whole numbers from -64 to 63."""
    return (
        np.frombuffer(hashlib.blake2b(text.encode(), digest_size=D).digest(), np.uint8).astype(
            np.int64
        )
        // 2
        - 64
    )


def picture(text: str, number: int, noise: float) -> Image.Image:
    """8 x 8 pixels in four quarters, whose colours are the words of a text and noise."""
    blur = np.random.default_rng(number).normal(size=D) * noise
    values = np.clip(sum(word(part) for part in text.split()) + blur + 128, 0, 255).astype(np.uint8)
    return Image.fromarray(values.reshape(2, 2, 3).repeat(4, axis=0).repeat(4, axis=1))


class Tiny:
    """The four colours of a picture, mixed; a text is the sum of its words."""

    def __init__(self, fails_after: int | None = None) -> None:
        parts = {
            "weights": "tiny 1",
            "preprocess": "four pixels",
            "tokenizer": "words",
            "precision": "fp32",
        }
        self.space = vilu.EmbeddingSpace(D, 12.0, backbone="tiny", **parts)
        self.feature_dim = D
        self.projections = (torch.eye(D) + torch.eye(D).roll(1, 0), 2 * torch.eye(D))
        self.fails_after = fails_after

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        small = np.asarray(image.resize((2, 2), Image.Resampling.NEAREST), dtype=np.float32)
        return torch.from_numpy(small - 128).permute(2, 0, 1)

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.encode_images_and_features(pixels)[0]

    def encode_images_and_features(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.fails_after is not None:
            self.fails_after -= len(pixels)
            if self.fails_after < 0:
                raise KeyboardInterrupt
        features = pixels.permute(0, 2, 3, 1).flatten(1)
        return torch.nn.functional.normalize(features @ self.projections[0].T, dim=1), features

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        return torch.nn.functional.normalize(
            self.encode_text_features(texts) @ self.projections[1].T, dim=1
        )

    def truncates(self, texts: Sequence[str]) -> list[bool]:
        return [False] * len(texts)

    def encode_text_features(self, texts: Sequence[str]) -> torch.Tensor:
        """The words mixed as the colours are, so that both meet."""
        sums = np.stack([sum(word(part) for part in text.strip(".").split()) for text in texts])
        return torch.from_numpy(sums + np.roll(sums, 1, axis=1)).float()


def embed_classes(pictures: Path, part: str, output: Path, model: Tiny) -> None:
    """A part of the labelled pictures with every column, three parts of 16 images."""
    vilu.embed(
        vilu.open_dataset(pictures / "classes", split=part),
        model,
        output,
        names=NAMES,
        templates=["a {}.", "the {}."],
        prompts=["a {}.", "the {}."],
        features=True,
        views=2,
        seed=3,
        max_error_rate=0.1,
        part_size=16,
        split=part,
        batch_size=8,
        workers=1,
    )


def embed_captions(pictures: Path, output: Path, model: Tiny) -> None:
    """The pictures of the table, with features."""
    images = vilu.open_dataset(pictures / "captions.csv")
    vilu.embed(images, model, output, features=True, part_size=16, batch_size=8, workers=1)


def embed_tars(pictures: Path, output: Path, model: Tiny) -> None:
    """The pictures of the tars, a part for each."""
    images = vilu.open_dataset(f"{pictures}/{{0..1}}.tar")
    vilu.embed(images, model, output, part_size=1, batch_size=8, workers=1)
