"""Rows in files as a source: mapped into memory part by part, and read by several threads."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from torch import Tensor

from vilu.embeddings.checks import SHORT_POOL, VALID, Identifiers, RowNumbers
from vilu.embeddings.pairs import PairSource, Pools, require_full_pools
from vilu.embeddings.source import EmbeddingSource
from vilu.embeddings.space import EmbeddingSpace
from vilu.errors import UNKNOWN

T = TypeVar("T")
R = TypeVar("R")


@contextmanager
def in_threads(
    function: Callable[[T], R], items: Iterable[T], workers: int, ahead: int
) -> Iterator[Iterator[R]]:
    """Results of ``function`` in the order of ``items``, by threads, at most ``ahead`` in advance.

    On leaving the block, also by an exception, nothing more is begun.
    """
    pool = ThreadPoolExecutor(
        workers, thread_name_prefix="vilu-decode", initializer=_stay_on_one_core
    )

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
    """Keep the tensors of a decoding thread on its own core.

    Otherwise every such thread has a team of threads, and they all fight with the model's.
    ``torch.set_num_threads`` would change the whole process, the limit of OpenMP is this thread's
    own.
    """
    torch.get_num_threads()  # at its first use in a thread torch sets the limit itself
    threadpool_limits(1, user_api="openmp")


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def default_workers() -> int:
    """Decoding threads: one per core, at most 16."""
    return min(cores(), 16)


# parts of a source that are mapped at a time, each with a file descriptor, of which a process
# often has 1024
OPEN_PARTS = 320

PAGE = 4096  # bytes that come with every row that is read, at least
MAX_RESIDENT = 2**28  # bytes of all rows that were read that may stay in memory

# rows that a pass of training reads together; 128 MiB in float16 at a width of 512
BLOCK_ROWS = 2**17
GROUP_BLOCKS = 8  # blocks whose rows are mixed; so many are read from at a time

READERS = 2
"""Threads that read batches ahead: the disk works while a batch is used.

Each computes on one core, since the work on a batch is too small to be shared out.
"""

AHEAD = 2  # batches that they read ahead


class MappedParts:
    """(N, ...) arrays cut into parts along their rows, each mapped when a row of it is asked for.

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
        self.starts = starts
        self.shapes = shapes
        self.open_part = open_part
        self._mapped: dict[tuple[str, int], NDArray[np.floating]] = {}
        self._touched = 0  # bytes of the pages that were read since all parts were let go of
        self._widest = np.dtype(np.float16)  # type of the parts read so far

    def __len__(self) -> int:
        return int(self.starts[-1])

    def take(self, name: str, index: Tensor) -> Tensor:
        """(B, ...) float32 rows ``index`` (int64) of an array."""
        wanted = index.numpy()
        if wanted.size:
            self._require_inside(int(wanted.min()), int(wanted.max()))
        # sorted by part: indices order[bounds[p] : bounds[p + 1]] of ``wanted`` are in part p
        order = np.argsort(wanted, kind="stable")
        bounds = np.searchsorted(wanted, self.starts, sorter=order)
        rows = np.empty((len(wanted), *self.shapes[name]), self._widest)
        # one part at a time: all of them may be too many to hold open
        for number in np.flatnonzero(np.diff(bounds)).tolist():
            part = self._part(name, number)
            of_part = order[bounds[number] : bounds[number + 1]]
            if part.dtype.itemsize > rows.itemsize:
                self._widest = part.dtype.newbyteorder("=")
                rows = rows.astype(self._widest)
            rows[of_part] = part[wanted[of_part] - self.starts[number]]
            self._touched += len(of_part) * max(PAGE, part[:1].nbytes)
        return torch.from_numpy(rows).float()  # many times faster than numpy's conversion

    def _require_inside(self, least: int, most: int) -> None:
        if least < 0 or most >= len(self):
            raise IndexError(f"rows must be from 0 to {len(self) - 1}. Got {least} to {most}.")

    def _part(self, name: str, number: int) -> NDArray[np.floating]:
        """A part, mapped. All are let go of when they are many, or when many pages were read.

        Otherwise the system counts these as ours until it needs the room. Several threads may ask.
        """
        part = self._mapped.get((name, number))
        is_full = part is None and len(self._mapped) >= OPEN_PARTS
        if is_full or self._touched >= MAX_RESIDENT:
            # a new dict, not cleared: another thread may look into the old one just now
            self._mapped = {}
            self._touched = 0
            part = None
        if part is None:
            part = np.asarray(self.open_part(name, number))
            self._mapped[name, number] = part
        return part


class MappedSource(EmbeddingSource):
    """A source whose rows are in files: what is near by number is near on the disk."""

    def _map_parts(self, make: Callable[[Tensor], R], parts: Sequence[Tensor]) -> Iterator[R]:
        """As every source's, but ahead, by threads, at most ``AHEAD`` of them."""
        if len(parts) < 2:
            yield from map(make, parts)
            return
        with in_threads(make, parts, READERS, AHEAD) as results:
            yield from results

    def shuffled(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """The rows in a random order for one pass of training.

        More than ``GROUP_BLOCKS`` blocks of ``BLOCK_ROWS`` are shuffled in two levels: the rows, in
        the order of the disk, are cut into equal blocks, the blocks come in random order, and the
        rows of each ``GROUP_BLOCKS`` of them (at least half as many) are mixed. So a pass reads few
        blocks at a time, and each of them once.
        """
        n_blocks = math.ceil(len(rows) / BLOCK_ROWS)
        if n_blocks <= GROUP_BLOCKS:
            return super().shuffled(rows, generator)
        n_groups = math.ceil(n_blocks / GROUP_BLOCKS)
        blocks = rows.sort().values.tensor_split(n_blocks)
        order = torch.randperm(n_blocks, generator=generator)
        mixed: list[Tensor] = []
        for group in order.tensor_split(n_groups):
            members = torch.cat([blocks[number] for number in group.tolist()])
            mixed.append(members[torch.randperm(len(members), generator=generator)])
        return torch.cat(mixed)


class MappedPairs(PairSource, MappedSource):
    """Pairs in memory-mapped parts: of the vectors only a batch's or a block's are in memory.

    Per row there are its place in the order of the pools and in the fold (8 bytes each) and its
    status (1 byte). Rows that fill no last pool have the status "short_pool". Hard pools are made
    of blocks of rows (``PairSource``).
    """

    def __init__(
        self,
        path: Path,
        rows: MappedParts,
        arrays: tuple[str, str],
        space: EmbeddingSpace,
        pools: Pools,
        chosen: NDArray[np.int64] | None,
    ) -> None:
        self.path = path
        self.space = space
        self.pools = pools
        self.pool_size = pools.size
        self._rows = rows
        self._arrays = arrays
        self._chosen = None if chosen is None else torch.from_numpy(chosen)
        n_rows = len(rows) if chosen is None else len(chosen)
        # a target is a candidate of a pool, so only batches know it; one number stands for all rows
        self.target = torch.tensor(UNKNOWN).expand(n_rows)

    def picture_rows(self, index: Tensor) -> Tensor:
        """(B, D) float32 unit-norm image embeddings."""
        return self._take(self._arrays[0], index)

    def caption_rows(self, index: Tensor) -> Tensor:
        """(B, D) float32 unit-norm caption embeddings."""
        return self._take(self._arrays[1], index)

    @cached_property
    def usable_rows(self) -> Tensor:
        """(M,) positions of the usable rows that fill pools, in the order of the pools."""
        usable = self.pair_rows
        require_full_pools(len(usable), self.pools.size, str(self.path))
        return self._order(usable)

    @property
    def pair_rows(self) -> Tensor:
        """(M,) positions of the usable rows, ascending."""
        if self._left is not None:
            return self._left
        return torch.from_numpy(np.flatnonzero(self._row_status == VALID))

    @cached_property
    def status(self) -> NDArray[np.uint8]:
        """(N,) status of the rows; it takes the order of the pools to know it."""
        status = np.where(self._row_status == VALID, np.uint8(SHORT_POOL), self._row_status)
        status[self.usable_rows.numpy()] = VALID
        return status

    @cached_property
    def _row_status(self) -> NDArray[np.uint8]:
        """(N,) status of the embeddings themselves."""
        return np.broadcast_to(np.uint8(VALID), len(self))

    def _take(self, name: str, index: Tensor) -> Tensor:
        stored = index if self._chosen is None else self._chosen[index]
        return self._rows.take(name, stored)


class ChosenNumbers(RowNumbers):
    """Numbers of some rows, or as they were before rows were set aside."""

    def __init__(self, numbers: Sequence[str] | NDArray[np.int64]) -> None:
        super().__init__(len(numbers))
        self._numbers = numbers

    def _of(self, row: int) -> str:
        return str(self._numbers[row])

    _several = Identifiers._several

    def __iter__(self) -> Iterator[str]:
        return map(str, self._numbers)


class PartStrings(Identifiers):
    """A string for every row, read part by part when asked for."""

    def __init__(
        self,
        starts: NDArray[np.int64],
        read: Callable[[int], pa.Array],
        rows: NDArray[np.int64] | None = None,
    ) -> None:
        super().__init__(int(starts[-1]) if rows is None else len(rows))
        self._starts = starts
        self._rows = rows
        self._read = lru_cache(16)(read)

    def __reduce__(self) -> tuple[type[PartStrings], tuple[object, ...]]:
        return PartStrings, (self._starts, self._read.__wrapped__, self._rows)

    def _of(self, row: int) -> str:
        stored = row if self._rows is None else int(self._rows[row])
        part = int(np.searchsorted(self._starts, stored, side="right")) - 1
        strings = self._read(part)
        return str(strings[stored - int(self._starts[part])].as_py())

    def __iter__(self) -> Iterator[str]:
        bounds = zip(self._starts[:-1], self._starts[1:], strict=True)
        for number, (start, stop) in enumerate(bounds):
            strings = self._read(number)
            if self._rows is not None:
                first, last = np.searchsorted(self._rows, [start, stop])
                strings = strings.take(pa.array(self._rows[first:last] - start))
            yield from strings.to_pylist()
