"""Data sets with classes as image-caption pairs, so that a head can learn from several of them at once.

Shapes: N rows, D embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import overload

import torch
from torch import Tensor

from vilu.errors import DataError, UsageError
from vilu.pairs import PairSource, Pools, require_full_pools
from vilu.types import UNKNOWN, EmbeddingSource
from vilu.validate import RowNumbers


class PseudoCaptions(PairSource):
    """The labelled usable images of several sources, each with the text of its class ("a photo of a ...") as caption.

    Sources that have captions bring their own. Images of all sources are in one order, which the seed of ``pools``
    mixes, so that a pool holds captions of all of them. A class that several sources have by the same name is one
    caption, with the text of the first source; so is one text under several names.

    Args:
        sources: Rows with shared candidates or image-caption pairs, all in one embedding space.
        pools: Their size, or ``Pools`` for all choices.
        names: What the identifiers of each source's rows begin with ("name/identifier"); by default its number.

    Raises:
        UsageError: If there is no source, or the names are not one for each, all different.
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
        chosen = [labelled_rows(source) for source in sources]
        self._row = torch.cat(chosen)
        self._source = torch.repeat_interleave(torch.tensor([len(rows) for rows in chosen]))
        require_full_pools(len(self._row), self.pool_size, "the union of the labelled rows")
        self._text, self._caption = class_captions(sources, chosen)
        self.target = torch.arange(len(self._row)) % self.pool_size
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
            here, rows = self._of_source(i, index)
            found[here] = source.picture_rows(rows) if isinstance(source, PairSource) else source.image_rows(rows)
        return found

    def caption_rows(self, index: Tensor) -> Tensor:
        """(B, D) texts of the classes, and captions where the source has some."""
        found = self._text[self._caption[index]]
        for i, source in enumerate(self.sources):
            if isinstance(source, PairSource):
                here, rows = self._of_source(i, index)
                found[here] = source.caption_rows(rows)
        return found

    def of_classes(self, index: Tensor) -> Tensor:
        """(B,) bool: those whose source has no captions of its own."""
        return self._caption[index] > 0

    def _of_source(self, number: int, index: Tensor) -> tuple[Tensor, Tensor]:
        """Places in ``index`` that hold rows of a source, and which of its rows."""
        here = (self._source[index] == number).nonzero().squeeze(1)
        return here, self._row[index[here]]

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
        sources[0].space.require_match(source.space, mine=f"data set {names[0]!r}", theirs=f"data set {name!r}")
        if source.pool_size is None and not (source.target != UNKNOWN).any():
            raise DataError(f"the data set {name!r} has no labels, so its images have no captions.")


def labelled_rows(source: EmbeddingSource) -> Tensor:
    """(M,) sorted rows whose caption is known: labelled ones, or all pairs."""
    if isinstance(source, PairSource):
        return source.pair_rows
    rows = source.usable_rows.sort().values
    return rows[source.target[rows] != UNKNOWN]


def class_captions(sources: Sequence[EmbeddingSource], chosen: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Texts (sum of K, D) of all classes, and for every chosen row which is its caption; 0 for rows of pairs."""
    names: list[str | None] = [None]
    texts, captions = [torch.zeros(1, sources[0].space.embed_dim)], []
    for source, rows in zip(sources, chosen, strict=True):
        if isinstance(source, PairSource):
            captions.append(torch.zeros(len(rows), dtype=torch.int64))
            continue
        captions.append(source.target[rows] + len(names))
        texts.append(source.candidates(rows[:0]).text)
        names += source.class_names or [None] * source.n_candidates
    return torch.cat(texts), first_of_name(names)[torch.cat(captions)]


def first_of_name(names: Sequence[str | None]) -> Tensor:
    """(K,) int64: for every class the first one of the same name; itself where it has none."""
    first: dict[str, int] = {}
    found = [i if name is None else first.setdefault(name, i) for i, name in enumerate(names)]
    return torch.tensor(found, dtype=torch.int64)
