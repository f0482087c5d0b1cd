"""Parts of a store, mapped into memory and read by several threads."""

from __future__ import annotations

import mmap
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from typing import TypeVar, overload

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from torch import Tensor

from vilu.embeddings.source import Batch, EmbeddingSource

T = TypeVar("T")
R = TypeVar("R")


@contextmanager
def in_threads(function: Callable[[T], R], items: Iterable[T], workers: int, ahead: int) -> Iterator[Iterator[R]]:
    """Results of ``function`` in the order of ``items``, worked out by threads, at most ``ahead`` of them in advance.

    On leaving the block, also by an exception, nothing more is begun.
    """
    pool = ThreadPoolExecutor(workers, thread_name_prefix="vilu-decode", initializer=_stay_on_one_core)

    def results() -> Iterator[R]:
        pending: deque[Future[R]] = deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    try:
        yield results()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _stay_on_one_core() -> None:
    """Otherwise every decoding thread has a team of threads for its tensors, and they all fight with the model's.

    ``torch.set_num_threads`` would change the whole process, the limit of OpenMP is this thread's own.
    """
    torch.get_num_threads()  # at its first use in a thread torch sets the limit itself
    threadpool_limits(1, user_api="openmp")


def default_workers() -> int:
    """Decoding threads: one per core that this process may use, at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 16)


OPEN_PARTS = 256
"""Parts kept mapped at a time; each takes a file descriptor, of which a process often has 1024."""

PAGE, MAX_RESIDENT = 4096, 2**28
"""Bytes that come with every row that is read, at least, and that may stay in memory of all that were."""

BLOCK_ROWS = 2**17
"""Rows that a pass of training reads together; 128 MiB in float16 at a width of 512."""

GROUP_BLOCKS = 8
"""Blocks whose rows are mixed; so many are read from at a time."""

READERS, AHEAD = 2, 2
"""Threads that read batches ahead, and how many: the disk works while a batch is used. Each computes on one core, since
the work on a batch is too small to be shared out."""


class MappedParts:
    """(N, ...) arrays cut into parts along their rows; a part is mapped when a row of it is asked for.

    Args:
        starts: (P + 1,) number of the first row of every part, and N.
        shapes: What there is, by name, with the shape of one row.
        open_part: (name, number of a part) -> its rows, of any float type.
    """

    def __init__(
        self,
        starts: NDArray[np.int64],
        shapes: Mapping[str, tuple[int, ...]],
        open_part: Callable[[str, int], NDArray[np.floating]],
    ) -> None:
        self.starts, self.shapes, self.open_part = starts, shapes, open_part
        self.part = lru_cache(OPEN_PARTS)(lambda name, number: np.asarray(open_part(name, number)))
        self._resident: dict[int, NDArray[np.floating]] = {}
        self._touched = 0

    def __len__(self) -> int:
        return int(self.starts[-1])

    def take(self, name: str, index: Tensor) -> Tensor:
        """(B, ...) float32 rows ``index`` (int64) of an array.

        Raises:
            IndexError: If an index is not in 0 ... N-1.
        """
        wanted = index.numpy()
        if wanted.size and not (wanted.min() >= 0 and wanted.max() < len(self)):
            raise IndexError(f"rows must be from 0 to {len(self) - 1}. Got {wanted.min()} to {wanted.max()}.")
        order = np.argsort(wanted, kind="stable")
        bounds = np.searchsorted(wanted, self.starts, sorter=order)
        touched = np.flatnonzero(np.diff(bounds))
        parts = [self.part(name, int(number)) for number in touched]
        number_format = np.result_type(*(part.dtype.newbyteorder("=") for part in parts), np.float16)
        rows = np.empty((len(wanted), *self.shapes[name]), dtype=number_format)
        for number, part in zip(touched, parts, strict=True):
            places = order[bounds[number] : bounds[number + 1]]
            rows[places] = part[wanted[places] - self.starts[number]]
        self._release(parts, len(wanted))
        return torch.from_numpy(rows).float()  # many times faster than numpy's conversion

    def _release(self, parts: Sequence[NDArray[np.floating]], n_rows: int) -> None:
        """Give pages back that were read long ago, which the system would count as ours until it needs the room."""
        self._resident |= {id(part): part for part in parts}
        self._touched += n_rows * max([PAGE, *(part[:1].nbytes for part in parts)])
        if self._touched < MAX_RESIDENT:
            return
        resident, self._resident, self._touched = self._resident, {}, 0
        for part in resident.values():
            mapped = getattr(part.base, "_mmap", None)
            if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED)


class MappedSource(EmbeddingSource):
    """A source whose rows are in files: what is near by number is near on the disk."""

    def steps(self, size: int, *, rows: Tensor | None = None, columns: Sequence[str] = ()) -> Iterator[Batch]:
        """As every source's, but read ahead by threads, at most ``AHEAD`` batches."""
        rows = self.usable_rows if rows is None else rows
        size = self.pool_size or size
        parts = rows[: len(rows) // size * size if self.pool_size else len(rows)].split(size)
        if len(rows) <= size:
            yield from super().steps(size, rows=rows, columns=columns)
            return
        with in_threads(lambda part: self._batch(part, columns), parts, READERS, AHEAD) as batches:
            yield from batches

    def shuffled(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """The rows in a random order for one pass of training.

        More than ``GROUP_BLOCKS`` blocks of ``BLOCK_ROWS`` are shuffled in two levels: the rows, in the order of the
        disk, are cut into equal blocks, the blocks come in random order, and the rows of each ``GROUP_BLOCKS`` of them
        (at least half as many) are mixed. So a pass reads few blocks at a time, and each of them once.
        """
        n_blocks = -(-len(rows) // BLOCK_ROWS)
        if n_blocks <= GROUP_BLOCKS:
            return super().shuffled(rows, generator)
        blocks = rows.sort().values.tensor_split(n_blocks)
        order = torch.randperm(n_blocks, generator=generator).tensor_split(-(-n_blocks // GROUP_BLOCKS))
        groups = (torch.cat([blocks[int(number)] for number in group]) for group in order)
        return torch.cat([group[torch.randperm(len(group), generator=generator)] for group in groups])


class PartStrings(Sequence[str]):
    """A string for every row, read part by part when asked for.

    Args:
        starts: As in ``MappedParts``.
        read: Number of a part -> its strings.
        rows: The rows that are part of the sequence, ascending; None for all.
    """

    def __init__(
        self, starts: NDArray[np.int64], read: Callable[[int], pa.Array], rows: NDArray[np.int64] | None = None
    ) -> None:
        self._starts, self._rows = starts, rows
        self._read = lru_cache(16)(read)

    def __len__(self) -> int:
        return int(self._starts[-1]) if self._rows is None else len(self._rows)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        places = range(len(self))[index]
        if isinstance(places, range):
            return [self[place] for place in places]
        row = places if self._rows is None else int(self._rows[places])
        part = int(np.searchsorted(self._starts, row, side="right")) - 1
        return str(self._read(part)[row - int(self._starts[part])].as_py())

    def __iter__(self) -> Iterator[str]:
        for number, (start, stop) in enumerate(zip(self._starts[:-1], self._starts[1:], strict=True)):
            strings = self._read(number)
            if self._rows is not None:
                first, last = np.searchsorted(self._rows, [start, stop])
                strings = strings.take(pa.array(self._rows[first:last] - start))
            yield from strings.to_pylist()
