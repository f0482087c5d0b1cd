"""From a path to a data set: which reader fits, and what readers there are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from vilu.datasets.base import ImageDataset, Record
from vilu.datasets.folder import FolderDataset
from vilu.datasets.table import open_table
from vilu.datasets.torchvision_layout import CifarDataset, find_layout
from vilu.errors import DataError, UsageError
from vilu.space import digest

DATASETS: Final[dict[str, str]] = {
    "folder": "DIR/CLASS/**/IMAGE, or DIR/SPLIT/CLASS/**/IMAGE with --split; a flat folder is unlabelled",
    "csv": "FILE.csv or .tsv: path (or file, filename, image_path, filepath), optionally label, split, key",
    "parquet": "FILE.parquet: image (encoded bytes, or struct of bytes and path) or path, and the rest as for csv",
    "cifar10": "cifar-10-batches-py, or the folder it is in, as torchvision unpacks it; --split train or test",
    "cifar100": "cifar-100-python, or the folder it is in, as torchvision unpacks it; --split train or test",
}
"""What ``open_dataset`` accepts, for people."""

TABLES: Final = frozenset({".csv", ".tsv", ".parquet", ".pq"})


def open_dataset(
    source: Path | str, *, split: str | None = None, limit: int | None = None, classes: Path | None = None
) -> ImageDataset:
    """Open images with the reader that fits.

    Args:
        source: A folder or file laid out in one of the ways of ``DATASETS``.
        split: Names of splits joined by ``+`` ("validation+test"); None for everything.
        limit: Keep the first ``limit`` images of the fixed order (folders are sorted by class, so this is no sample).
        classes: A classes file: one name per line, or ``folder<TAB>name``.

    Raises:
        UsageError: If an argument does not fit; the message names what there is.
        DataError: If nothing there can be read as images, or what there is contradicts itself.
        StorageError: If a folder cannot be listed.
    """
    dataset = _open(Path(source), split, classes)
    if limit is None:
        return dataset
    if limit < 1:
        raise UsageError(f"--limit must be at least 1. Got {limit} instead.")
    return FirstImages(dataset, limit) if limit < len(dataset) else dataset


def _open(source: Path, split: str | None, classes: Path | None) -> ImageDataset:
    if source.is_dir():
        found = find_layout(source)
        if found:
            layout, folder = found
            return CifarDataset(folder, layout, split=split, classes=classes)
        return FolderDataset(source, split=split, classes=classes)
    if not source.exists():
        raise UsageError(f"{source} does not exist. Expected a folder of images, or a CSV or Parquet file.")
    if not source.is_file():
        raise DataError(f"{source} is no regular file. Expected a folder of images, or a CSV or Parquet file.")
    if source.suffix.lower() in TABLES:
        return open_table(source, split=split, classes=classes)
    raise DataError(
        f"{source} is a file ending in {source.suffix or 'nothing'!r}. "
        f"Expected a folder of images, or a file ending in {', '.join(sorted(TABLES))}."
    )


class FirstImages:
    """The first images of a data set.

    Attributes:
        source: As of the whole.
        class_names: As of the whole.
        fingerprint: Hash of the whole's and the number kept.
    """

    def __init__(self, dataset: ImageDataset, limit: int) -> None:
        self.source = dataset.source
        self.class_names = dataset.class_names
        self.fingerprint = digest({"dataset": dataset.fingerprint, "limit": limit})
        self._dataset = dataset
        self._limit = limit

    def __len__(self) -> int:
        return self._limit

    def records(self, start: int, stop: int) -> Iterator[Record]:
        """The images at positions start ... stop - 1."""
        return self._dataset.records(start, min(stop, self._limit))
