"""Sources with rows in files. Files are memory-mapped part by part and read by threads."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from torch import Tensor

from vilu.embeddings.checks import Identifiers, RowNumbers
from vilu.embeddings.pairs import PairSource, Pools, require_full_pools
from vilu.embeddings.source import EmbeddingSource
from vilu.embeddings.space import EmbeddingSpace
from vilu.errors import UNKNOWN

T = TypeVar("T")
R = TypeVar("R")


@contextmanager
def map_in_threads(
    function: Callable[[T], R], items: Iterable[T], n_threads: int, max_results_ahead: int
) -> Iterator[Iterator[R]]:
    """Call ``function`` in threads for each item. Yield an iterator over the results, in order.

    When the block ends, normally or by an exception, calls that have not started are cancelled.

    Args:
        function: The function.
        items: The arguments for the calls.
        n_threads: Number of threads.
        max_results_ahead: Maximum number of results computed in advance.
    """
    thread_pool = ThreadPoolExecutor(
        n_threads, thread_name_prefix="vilu-decode", initializer=_stay_on_one_core
    )

    def results() -> Iterator[R]:
        pending_futures: deque[Future[R]] = deque()
        for item in items:
            pending_futures.append(thread_pool.submit(function, item))
            if len(pending_futures) > max_results_ahead:
                yield pending_futures.popleft().result()
        while pending_futures:
            yield pending_futures.popleft().result()

    try:
        yield results()
    finally:
        thread_pool.shutdown(wait=True, cancel_futures=True)


def _stay_on_one_core() -> None:
    """Limit the calling thread's tensor operations to one core.

    Otherwise, each decoding thread would start several OpenMP threads, and these would compete with
    the model's threads.
    """
    # When a thread first uses torch, torch itself sets the thread's limit. This call makes torch
    # set the limit now. Otherwise torch would later replace the limit from the next line.
    torch.get_num_threads()
    # This limits only the calling thread. ``torch.set_num_threads`` would limit the whole process.
    threadpool_limits(1, user_api="openmp")


def n_cores() -> int:
    """Return the number of available cores for this process."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def default_workers() -> int:
    """Return the default number of decoding threads: one per core, at most 16."""
    return min(n_cores(), 16)


# Maximum number of mapped parts at a time. Each part needs a file descriptor, and many systems
# allow only 1024 file descriptors per process.
MAX_OPEN_PARTS = 320

PAGE_BYTES = 4096  # size of a memory page: reading a row reads at least one page
MAX_RESIDENT_BYTES = 2**28  # maximum size of mapped files in memory: 256 MiB

# Number of rows in a training block (``shuffled_in_blocks``). A block takes 128 MiB in float16 at
# width 512.
BLOCK_ROWS = 2**17
BLOCKS_PER_GROUP = 8  # number of blocks shuffled together

N_READING_THREADS = 2
"""Number of threads for reading batches in advance, while an earlier batch is used.

Each thread uses one core, since the work on a batch is too small for several cores.
"""

N_BATCHES_AHEAD = 2  # number of batches read in advance


class MappedArrays:
    """(N, ...) arrays, cut into parts by rows. A part is mapped on demand.

    Args:
        part_starts: (P + 1,) first row number in each of the P parts, and N at the end.
        row_shapes: Maps each array name to the row shape.
        open_part: Function that takes an array name and a part number, and returns the part's rows
            in any float type.
        max_open_parts: Maximum number of mapped parts at a time.
        max_resident_bytes: Maximum size of mapped files in memory, in bytes.
    """

    def __init__(
        self,
        part_starts: NDArray[np.int64],
        row_shapes: Mapping[str, tuple[int, ...]],
        open_part: Callable[[str, int], NDArray[np.floating]],
        *,
        max_open_parts: int = MAX_OPEN_PARTS,
        max_resident_bytes: int = MAX_RESIDENT_BYTES,
    ) -> None:
        self.max_open_parts = max_open_parts
        self.max_resident_bytes = max_resident_bytes
        self.part_starts = part_starts
        self.row_shapes = row_shapes
        self.open_part = open_part
        self._mapped_parts: dict[tuple[str, int], NDArray[np.floating]] = {}
        self._touched_bytes = 0  # size of the pages read since parts were last released
        self._widest_dtype = np.dtype(np.float16)  # widest float type among the parts read so far

    def __len__(self) -> int:
        return int(self.part_starts[-1])

    def take(self, array_name: str, index: Tensor) -> Tensor:
        """Return the (B, ...) float32 rows ``index`` (int64) from an array."""
        row_numbers = index.numpy()
        if row_numbers.size:
            first_row = int(row_numbers.min())
            last_row = int(row_numbers.max())
            self._require_rows(first_row, last_row)
        # In sorted order, a part's rows stand together. Part p's rows are at the positions
        # ``sorting_order[part_bounds[p] : part_bounds[p + 1]]`` in ``index``.
        sorting_order = np.argsort(row_numbers, kind="stable")
        part_bounds = np.searchsorted(row_numbers, self.part_starts, sorter=sorting_order)
        n_rows_of_parts = np.diff(part_bounds)
        used_part_numbers = np.flatnonzero(n_rows_of_parts)
        rows = np.empty((len(row_numbers), *self.row_shapes[array_name]), self._widest_dtype)
        # one part at a time, because more than ``max_open_parts`` parts may be in use
        for part_number in used_part_numbers.tolist():
            part = self._map_part(array_name, part_number)
            positions = sorting_order[part_bounds[part_number] : part_bounds[part_number + 1]]
            if part.dtype.itemsize > rows.itemsize:
                # this part has the widest float type so far, so ``rows`` gets this type
                self._widest_dtype = part.dtype.newbyteorder("=")
                rows = rows.astype(self._widest_dtype)
            indices_in_part = row_numbers[positions] - self.part_starts[part_number]
            rows[positions] = part[indices_in_part]
            row_bytes = part[:1].nbytes
            touched_bytes_per_row = max(PAGE_BYTES, row_bytes)  # the system reads whole pages
            self._touched_bytes += len(positions) * touched_bytes_per_row
        return torch.from_numpy(rows).float()  # torch converts many times faster than NumPy

    def _require_rows(self, first_row: int, last_row: int) -> None:
        """Raise IndexError unless there are rows with the numbers ``first_row`` to ``last_row``."""
        if first_row < 0 or last_row >= len(self):
            raise IndexError(
                f"rows must be from 0 to {len(self) - 1}. Got {first_row} to {last_row}."
            )

    def _map_part(self, array_name: str, part_number: int) -> NDArray[np.floating]:
        """Return a mapped part. Several threads may call this method at the same time.

        If ``max_open_parts`` or ``max_resident_bytes`` is reached, all mapped parts are released
        first. This closes the parts' files, and frees the memory for the pages read so far.
        """
        part = self._mapped_parts.get((array_name, part_number))
        is_full = part is None and len(self._mapped_parts) >= self.max_open_parts
        if is_full or self._touched_bytes >= self.max_resident_bytes:
            # the dictionary is replaced and not cleared, since another thread may be using it
            self._mapped_parts = {}
            self._touched_bytes = 0
            part = None
        if part is None:
            mapped_rows = self.open_part(array_name, part_number)
            part = np.asarray(mapped_rows)
            self._mapped_parts[array_name, part_number] = part
        return part


class MappedSource(EmbeddingSource):
    """A source with rows in files, in the order of the row numbers."""

    def _map_parts(self, function: Callable[[Tensor], R], parts: Sequence[Tensor]) -> Iterator[R]:
        """Yield ``function(part)`` for each index tensor in ``parts``, in order.

        Threads compute ``N_BATCHES_AHEAD`` results in advance.
        """
        if len(parts) < 2:
            yield from map(function, parts)
            return
        with map_in_threads(
            function, parts, n_threads=N_READING_THREADS, max_results_ahead=N_BATCHES_AHEAD
        ) as results:
            yield from results

    def shuffled(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Return the rows in a random order for a training epoch (``shuffled_in_blocks``)."""
        return shuffled_in_blocks(rows, generator)


def shuffled_in_blocks(
    rows: Tensor, generator: torch.Generator, block_rows: int = BLOCK_ROWS
) -> Tensor:
    """Return the rows in a random order that needs few blocks in memory at a time.

    A block is about ``block_rows`` rows near each other on the disk. Each block is read once.

    1. Cut the sorted rows into blocks with equal sizes.
    2. Put the blocks in random order, and form groups. A group has at most ``BLOCKS_PER_GROUP``
       blocks, and at least half as many.
    3. Shuffle the rows within each group.

    If there are no more than ``BLOCKS_PER_GROUP`` blocks, all rows are shuffled together.
    """
    n_blocks = math.ceil(len(rows) / block_rows)
    if n_blocks <= BLOCKS_PER_GROUP:
        return rows[torch.randperm(len(rows), generator=generator, device="cpu")]
    n_groups = math.ceil(n_blocks / BLOCKS_PER_GROUP)
    sorted_rows = rows.sort().values
    blocks = sorted_rows.tensor_split(n_blocks)
    order = torch.randperm(n_blocks, generator=generator)
    shuffled_groups: list[Tensor] = []
    for block_numbers in order.tensor_split(n_groups):
        group = torch.cat([blocks[number] for number in block_numbers.tolist()])
        shuffled_groups.append(group[torch.randperm(len(group), generator=generator)])
    return torch.cat(shuffled_groups)


class MappedPairs(PairSource, MappedSource):
    """Image-caption pairs in memory-mapped parts. Only a batch's or block's vectors are loaded.

    Memory holds three numbers per row: the position in the pool order and the number in the store
    (8 bytes each), and the status (1 byte). Rows after the last full pool have the status
    "short_pool". Hard pools are made within row blocks (``PairSource``).

    Args:
        path: Folder, for messages.
        mapped_arrays: The arrays with all rows.
        array_names: Names of two arrays in ``mapped_arrays``: the images and the captions.
        space: Space for both embeddings.
        pools: Settings for making the pools.
        chosen_rows: (M,) ascending numbers of this source's rows. None: all rows.
    """

    def __init__(
        self,
        path: Path,
        mapped_arrays: MappedArrays,
        array_names: tuple[str, str],
        space: EmbeddingSpace,
        pools: Pools,
        chosen_rows: NDArray[np.int64] | None,
    ) -> None:
        self.path = path
        self.space = space
        self.pools = pools
        self.pool_size = pools.size
        self._mapped_arrays = mapped_arrays
        self._array_names = array_names
        self._chosen_rows = None if chosen_rows is None else torch.from_numpy(chosen_rows)
        n_rows = len(mapped_arrays) if chosen_rows is None else len(chosen_rows)
        # A pair's target is a candidate index in a pool, so targets exist only in a batch. Here,
        # all rows' targets are unknown. ``expand`` keeps a single number in memory.
        self.target = torch.tensor(UNKNOWN).expand(n_rows)

    def picture_rows(self, index: Tensor) -> Tensor:
        """Return (B, D) float32 unit-norm image embeddings."""
        image_array, _ = self._array_names
        return self._take_rows(image_array, index)

    def caption_rows(self, index: Tensor) -> Tensor:
        """Return (B, D) float32 unit-norm caption embeddings."""
        _, caption_array = self._array_names
        return self._take_rows(caption_array, index)

    @cached_property
    def usable_rows(self) -> Tensor:
        """(M,) indices of the usable rows in full pools, in pool order."""
        usable_pairs = self.pair_rows
        require_full_pools(len(usable_pairs), self.pools.size, subject=str(self.path))
        return self._scoring_order(usable_pairs)

    def _take_rows(self, array_name: str, index: Tensor) -> Tensor:
        stored_rows = index if self._chosen_rows is None else self._chosen_rows[index]
        return self._mapped_arrays.take(array_name, stored_rows)


class ListedNumbers(RowNumbers):
    """Row numbers from a list, as identifiers. They identify no row in another source.

    The list may hold numbers or texts. For a fold, for example, it holds the numbers that the
    fold's rows have in the whole store.
    """

    def __init__(self, numbers: Sequence[str] | NDArray[np.int64]) -> None:
        super().__init__(len(numbers))
        self._numbers = numbers

    def _identifier(self, row: int) -> str:
        return str(self._numbers[row])

    # the method of RowNumbers would return the row indices and not the numbers in the list
    _identifiers = Identifiers._identifiers

    def __iter__(self) -> Iterator[str]:
        return map(str, self._numbers)


class StoredIdentifiers(Identifiers):
    """Identifiers in files. The files are read part by part, on demand.

    Args:
        part_starts: (P + 1,) first row number in each of the P parts, and the row count at the end.
        read_part: Function that takes a part number and returns the part's strings, one per row.
        chosen_rows: (M,) ascending numbers of the rows to use. None: all rows.
    """

    def __init__(
        self,
        part_starts: NDArray[np.int64],
        read_part: Callable[[int], pa.Array],
        chosen_rows: NDArray[np.int64] | None = None,
    ) -> None:
        n_rows = int(part_starts[-1]) if chosen_rows is None else len(chosen_rows)
        super().__init__(n_rows)
        self._part_starts = part_starts
        self._chosen_rows = chosen_rows
        self._read_part = lru_cache(16)(read_part)  # keeps the strings for the last 16 parts

    def __reduce__(self) -> tuple[type[StoredIdentifiers], tuple[object, ...]]:
        read_part = self._read_part.__wrapped__  # without the cache
        return StoredIdentifiers, (self._part_starts, read_part, self._chosen_rows)

    def _identifier(self, row: int) -> str:
        stored_row = row if self._chosen_rows is None else int(self._chosen_rows[row])
        # number of the part with this row: the last part with ``start <= stored_row``
        part_number = int(np.searchsorted(self._part_starts, stored_row, side="right")) - 1
        strings = self._read_part(part_number)
        index_in_part = stored_row - int(self._part_starts[part_number])
        return str(strings[index_in_part].as_py())

    def __iter__(self) -> Iterator[str]:
        for part_number, (start, stop) in enumerate(pairwise(self._part_starts)):
            strings = self._read_part(part_number)
            if self._chosen_rows is not None:
                # the rows of this part are self._chosen_rows[begin:end]
                begin, end = np.searchsorted(self._chosen_rows, [start, stop])
                index_in_part = self._chosen_rows[begin:end] - start
                strings = strings.take(pa.array(index_in_part))
            yield from strings.to_pylist()
