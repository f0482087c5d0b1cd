"""The time of ``embed``, compared with the time for the model alone.

A forward pass alone is compared with ``embed``, from JPEG bytes to a sealed store. Both get the
same pictures in the same batches, in turn, so other work on the machine slows down both.
"""

from __future__ import annotations

import io
import statistics
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from vilu.artifacts.hashing import digest
from vilu.backbones.base import Backbone
from vilu.backbones.catalog import load_backbone
from vilu.datasets.base import ImageRecord
from vilu.datasets.images import decode_image
from vilu.process import keep_freed_memory
from vilu.store.embed import embed

PHOTOS = Path(__file__).parents[1] / "../shared/data/clothing.parquet"
NAMES = ("dress", "hat", "sweater", "coat", "jeans", "shirt", "shoe", "shorts", "skirt", "t-shirt")
BATCH = 32


class Pictures:
    """Encoded pictures in memory, without labels."""

    def __init__(self, source: str, blobs: list[bytes]) -> None:
        self.source, self.blobs = source, blobs
        self.class_names: tuple[str, ...] | None = None
        self.captioned = False
        self.fingerprint = digest([len(blob) for blob in blobs])

    def __len__(self) -> int:
        return len(self.blobs)

    def records(self, start: int, stop: int) -> Iterator[ImageRecord]:
        """Yield the images at positions start ... stop - 1."""
        for i in range(start, stop):
            read = partial(bytes, self.blobs[i])
            yield ImageRecord(str(i), None, read)


def synthetic(n: int, width: int, height: int) -> list[bytes]:
    """Make JPEGs with smooth colours and some noise, compressed about as much as photos."""
    generator = np.random.default_rng(0)
    blobs = []
    for _ in range(n):
        pixels = generator.integers(0, 256, (12, 12, 3), dtype=np.uint8)
        coarse = Image.fromarray(pixels)
        resized = coarse.resize((width, height), Image.Resampling.BICUBIC)
        smooth = np.asarray(resized, dtype=np.int16)
        noise = generator.integers(-8, 9, smooth.shape)
        clipped = np.clip(smooth + noise, 0, 255)
        noisy = clipped.astype(np.uint8)
        buffer = io.BytesIO()
        image = Image.fromarray(noisy)
        image.save(buffer, "JPEG", quality=85)
        blob = buffer.getvalue()
        blobs.append(blob)
    return blobs


def photos(n: int) -> Pictures:
    if PHOTOS.exists():
        table = pq.read_table(PHOTOS, columns=["image"])
        rows = table.slice(0, n)
        blobs = rows["image"].to_pylist()
        return Pictures("clothing photos", blobs)
    blobs = synthetic(n, 224, 298)
    return Pictures("synthetic photos", blobs)


def ready_batches(pictures: Pictures, backbone: Backbone) -> list[Tensor]:
    pixels = [backbone.preprocess(decode_image(blob).image) for blob in pictures.blobs]
    return [torch.stack(pixels[i : i + BATCH]) for i in range(0, len(pixels), BATCH)]


def time_forward(backbone: Backbone, batches: list[Tensor]) -> float:
    start = time.perf_counter()
    for pixels in batches:
        backbone.encode_images(pixels)
    return time.perf_counter() - start


def time_embed(backbone: Backbone, pictures: Pictures) -> float:
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        store = Path(folder) / "store"
        embed(pictures, backbone, store, names=NAMES, batch_size=BATCH)
        return time.perf_counter() - start


def compare(backbone: Backbone, pictures: Pictures, repeats: int) -> dict[str, float | int | str]:
    batches = ready_batches(pictures, backbone)
    time_forward(backbone, batches[:2])  # warm up
    forward, whole = [], []
    for _ in range(repeats):
        forward_seconds = time_forward(backbone, batches)
        forward.append(forward_seconds)
        whole_seconds = time_embed(backbone, pictures)
        whole.append(whole_seconds)
    n = len(pictures)
    bare, end_to_end = n / statistics.median(forward), n / statistics.median(whole)
    return {
        "pixels": batches[0].shape[-1],
        "pictures": pictures.source,
        "n": n,
        "repeats": repeats,
        "forward_per_s": round(bare, 1),
        "embed_per_s": round(end_to_end, 1),
        "ratio": round(end_to_end / bare, 3),
        "ratio_min": round(min(f / w for f, w in zip(forward, whole, strict=True)), 3),
        "ratio_max": round(max(f / w for f, w in zip(forward, whole, strict=True)), 3),
    }


def main(images: int = 512, repeats: int = 5) -> dict[str, float]:
    """Print a table for both cases and return the ratios."""
    keep_freed_memory()  # for both sides of the comparison
    small_blobs = synthetic(images, 32, 32)
    cases = [
        ("compact", photos(images)),
        ("compact:128", Pictures("32 x 32", small_blobs)),
    ]
    results = [compare(load_backbone(spec), pictures, repeats) for spec, pictures in cases]
    columns = list(results[0])
    for row in [columns, *([str(result[column]) for column in columns] for result in results)]:
        print("  ".join(f"{cell:>16}" for cell in row))
    return {f"embed_{result['pixels']}_ratio": float(result["ratio"]) for result in results}


if __name__ == "__main__":
    main()
