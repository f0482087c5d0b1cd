"""Provide a tiny deterministic model, tiny images and an in-memory data set for store tests."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vilu.artifacts.hashing import digest
from vilu.datasets.base import ImageRecord
from vilu.embeddings.space import EmbeddingSpace

NAMES = ("cat", "dog", "car")
DIM = 16
MAX_WORDS = 8


def picture(seed: int, size: tuple[int, int] = (20, 24), image_format: str = "PNG") -> bytes:
    """Return encoded noise with the size (width, height)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, image_format)
    return buffer.getvalue()


class FakeBackbone:
    """A model that projects 8 x 8 pixels at random, and counts its calls."""

    def __init__(self, *, dim: int = DIM, preprocess: str = "8x8", weights: str = "w0") -> None:
        generator = torch.Generator().manual_seed(7)
        self.projection = torch.randn(3 * 64, dim, generator=generator, dtype=torch.float32)
        self.space = EmbeddingSpace(
            dim,
            10.0,
            backbone="fake",
            weights=weights,
            preprocess=preprocess,
            tokenizer="sha",
            precision="fp32",
        )
        self.feature_dim = 3 * 64
        self.projections = (self.projection.T, 2 * torch.eye(dim, dtype=torch.float32))
        self.batches: list[int] = []
        self.n_texts = 0

    @property
    def n_images(self) -> int:
        return sum(self.batches)

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        small = np.asarray(image.resize((8, 8)), dtype=np.float32)
        return torch.from_numpy(small / 255 - 0.5).permute(2, 0, 1)

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        self.batches.append(len(pixels))
        return torch.nn.functional.normalize(pixels.flatten(1) @ self.projection, dim=1)

    def encode_images_and_features(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.encode_images(pixels), pixels.flatten(1)

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        return torch.nn.functional.normalize(self.encode_text_features(texts), dim=1)

    def truncates(self, texts: Sequence[str]) -> list[bool]:
        return [len(text.split()) > MAX_WORDS for text in texts]

    def encode_text_features(self, texts: Sequence[str]) -> torch.Tensor:
        self.n_texts += len(texts)
        seeds = [
            int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little") for text in texts
        ]
        rows = [
            torch.randn(
                self.projection.shape[1],
                generator=torch.Generator().manual_seed(s),
                dtype=torch.float32,
            )
            for s in seeds
        ]
        return torch.stack(rows)


@dataclass
class FakeDataset:
    """Encoded images in memory."""

    blobs: list[bytes]
    labels: list[int | None]
    keys: list[str] = field(default_factory=list)
    source: str = "/home/someone/secret/pets"
    class_names: tuple[str, ...] | None = ("n01", "n02", "n03")
    slow: float = 0.0
    unreadable: int | None = None
    captions: list[str | Exception | None] | None = None

    def __post_init__(self) -> None:
        self.keys = self.keys or [f"img/{i:04d}.png" for i in range(len(self.blobs))]

    @property
    def fingerprint(self) -> str:
        captions = [] if self.captions is None else [repr(self.captions)]
        blobs = [hashlib.sha256(blob).hexdigest() for blob in self.blobs]
        return digest([ascii(self.keys), self.labels, blobs, *captions])

    @property
    def captioned(self) -> bool:
        return self.captions is not None

    def __len__(self) -> int:
        return len(self.blobs)

    def records(self, start: int, stop: int) -> Iterator[ImageRecord]:
        for i in range(start, stop):
            caption = (
                None
                if self.captions is None or self.captions[i] is None
                else partial(self._caption, i)
            )
            yield ImageRecord(self.keys[i], self.labels[i], partial(self._read, i), caption)

    def _caption(self, i: int) -> str:
        found = self.captions[i]
        if isinstance(found, Exception):
            raise found
        return found

    def _read(self, i: int) -> bytes:
        time.sleep(self.slow * ((i * 7) % 5))  # later images are often ready first
        if i == self.unreadable:
            raise PermissionError(errno.EACCES, "Permission denied", self.keys[i])
        return self.blobs[i]


@dataclass
class FakeShards:
    """Encoded images in memory, as shards with any length.

    Attributes:
        shards: Images in each shard.
        versions: A version per shard, which is part of its fingerprint.
        captions: Whether there are captions ("image K of shard S").
        deadly: Position of an image that kills the process that reads it.
        deadly_listing: Shard that kills the process that lists it.
        unlistable: Shard that raises an error when it is listed.
        reads: Positions whose bytes were read.
    """

    shards: list[list[bytes]]
    versions: list[int] = field(default_factory=list)
    captions: bool = False
    deadly: int | None = None
    deadly_listing: int | None = None
    unlistable: int | None = None
    reads: list[int] = field(default_factory=list)
    source: str = "/home/someone/secret/{0..9}.tar"

    def __post_init__(self) -> None:
        self.versions = self.versions or [0] * len(self.shards)
        self.class_names = None if self.captions else ("n01", "n02", "n03")
        self.captioned = self.captions
        self.fingerprint = digest(["shards", len(self.shards), self.captions])

    def __len__(self) -> int:
        return len(self.shards)

    def records(self, start: int, stop: int) -> Iterator[ImageRecord]:
        for shard in range(start, stop):
            if shard == self.deadly_listing:
                os.kill(os.getpid(), signal.SIGKILL)
            if shard == self.unlistable:
                raise RuntimeError(f"cannot list shard {shard}")
            for k in range(len(self.shards[shard])):
                caption = (
                    partial("image {} of shard {}".format, k, shard) if self.captions else None
                )
                label = None if self.captions else k % 3
                position = shard * 2**32 + k
                yield ImageRecord(
                    f"{shard:02d}.tar#{k}", label, partial(self._read, position), caption, position
                )

    def shard_fingerprint(self, start: int, stop: int) -> str:
        return digest(self.versions[start:stop])

    def _read(self, position: int) -> bytes:
        if position == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        self.reads.append(position)
        return self.shards[position >> 32][position % 2**32]


def shards(*lengths: int, **settings: object) -> FakeShards:
    """Return shards with the given numbers of images."""
    return FakeShards(
        [[picture(100 * s + k) for k in range(n)] for s, n in enumerate(lengths)], **settings
    )


def dataset(
    n: int, *, bad: dict[int, bytes] | None = None, unlabelled: Sequence[int] = ()
) -> FakeDataset:
    """Return n images with different sizes. Some have other bytes, and some have no label."""
    blobs = [(bad or {}).get(i, picture(i, (16 + i % 5, 18))) for i in range(n)]
    return FakeDataset(blobs, [None if i in unlabelled else i % 3 for i in range(n)])


def tree(root: Path) -> dict[str, str]:
    """Return the hash of every file in a folder, without its locks and its log."""
    files = {}
    for path in sorted(root.rglob("*")):
        if path.is_file() and not path.name.startswith(".lock") and path.name != "log.jsonl":
            files[path.relative_to(root).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    return files
