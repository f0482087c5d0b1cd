"""The contract between readers of images and ``vilu embed``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Record:
    """One image, not yet read or decoded.

    Attributes:
        key: Stable identifier, unique in the data set (relative POSIX path, or the ``key`` column, or row number).
        label: Index into the data set's class names; None where unknown.
        read: Returns the encoded bytes; may raise OSError. Called from a decoding thread.
    """

    key: str
    label: int | None
    read: Callable[[], bytes]


class ImageDataset(Protocol):
    """Images in a fixed order, addressable by position so that any part can be redone alone.

    Attributes:
        source: Where it came from, for people.
        class_names: Names in label order (one table per data set, the same for all splits); None when unlabelled.
        fingerprint: Hash of the listing (keys, labels, sizes), so that a changed input is noticed on resume.
    """

    source: str
    class_names: tuple[str, ...] | None
    fingerprint: str

    def __len__(self) -> int:
        """Number of images, readable or not."""

    def records(self, start: int, stop: int) -> Iterator[Record]:
        """The images at positions start ... stop - 1, in order."""
