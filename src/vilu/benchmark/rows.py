"""Which rows and which candidates a cell is fitted and tested on."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vilu.columns import TEXT_COLUMNS
from vilu.embeddings import Embeddings
from vilu.errors import DataError
from vilu.types import UNKNOWN, EmbeddingSource
from vilu.validate import RowNumbers

DRAW, HALVES = 1, 2
"""What a generator is for: two draws of one seed must not go together."""


def draw_rows(target: NDArray[np.int64], per_class: int, seed: int) -> NDArray[np.int64]:
    """Sorted positions of ``per_class`` labelled rows of every class, or of all where a class has fewer.

    The rows for a smaller number are among those for a larger one of the same seed.
    """
    rng = np.random.default_rng([DRAW, seed])
    order = rng.permutation(len(target))
    chosen = [order[target[order] == label][:per_class] for label in np.unique(target[target != UNKNOWN])]
    return np.sort(np.concatenate([np.empty(0, np.int64), *chosen]))


def draw_share(target: NDArray[np.int64], share: float, seed: int) -> NDArray[np.int64]:
    """Sorted positions of a share of the labelled rows, at least one; those of a smaller share are among them."""
    rows = np.random.default_rng([DRAW, seed]).permutation(np.flatnonzero(target != UNKNOWN))
    return np.sort(rows[: max(round(share * len(rows)), 1)])


def held_out(ids: Iterable[str], share: float) -> NDArray[np.bool_]:
    """(N,) whether a row is held out: where 8 bytes of the BLAKE2b hash of its identifier are below the share."""
    digests = b"".join(blake2b(i.encode(errors="surrogatepass"), digest_size=8).digest() for i in ids)
    mask: NDArray[np.bool_] = np.frombuffer(digests, dtype=">u8") < share * 2.0**64
    return mask


def class_halves(n_classes: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Classes to fit on and classes to test on, each sorted; the second half is the larger one of an odd number.

    Raises:
        DataError: If there are fewer than four classes: each half needs a choice.
    """
    if n_classes < 4:
        raise DataError(f"unseen classes need at least 4 classes, 2 to fit on and 2 to test on. Got {n_classes}.")
    order = np.random.default_rng([HALVES, seed]).permutation(n_classes)
    return np.sort(order[: n_classes // 2]), np.sort(order[n_classes // 2 :])


def of_classes(source: EmbeddingSource, classes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Positions of the rows that belong to some classes."""
    return np.flatnonzero(np.isin(source.target.numpy(), classes))


def select(
    source: EmbeddingSource,
    rows: NDArray[np.int64],
    classes: NDArray[np.int64] | None,
    columns: tuple[str, ...],
) -> Embeddings:
    """A copy in memory of some rows with some candidates (None: all of them) and those of ``columns`` that there are.

    Targets count the chosen candidates; a row of another class has none of them as its target.
    """
    index = torch.from_numpy(rows)
    found = source.candidates(index)
    kept = torch.arange(len(found.text)) if classes is None else torch.from_numpy(classes)
    position = torch.full((len(found.text) + 1,), UNKNOWN)
    position[kept] = torch.arange(len(kept))  # the last entry stays: it is where -1 points
    present = [name for name in columns if name in source.columns]
    names = source.class_names
    return Embeddings(
        source.image_rows(index),
        found.text[kept],
        position[found.target],
        class_names=None if names is None else [names[i] for i in kept.tolist()],
        ids=None if isinstance(source.ids, RowNumbers) else [source.ids[row] for row in rows.tolist()],
        space=source.space,
        columns={name: _column(source, name, index, kept) for name in present},
    )


def _column(source: EmbeddingSource, name: str, rows: Tensor, classes: Tensor) -> Tensor:
    values = source.column(name, rows)
    return values[classes] if name in TEXT_COLUMNS else values
