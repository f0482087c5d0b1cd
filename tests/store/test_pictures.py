"""The picture's digest in the metadata must be the same from every kind of data set, under any
name.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.builders.store_fakes import FakeBackbone, picture
from tests.datasets.test_cifar import cifar
from vilu.datasets.base import ImageDataset
from vilu.datasets.catalog import open_dataset
from vilu.store.embed import embed
from vilu_bench.known_datasets.shift import ShiftedImages

BLOBS = [picture(seed) for seed in range(4)]
EXPECTED = [sha256(blob).digest()[:16] for blob in BLOBS]


def folder(root: Path) -> ImageDataset:
    for i, blob in enumerate(BLOBS):
        (root / f"c{i % 2}").mkdir(exist_ok=True)
        (root / f"c{i % 2}/{i}.png").write_bytes(blob)
    return open_dataset(root)


def paths(root: Path) -> ImageDataset:
    folder(root)
    lines = [f"c{i % 2}/{i}.png,c{i % 2}" for i in range(4)]
    (root / "list.csv").write_text("\n".join(["path,label", *lines]))
    return open_dataset(root / "list.csv")


def cells(root: Path) -> ImageDataset:
    pq.write_table(pa.table({"image": BLOBS, "label": ["a", "b", "a", "b"]}), root / "t.parquet")
    return open_dataset(root / "t.parquet")


def shards(root: Path) -> ImageDataset:
    with tarfile.open(root / "0.tar", "w") as tar:
        for i, blob in enumerate(BLOBS):
            for suffix, content in (("png", blob), ("txt", b"a picture")):
                member = tarfile.TarInfo(f"s{i}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return open_dataset(root / "0.tar")


def damaged(root: Path) -> ImageDataset:
    return ShiftedImages(folder(root), ["gaussian_noise"], 3)


def digests(images: ImageDataset, root: Path) -> list[bytes]:
    names = {} if images.captioned else {"names": images.class_names}
    embed(images, FakeBackbone(), root, part_size=3, **names)
    tables = [pq.read_table(path) for path in sorted((root / "metadata").iterdir())]
    assert all(table.schema.field("picture").type == pa.binary(16) for table in tables)
    return [one for table in tables for one in table["picture"].to_pylist()]


@pytest.mark.parametrize("kind", [folder, paths, cells, shards, damaged])
def test_the_same_bytes_have_the_same_digest(
    kind: Callable[[Path], ImageDataset], tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    assert sorted(digests(kind(tmp_path / "data"), tmp_path / "store")) == sorted(EXPECTED)


def test_of_an_array_the_digest_is_of_its_pixels(tmp_path: Path) -> None:
    """For an array, the digest must be made from the pixels.

    The array is passed on as a PNG, whose bytes depend on the library that packs it.
    """
    pixels = cifar(tmp_path, 10)
    images = open_dataset(tmp_path, split="test")
    expected = [sha256(np.ascontiguousarray(row).data).digest()[:16] for row in pixels]
    assert digests(images, tmp_path / "store") == expected
