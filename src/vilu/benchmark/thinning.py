"""Fewer images of a data set: evenly spaced ones, or those of the first tar files."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from vilu.datasets.base import ImageDataset, Record, ShardedDataset
from vilu.errors import UsageError
from vilu.space import digest


def thinned(images: ImageDataset, limit: int | None, shards: int | None) -> ImageDataset:
    """At most ``limit`` images; of tar files, whose images are not counted before, the first ``shards``.

    Raises:
        UsageError: If there is a limit for images in tar files, and no number of shards.
    """
    if isinstance(images, ShardedDataset):
        if shards is None and limit is not None:
            raise UsageError(
                f"{images.source} is in tar files, and only reading them tells how many images they hold: limit cannot "
                "be had. Say shards = N for the first N of them."
            )
        return images if shards is None or shards >= len(images) else FirstShards(images, shards)
    return images if limit is None or limit >= len(images) else EvenlySpaced(images, limit)


class FirstShards:
    """The first tar files of a data set.

    Attributes:
        source: As of the whole.
        class_names: As of the whole.
        captioned: As of the whole.
        fingerprint: Hash of the whole's and the number kept.
    """

    def __init__(self, images: ShardedDataset, number: int) -> None:
        self.source = images.source
        self.class_names = images.class_names
        self.captioned = images.captioned
        self.fingerprint = digest({"dataset": images.fingerprint, "first_shards": number})
        self._images = images
        self._number = number

    def __len__(self) -> int:
        return self._number

    def records(self, start: int, stop: int) -> Iterator[Record]:
        """The images in shards start ... stop - 1."""
        return self._images.records(start, stop)

    def shard_fingerprint(self, start: int, stop: int) -> str:
        """Of shards start ... stop - 1."""
        return self._images.shard_fingerprint(start, stop)


class EvenlySpaced:
    """Some images of a data set, evenly spaced: data sets are sorted by class, so the first ones are no sample.

    Attributes:
        source: As of the whole.
        class_names: As of the whole.
        captioned: As of the whole.
        fingerprint: Hash of the whole's and the number kept.
    """

    def __init__(self, images: ImageDataset, number: int) -> None:
        self.source = images.source
        self.class_names = images.class_names
        self.captioned = images.captioned
        self.fingerprint = digest({"dataset": images.fingerprint, "evenly_spaced": number})
        self._images = images
        self._positions = evenly_spaced(len(images), number)

    def __len__(self) -> int:
        return len(self._positions)

    def records(self, start: int, stop: int) -> Iterator[Record]:
        """The images at positions start ... stop - 1, read in one pass."""
        wanted = self._positions[start:stop]
        if not len(wanted):
            return
        first, last = int(wanted[0]), int(wanted[-1])
        kept = set(wanted.tolist())
        for position, record in enumerate(self._images.records(first, last + 1), start=first):
            if position in kept:
                yield record


def evenly_spaced(n: int, number: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """``number`` positions of 0 ... n - 1, in order."""
    return np.arange(number, dtype=np.int64) * n // number
