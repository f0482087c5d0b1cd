"""Rows per second in shuffled order, in training and in a reader with a file per pair.

1.2 million float16 pairs with D = 512 are in 12 shards (2.4 GB, in the page cache). The readers
have different thread counts.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

SHARDS, SHARD_ROWS, D = 12, 100_000, 512
POOL = 1024
FILES = 20_000


def write_shards(root: Path, rng: np.random.Generator) -> None:
    """Write pairs in LAION's layout. Rows differ between shards, because columns are rotated."""
    for folder in ("img_emb", "text_emb"):
        (root / folder).mkdir()
        rows = rng.standard_normal((SHARD_ROWS, D), dtype=np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        half = rows.astype(np.float16)
        for number in range(SHARDS):
            np.save(root / folder / f"{folder}_{number:04d}.npy", np.roll(half, number, axis=1))


def write_files(root: Path, rng: np.random.Generator) -> None:
    """Write a file for every pair, with the image and the caption."""
    for number in range(FILES):
        pair = rng.standard_normal((2, D), dtype=np.float32)
        half = pair.astype(np.float16)
        np.save(root / f"{number}.npy", half)


def shard_pass(root: Path) -> tuple[float, float]:
    """Measure rows per second in a shuffled pass through ``steps``, and seconds for checks."""
    from vilu.store.laion import LaionPairs

    source = LaionPairs(root, logit_scale=100.0)
    start = time.perf_counter()
    rows = source.usable_rows
    checked = time.perf_counter() - start
    rates = []
    for seed in range(3):
        start, n_rows = time.perf_counter(), 0
        generator = torch.Generator().manual_seed(seed)
        shuffled = source.shuffled(rows, generator)
        for batch in source.steps(POOL, rows=shuffled):
            n_rows += len(batch.index)
        rate = n_rows / (time.perf_counter() - start)
        rates.append(rate)
    return sorted(rates)[1], checked


def file_pass(root: Path) -> float:
    """Measure rows per second in a shuffled reader with a file per pair, in the same batches."""

    def load(number: int) -> NDArray[np.float16]:
        pair: NDArray[np.float16] = np.load(root / f"{number}.npy")
        return pair

    rates = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        order = rng.permutation(FILES)
        start = time.perf_counter()
        for first in range(0, FILES, POOL):
            stacked = np.stack([load(i) for i in order[first : first + POOL]])
            pairs = torch.from_numpy(stacked).float()
            pairs.unbind(1)
        rate = FILES / (time.perf_counter() - start)
        rates.append(rate)
    return sorted(rates)[1]


def main() -> dict[str, float]:
    """Print and return the medians over three passes."""
    torch.set_num_threads(2)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        shards, files = Path(folder, "shards"), Path(folder, "files")
        shards.mkdir()
        files.mkdir()
        write_shards(shards, rng)
        write_files(files, rng)
        rate, checked = shard_pass(shards)
        one_by_one = file_pass(files)
    print(
        f"shuffled reading of pairs, D={D}: {rate:,.0f} rows/s from shards, "
        f"{one_by_one:,.0f} from a file for each "
        f"({rate / one_by_one:.0f} x); checking {SHARDS * SHARD_ROWS:,} rows before the first pass "
        f"{checked:.1f} s"
    )
    return {
        "shuffle_rows_per_s": rate,
        "file_per_row_rows_per_s": one_by_one,
        "shuffle_gain": rate / one_by_one,
    }


if __name__ == "__main__":
    main()
