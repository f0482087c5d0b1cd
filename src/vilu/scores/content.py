"""The files of a part: its rows, and the counts over them."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import numpy as np
import pyarrow as pa

from vilu.errors import StorageError
from vilu.metrics.counts import Ints
from vilu.metrics.histogram import MAX_BINS, Histogram, codes
from vilu.scores.documents import AGAIN, Receipt
from vilu.store.manifest import FileInfo
from vilu.tables import parquet_bytes, read_table

COLUMNS = ("bin", "correct", "wrong")


def histogram_bytes(histogram: Histogram) -> memoryview:
    """A histogram as the content of a Parquet file: one row per occupied bin, ascending."""
    columns = dict(zip(COLUMNS, map(pa.array, (histogram.bins, histogram.correct, histogram.wrong)), strict=True))
    ends = [histogram.low, histogram.high] if histogram.n else None
    return parquet_bytes(columns, {"kind": "histogram", "level": histogram.level, "ends": ends})


def read_histogram(root: Path, receipt: Receipt) -> Histogram:
    """The counts of a part, checked against its receipt.

    Raises:
        StorageError: If the file is not the one that the receipt vouches for, or not such a table.
    """
    path, counts = root / receipt.part.histogram, receipt.counts
    require_hash(path, receipt.files[receipt.part.histogram])
    table, metadata = read_table(path, ())
    level, ends = metadata.get("level"), metadata.get("ends")
    if table.column_names != list(COLUMNS) or any(c.type != pa.int64() or c.null_count for c in table.columns):
        raise _damaged(path, f"its columns are {table.schema.names}")
    if not isinstance(level, int) or not 0 <= level < 64 or not _are_ends(ends):
        raise _damaged(path, f"its level is {level!r} and its ends are {ends!r}")
    low, high = ends if isinstance(ends, list) else (math.inf, -math.inf)
    bins, correct, wrong = (column.to_numpy() for column in table.columns)
    histogram = Histogram(bins, correct, wrong, level, low, high)
    found = (histogram.n, histogram.n_failures)
    expected = (counts.n_scored - counts.n_unlabelled, counts.n_failures)
    if found != expected or not _in_order(histogram) or (ends is None) != (len(bins) == 0):
        raise _damaged(path, f"it counts {found} rows and failures, its receipt {expected}")
    return histogram


def require_hash(path: Path, info: FileInfo) -> None:
    """Refuse a file with other bytes than its receipt vouches for.

    Raises:
        StorageError: If it is missing or another.
    """
    try:
        with path.open("rb") as handle:
            found = hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}. {AGAIN} to redo the part.") from error
    if found != info.sha256:
        raise StorageError(f"{path} is not the file that its receipt vouches for. Remove the receipt. {AGAIN}.")


def _are_ends(ends: object) -> bool:
    if ends is None:
        return True
    return isinstance(ends, list) and len(ends) == 2 and all(isinstance(x, float) and math.isfinite(x) for x in ends)


def _in_order(histogram: Histogram) -> bool:
    bins = histogram.bins
    if not len(bins):
        return True
    occupied = len(bins) <= MAX_BINS and bool((np.diff(bins) > 0).all()) and _positive(histogram)
    first, last = codes(np.array([histogram.low, histogram.high])) >> histogram.level
    return occupied and bool(first == bins[0]) and bool(last == bins[-1])


def _positive(histogram: Histogram) -> bool:
    counts: tuple[Ints, ...] = (histogram.correct, histogram.wrong, histogram.correct + histogram.wrong - 1)
    return all(bool((count >= 0).all()) for count in counts)


def _damaged(path: Path, what: str) -> StorageError:
    return StorageError(f"{path} is no histogram: {what}. {AGAIN} into a new folder.")
