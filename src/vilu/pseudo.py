"""Data sets with classes as image-caption pairs, so that a head can learn from several of them at once.

Shapes: N rows, D embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate, chain
from typing import overload

import numpy as np
import torch
from torch import Tensor

from vilu.errors import DataError, UsageError
from vilu.pairs import PairSource, Pools, require_full_pools
from vilu.types import UNKNOWN, EmbeddingSource
from vilu.validate import RowNumbers


class PseudoCaptions(PairSource):
    """The labelled usable images of several sources, each with the text of its class ("a photo of a ...") as caption.

    Images of all sources are in one order, which the seed of ``pools`` mixes, so that a pool holds classes of all of
    them. A class that several sources have by the same name is one caption, with the text of the first source; so is
    one text under several names.

    Args:
        sources: Rows with shared candidates, all in one embedding space.
        pools: Their size, or ``Pools`` for all choices.
        names: What the identifiers of each source's rows begin with ("name/identifier"); by default its number.

    Raises:
        UsageError: If there is no source, one has captions already, or the names are not one for each, all different.
        ProvenanceError: If the embedding spaces differ.
        DataError: If the labelled rows do not fill a pool.

    Source: ViLU (ICCV 2025), supplement C.6, which says "This is a photo of a ...".
    """

    def __init__(
        self, sources: Sequence[EmbeddingSource], pools: int | Pools = 1024, names: Sequence[str] | None = None
    ) -> None:
        names = [str(i) for i in range(len(sources))] if names is None else list(names)
        check_sources(sources, names)
        self.sources = tuple(sources)
        self.pools = Pools(pools) if isinstance(pools, int) else pools
        self.pool_size = self.pools.size
        self.space = sources[0].space
        chosen = [source.usable_rows[source.target[source.usable_rows] != UNKNOWN] for source in sources]
        self._row = torch.cat([rows.sort().values for rows in chosen])
        self._source = torch.repeat_interleave(torch.tensor([len(rows) for rows in chosen]))
        require_full_pools(len(self._row), self.pool_size, "the union of the labelled rows")
        texts = [source.candidates(source.usable_rows[:0]).text for source in sources]
        self._text, caption_of = torch.cat(texts), first_of_name(sources)
        starts = torch.tensor([0, *accumulate(map(len, texts))])[self._source]
        target = torch.cat([source.target[rows.sort().values] for source, rows in zip(sources, chosen, strict=True)])
        self._caption = caption_of[starts + target]
        self.target = torch.arange(len(self._row)) % self.pool_size
        self.status = np.zeros(len(self._row), dtype=np.uint8)
        anonymous = any(isinstance(source.ids, RowNumbers) for source in sources)
        self.ids: Sequence[str] = RowNumbers(len(self._row)) if anonymous else PrefixedIds(self, names)

    @cached_property
    def usable_rows(self) -> Tensor:
        """(M,) the rows in the order of their pools, without those that fill no last one."""
        return self._order(torch.arange(len(self._row)))

    def picture_rows(self, index: Tensor) -> Tensor:
        """(B, D) image embeddings, from the sources."""
        found = torch.empty(len(index), self.space.embed_dim)
        for i, source in enumerate(self.sources):
            here = self._source[index] == i
            if here.any():
                found[here] = source.image_rows(self._row[index[here]])
        return found

    def caption_rows(self, index: Tensor) -> Tensor:
        """(B, D) texts of the classes."""
        return self._text[self._caption[index]]

    def origin(self, row: int) -> tuple[int, int]:
        """(number of the source, row in it) of a row."""
        return int(self._source[row]), int(self._row[row])


class PrefixedIds(Sequence[str]):
    """Identifiers of the rows of several sources, made when asked for."""

    def __init__(self, rows: PseudoCaptions, names: Sequence[str]) -> None:
        self._rows, self._names = rows, names

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        source, row = self._rows.origin(range(len(self))[index])
        return f"{self._names[source]}/{self._rows.sources[source].ids[row]}"

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))


def check_sources(sources: Sequence[EmbeddingSource], names: Sequence[str]) -> None:
    """Refuse sources that cannot be one (see ``PseudoCaptions``)."""
    if not sources:
        raise UsageError("pseudo-captions need at least one data set.")
    if len(names) != len(sources) or len(set(names)) < len(names):
        raise UsageError(f"{len(sources)} data sets need as many different names. Got {', '.join(names)}.")
    for name, source in zip(names, sources, strict=True):
        if source.pool_size is not None:
            raise UsageError(f"the data set {name!r} has captions, and no classes to make some of. Leave it out.")
        sources[0].space.require_match(source.space, mine=f"data set {names[0]!r}", theirs=f"data set {name!r}")
        if not (source.target != UNKNOWN).any():
            raise DataError(f"the data set {name!r} has no labels, so its images have no captions.")


def first_of_name(sources: Sequence[EmbeddingSource]) -> Tensor:
    """(sum of K,) int64: for every class of all sources the first one of the same name; itself where it has none."""
    counts = [source.n_candidates for source in sources]
    names = chain.from_iterable(
        source.class_names or [None] * count for source, count in zip(sources, counts, strict=True)
    )
    first: dict[str, int] = {}
    found = [i if name is None else first.setdefault(name, i) for i, name in enumerate(names)]
    return torch.tensor(found, dtype=torch.int64)
