"""Parts: the unit of work, of loss on a crash, and of a file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from vilu.errors import ProvenanceError, StorageError
from vilu.space import digest
from vilu.store.document import read_document
from vilu.store.manifest import IMAGE, Inputs, Receipt, Run

SHARD = 2**32
"""Positions of each shard: an image's is the number of its shard times this, plus its number there."""


@dataclass(frozen=True)
class Part:
    """Images ``start`` ... ``stop - 1`` of the data set, or the images of so many shards; and what is kept of them.

    File names follow LAION's layout, so its tools read the vectors and the metadata as they are.

    Attributes:
        number: Of the part.
        start: Position of its first image, or number of its first shard.
        stop: Position after its last image, or number after its last shard.
        arrays: What is kept of each image, by name (``Inputs.arrays``).
    """

    number: int
    start: int
    stop: int
    arrays: tuple[str, ...] = (IMAGE,)

    def array(self, name: str) -> str:
        """(n_ok, ...) rows of an array."""
        return f"{name}/{name}_{self.number:05d}.npy"

    @property
    def metadata(self) -> str:
        """One row per embedding, in the same order."""
        return f"metadata/metadata_{self.number:05d}.parquet"

    @property
    def errors(self) -> str:
        """One row per image without an embedding."""
        return f"errors/errors_{self.number:05d}.parquet"

    @property
    def receipt(self) -> str:
        """Written last."""
        return f"receipts/{self.number:05d}.json"

    @property
    def attempts(self) -> str:
        """One byte for each time that the part was begun and its process died."""
        return f"attempts/{self.number:05d}"

    @property
    def files(self) -> tuple[str, ...]:
        """What the receipt vouches for, in the order in which it is written."""
        image, *others = map(self.array, self.arrays)
        return image, self.metadata, self.errors, *others

    def __len__(self) -> int:
        return self.stop - self.start


def plan(run: Inputs) -> list[Part]:
    """All parts of a run; they depend on nothing but the number of images (or shards) and the part size."""
    starts = range(0, run.extent, run.part_size)
    arrays = tuple(run.arrays)
    return [Part(i, start, min(start + run.part_size, run.extent), arrays) for i, start in enumerate(starts)]


def positions(run: Inputs, part: Part) -> range:
    """Where the positions of a part's images are; of shards not all of them are taken."""
    return range(part.start * SHARD, part.stop * SHARD) if run.shards else range(part.start, part.stop)


def read_receipt(root: Path, run: Run, part: Part) -> Receipt:
    """The receipt of a part that is there in full.

    Raises:
        StorageError: If the receipt or one of its files is missing or has another size than it vouches for.
        ProvenanceError: If it belongs to another run.
    """
    path = root / part.receipt
    receipt = read_document(path, Receipt)
    if receipt.fingerprint != run.fingerprint:
        raise ProvenanceError(
            f"{path} belongs to run {receipt.fingerprint}, the store to run {run.fingerprint}. "
            "Run `vilu embed` again to redo the part."
        )
    n_in = receipt.n_in if run.shards else len(part)  # how many images shards hold, only the receipt knows
    found = (receipt.part, receipt.start, receipt.stop, receipt.n_in, tuple(receipt.files))
    expected = (part.number, part.start, part.stop, n_in, part.files)
    if found != expected:
        raise StorageError(f"{path} is damaged: it describes {found}, expected {expected}. Run `vilu embed` again.")
    for name, info in receipt.files.items():
        require_size(root / name, info.bytes)
    return receipt


def content_hash(receipts: Iterable[Receipt]) -> str:
    """Hash over the hashes of every file of every part, in order."""
    return digest([info.sha256 for receipt in receipts for info in receipt.files.values()])


def require_size(path: Path, size: int) -> None:
    """Refuse a file of another size.

    Raises:
        StorageError: If it is missing or longer or shorter.
    """
    found = path.stat().st_size if path.is_file() else None
    if found != size:
        state = "is missing" if found is None else f"has {found} bytes"
        raise StorageError(f"{path} {state}, its receipt says {size} bytes. Run `vilu embed` again to redo the part.")
