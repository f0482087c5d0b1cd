"""The contract between readers of images and ``vilu embed``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@dataclass(frozen=True)
class Record:
    """One image, not yet read or decoded.

    Attributes:
        key: Stable identifier, unique in the data set (relative POSIX path, or the ``key`` column, or row number).
        label: Index into the data set's class names; None where unknown.
        read: Returns the encoded bytes; may raise OSError or ``BadImage``. Called from a decoding thread.
        caption: Returns the caption; may raise OSError or ``BadImage`` (stage "text"). None where images have none.
        position: In the data set; None where it follows from the order of the records.
    """

    key: str
    label: int | None
    read: Callable[[], bytes]
    caption: Callable[[], str] | None = None
    position: int | None = None


class ImageDataset(Protocol):
    """Images in a fixed order, addressable by position so that any part can be redone alone.

    Attributes:
        source: Where it came from, for people.
        class_names: Names in label order (one table per data set, the same for all splits); None when unlabelled.
        captioned: Whether records have captions, which are then the candidates; such a set has no class names.
        fingerprint: Hash of the listing (keys, labels, sizes), so that a changed input is noticed on resume.
    """

    source: str
    class_names: tuple[str, ...] | None
    captioned: bool
    fingerprint: str

    def __len__(self) -> int:
        """Number of images, readable or not; of a ``ShardedDataset``, of shards."""

    def records(self, start: int, stop: int) -> Iterator[Record]:
        """The images at positions start ... stop - 1, in order; of a ``ShardedDataset``, those in these shards."""


@runtime_checkable
class ShardedDataset(ImageDataset, Protocol):
    """Images in shards (tar files), of which only reading tells how many each holds; a part is some whole shards.

    Every sample is a record with a ``position``: the number of its shard times 2^32 plus its number there. A sample
    that cannot be used is a record whose ``read`` raises ``BadImage``, so that it is counted and listed.
    ``fingerprint`` covers the names of the shards; their content is ``shard_fingerprint``'s, part by part, so that a
    mended shard costs its own part only.
    """

    def shard_fingerprint(self, start: int, stop: int) -> str:
        """Hash of sizes and times of modification of shards start ... stop - 1."""
