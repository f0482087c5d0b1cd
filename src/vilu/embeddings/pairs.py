"""Images and captions, each matched against a pool; class texts as captions."""

from __future__ import annotations

import copy
import itertools
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vilu.device import torch_defaults
from vilu.embeddings.checks import SHORT_POOL, VALID, Identifiers, Identity, RowNumbers
from vilu.embeddings.similarity import first_equal, row_keys
from vilu.embeddings.source import Batch, Candidates, EmbeddingSource, PooledBatch, hashed
from vilu.errors import UNKNOWN, DataError, UsageError
from vilu.validation import checked, checked_fields, require_at_least, require_mask

Direction = Literal["image_to_text", "text_to_image"]

HARD_ROWS = 2**17
"""Rows among which hard pools are sought.

Their captions are in memory together, 256 MiB at a width of 512.
"""

NEAR_ROWS = 1024  # rows whose likeness with as many others is looked at together


@checked_fields
@dataclass(frozen=True)
class Pools:
    """What image-caption pairs are matched against.

    It is part of the problem, so it is fixed and recorded, whatever loads the pairs.

    Attributes:
        size: Rows of a pool: their captions (or images) are the candidates of each of them.
        direction: "image_to_text" asks for the caption of an image, "text_to_image" for the image
            of a caption.
        hard: Whether the rows of a pool are alike (``hard_order`` of each ``HARD_ROWS``), else they
            are a random choice.
        near_duplicates: Cosine from which on two captions of a pool are the same answer; None: only
            equal captions.
        seed: Of the choice of pools in scoring; None takes the rows as they are stored.

    Examples:
        >>> import numpy as np, vilu
        >>> image = [[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [0.0, 0.0, 1.0]]
        >>> caption = np.eye(3)[[0, 0, 2]]  # the first two images have the same
        >>> data = vilu.Embeddings.pairs(image, caption, vilu.Pools(3, "text_to_image", seed=None))
        >>> (batch,) = data.batches(3)
        >>> batch.prediction.tolist(), batch.failure.tolist()  # either of the two is right
        ([0, 0, 2], [0, 0, 0])
    """

    size: int = 1024
    direction: Direction = "image_to_text"
    hard: bool = False
    near_duplicates: float | None = None
    seed: int | None = 0

    def __post_init__(self) -> None:
        require_at_least("pool_size", self.size, 1)
        if self.near_duplicates is not None and not 0 < self.near_duplicates <= 1:
            raise UsageError(
                f"near_duplicates must be a cosine in (0, 1]. Got {self.near_duplicates} instead."
            )


class PairSource(EmbeddingSource):
    """Image-caption pairs: row i of the images belongs to row i of the captions.

    Equal captions of a pool are one answer. Image to text they are one candidate, the first of
    them; text to image the images of equal captions are all right (``Candidates.same``).

    Columns are by what a row is here: those of images belong to what asks, those of candidates to
    what is found. Text to image, "features" are of captions and "text_features" of images: else a
    caption would bring its picture along.

    Attributes:
        pools: What is matched against what.
    """

    class_names = None
    pools: Pools
    # (M,) pairs that ``without`` has left, ascending; None: nothing was left out
    _left: Tensor | None = None

    @cached_property
    def usable_rows(self) -> Tensor:
        """(M,) positions of the usable pairs that fill pools, in the order of the pools."""
        return self._order(self.pair_rows)

    @property
    def pair_rows(self) -> Tensor:
        """(M,) int64 positions of the usable pairs, ascending, whether or not they fill a pool."""
        if self._left is not None:
            return self._left
        return torch.arange(len(self), device="cpu")

    @abstractmethod
    def picture_rows(self, index: Tensor) -> Tensor:
        """(B, D) float32 unit-norm image embeddings."""

    @abstractmethod
    def caption_rows(self, index: Tensor) -> Tensor:
        """(B, D) float32 unit-norm caption embeddings."""

    def of_classes(self, index: Tensor) -> Tensor:
        """(B,) bool: whether a caption is the text of a class, which many images have."""
        return torch.zeros(len(index), dtype=torch.bool, device="cpu")

    @property
    def n_candidates(self) -> int:
        """K, at most: the pool size."""
        return self.pools.size

    def image_rows(self, index: Tensor) -> Tensor:
        """(B, D) what asks: images, or captions where the direction is text to image."""
        if self.pools.direction == "image_to_text":
            return self.picture_rows(index)
        return self.caption_rows(index)

    def _picture_hashes(self, rows: NDArray[np.int64]) -> NDArray[np.uint64]:
        return hashed(torch.from_numpy(rows), self.picture_rows)

    def _content(self, index: Tensor) -> Tensor:
        return torch.cat([self.picture_rows(index), self.caption_rows(index)], dim=1)

    @torch_defaults()
    def candidates(self, index: Tensor) -> Candidates:
        """The captions of the rows themselves, or their images.

        Examples:
            >>> import numpy as np, torch, vilu
            >>> data = vilu.Embeddings.pairs(np.eye(3), np.eye(3)[[0, 1, 1]], pool_size=3)
            >>> found = data.candidates(torch.arange(3))
            >>> len(found.text), found.target.tolist()  # equal captions are one candidate
            (2, [0, 1, 1])
        """
        caption = self.caption_rows(index)
        first = first_alike(caption, self.pools.near_duplicates)
        own = torch.arange(len(index))
        all_differ = torch.equal(first, own)
        if self.pools.direction == "text_to_image":
            same = None if all_differ else first
            return Candidates(self.picture_rows(index), own, same, index)
        if all_differ:
            return Candidates(caption, own, None, index)
        distinct, target = torch.unique(first, return_inverse=True)
        return Candidates(caption[distinct], target, None, index[distinct])

    def many(
        self, size: int, *, rows: Tensor | None = None, columns: Sequence[str] = ()
    ) -> Iterator[Batch]:
        """As every source's; a pool in which rows may be equal comes alone."""
        pool = self.pools.size
        n = self._in_whole_pools(size)
        has_near_duplicates = self.pools.near_duplicates is not None
        if n <= pool or columns or has_near_duplicates:
            yield from self.batches(size, rows=rows, columns=columns)
            return
        if rows is None:
            rows = self.usable_rows
        whole = rows[: self._in_whole_pools(len(rows))]
        if not len(whole):
            return
        for batches in self._map_parts(self._pooled, whole.split(n)):
            yield from batches

    def _in_whole_pools(self, n_rows: int) -> int:
        """How many of so many rows fill pools."""
        return n_rows // self.pools.size * self.pools.size

    @torch_defaults()
    def _pooled(self, index: Tensor) -> list[Batch]:
        """Batches of pools that follow one another, of those whose rows differ."""
        size = self.pools.size
        picture = self.picture_rows(index)
        caption = self.caption_rows(index)
        has_repeats = self._have_repeats(caption)
        image = picture
        text = caption
        if self.pools.direction == "text_to_image":
            has_repeats |= self._have_repeats(picture)
            image = caption
            text = picture
        batches: list[Batch] = []
        for first, last, is_alike in runs(has_repeats.tolist()):
            part = slice(first * size, last * size)
            rows = index[part]
            if is_alike:
                batches += [self._batch(pool, ()) for pool in rows.split(size)]
                continue
            n_pools = last - first
            batch = PooledBatch(
                image=image[part],
                text=text[part].view(n_pools, size, -1),
                target=torch.arange(size).repeat(n_pools),
                index=rows,
                logit_scale=self.space.logit_scale,
                logit_bias=self.space.logit_bias,
                outside=self.outside[rows],
            )
            batches.append(batch)
        return batches

    def _have_repeats(self, rows: Tensor) -> Tensor:
        """(P,) bool: the pools in which rows (P * size, D) may be equal, by their keys."""
        keys = row_keys(rows).view(-1, self.pools.size).sort(dim=1).values
        return (keys[:, 1:] == keys[:, :-1]).any(dim=1)

    @torch_defaults()
    def without(self, rows: NDArray[np.bool_]) -> PairSource:
        """The source with pools of the rows that are left.

        The status of rows that are left out, or fill no last pool, is "short_pool".

        Raises:
            DataError: If ``rows`` is no mask (N,), or what is left fills no pool.

        Examples:
            >>> import numpy as np, vilu
            >>> data = vilu.Embeddings.pairs(np.eye(6), np.eye(6), pool_size=2)
            >>> fewer = data.without(np.arange(6) == 1)
            >>> # pools are whole, so one more row has to go
            >>> [batch.index.tolist() for batch in fewer.batches(2)]
            [[0, 2], [3, 4]]
        """
        gone = require_mask("rows", np.asarray(rows), len(self))
        if not gone.any():
            return self
        stays = torch.from_numpy(~gone)
        left = self.pair_rows[stays[self.pair_rows]]
        require_full_pools(len(left), self.pools.size, "what is left")
        fewer = copy.copy(self)
        fewer._left = left
        fewer.usable_rows = self._order(left)
        status = np.full(len(self), SHORT_POOL, np.uint8)
        status[fewer.usable_rows.numpy()] = VALID
        is_good = np.isin(self.status, (VALID, SHORT_POOL))
        fewer.status = np.where(is_good, status, self.status)
        return fewer

    def shuffled(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Rows in new pools for one pass of training."""
        rows = super().shuffled(rows, generator)
        if self.pools.hard:
            return self._alike(rows, generator)
        return rows

    def _order(self, rows: Tensor) -> Tensor:
        """The rows in the order of their pools in scoring; without those that fill no last pool."""
        generator = torch.Generator().manual_seed(self.pools.seed or 0)
        if self.pools.seed is not None:
            rows = super().shuffled(rows, generator)
        rows = rows[: self._in_whole_pools(len(rows))]
        if self.pools.hard:
            return self._alike(rows, generator)
        return rows

    @torch_defaults()
    def _alike(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """The rows in hard pools, block by block; a block is of whole pools, and one at least."""
        n = max(self._in_whole_pools(HARD_ROWS), self.pools.size)
        parts = []
        for block in rows.split(n):
            order = hard_order(self.caption_rows(block), self.pools.size, generator)
            parts.append(block[order])
        return torch.cat(parts)


def runs(values: Sequence[bool]) -> Iterator[tuple[int, int, bool]]:
    """Where equal values follow one another: first index, the one after the last, and the value."""
    first = 0
    for value, group in itertools.groupby(values):
        last = first + len(list(group))
        yield first, last, value
        first = last


class PseudoCaptions(PairSource):
    """The labelled usable images of several sources, each with the text of its class as caption.

    The text is such as "a photo of a ...".

    Sources that have captions bring their own. Images of all sources are in one order, which the
    seed of ``pools`` mixes, so that a pool holds captions of all of them. A class that several
    sources have by the same name is one caption, with the text of the first source; so is one text
    under several names.

    Args:
        sources: Rows with shared candidates or image-caption pairs, all in one embedding space.
        pools: Their size, or ``Pools`` for all choices.
        names: What the identifiers of each source's rows begin with ("name/identifier"); by default
            its number.

    Raises:
        UsageError: If there is no source, or the names are not one for each, all different.
        ProvenanceError: If the embedding spaces differ.
        DataError: If the labelled rows do not fill a pool.

    Source: ViLU (ICCV 2025), supplement C.6, which says "This is a photo of a ...".

    Examples:
        >>> import numpy as np, vilu
        >>> pets = vilu.Embeddings(np.eye(4)[:2], np.eye(4)[:2], [0, 1], class_names=["cat", "dog"])
        >>> food = vilu.Embeddings(
        ...     np.eye(4)[2:], np.eye(4)[2:], [0, 1], class_names=["pie", "soup"]
        ... )
        >>> data = vilu.PseudoCaptions(
        ...     [pets, food], vilu.Pools(4, seed=None), names=["pets", "food"]
        ... )
        >>> # an image of food is matched with the texts of pets, too
        >>> data.n_candidates, data.origin(3)
        (4, (1, 1))
    """

    @checked
    @torch_defaults()
    def __init__(
        self,
        sources: Sequence[EmbeddingSource],
        pools: int | Pools = 1024,
        names: Sequence[str] | None = None,
    ) -> None:
        if names is None:
            names = [str(i) for i in range(len(sources))]
        check_sources(sources, names)
        self.sources = tuple(sources)
        if isinstance(pools, int):
            pools = Pools(pools)
        self.pools = pools
        self.pool_size = self.pools.size
        self.space = sources[0].space
        chosen = [labelled_rows(source) for source in sources]
        self._row = torch.cat(chosen)
        self._source = torch.repeat_interleave(torch.tensor([len(rows) for rows in chosen]))
        require_full_pools(len(self._row), self.pool_size, "the union of the labelled rows")
        self._text, self._caption = class_captions(sources, chosen)
        self.target = torch.arange(len(self._row)) % self.pool_size
        if any(isinstance(source.ids, RowNumbers) for source in sources):
            self.ids = RowNumbers(len(self._row))
        else:
            self.ids = PrefixedIds(self, names)

    def picture_rows(self, index: Tensor) -> Tensor:
        """(B, D) image embeddings, from the sources."""
        pictures = self._text.new_empty(len(index), self.space.embed_dim)
        for i, source in enumerate(self.sources):
            here, rows = self._of_source(i, index)
            if isinstance(source, PairSource):
                pictures[here] = source.picture_rows(rows)
            else:
                pictures[here] = source.image_rows(rows)
        return pictures

    def caption_rows(self, index: Tensor) -> Tensor:
        """(B, D) texts of the classes, and captions where the source has some."""
        captions = self._text[self._caption[index]]
        for i, source in enumerate(self.sources):
            if isinstance(source, PairSource):
                here, rows = self._of_source(i, index)
                captions[here] = source.caption_rows(rows)
        return captions

    @property
    def identified_by(self) -> tuple[Identity, ...]:
        """What all of its sources know."""
        common = self.sources[0].identified_by
        for source in self.sources[1:]:
            common = tuple(by for by in common if by in source.identified_by)
        return common

    def identities(self, by: Identity, rows: NDArray[np.int64] | None = None) -> NDArray[np.uint64]:
        """Those of the sources.

        A picture of a class is recognised without its caption, which the class shares.
        """
        if by == "names":
            return super().identities(by, rows)
        index = self._positions(rows)
        identities = np.empty(len(index), np.uint64)
        for i, source in enumerate(self.sources):
            here, own = self._of_source(i, index)
            identities[here.numpy()] = source.identities(by, own.numpy())
        return identities

    def _picture_hashes(self, rows: NDArray[np.int64]) -> NDArray[np.uint64]:
        hashes = np.empty(len(rows), np.uint64)
        for number, source in enumerate(self.sources):
            here, own = self._of_source(number, torch.from_numpy(rows))
            hashes[here.numpy()] = source._picture_hashes(own.numpy())
        return hashes

    def of_classes(self, index: Tensor) -> Tensor:
        """(B,) bool: those whose source has no captions of its own.

        Examples:
            >>> import numpy as np, torch, vilu
            >>> pets = vilu.Embeddings(
            ...     np.eye(4)[:2], np.eye(4)[:2], [0, 1], class_names=["cat", "dog"]
            ... )
            >>> captioned = vilu.Embeddings.pairs(np.eye(4), np.eye(4), pool_size=2)
            >>> vilu.PseudoCaptions([pets, captioned], 2).of_classes(torch.arange(6)).tolist()
            [True, True, False, False, False, False]
        """
        return self._caption[index] > 0

    def _of_source(self, number: int, index: Tensor) -> tuple[Tensor, Tensor]:
        """Places in ``index`` that hold rows of a source, and which of its rows."""
        here = (self._source[index] == number).nonzero().squeeze(1)
        return here, self._row[index[here]]

    def origin(self, row: int) -> tuple[int, int]:
        """(number of the source, row in it) of a row."""
        return int(self._source[row]), int(self._row[row])


class PrefixedIds(Identifiers):
    """Identifiers of the rows of several sources, with the name of the source."""

    def __init__(self, rows: PseudoCaptions, names: Sequence[str]) -> None:
        super().__init__(len(rows))
        self._rows = rows
        self._names = names

    def _of(self, row: int) -> str:
        source, original = self._rows.origin(row)
        return f"{self._names[source]}/{self._rows.sources[source].ids[original]}"


def check_sources(sources: Sequence[EmbeddingSource], names: Sequence[str]) -> None:
    """Refuse sources that cannot be one (see ``PseudoCaptions``)."""
    if not sources:
        raise UsageError("pseudo-captions need at least one data set.")
    if len(names) != len(sources) or len(set(names)) < len(names):
        raise UsageError(
            f"{len(sources)} data sets need as many different names. Got {', '.join(names)}."
        )
    for name, source in zip(names, sources, strict=True):
        sources[0].space.require_match(
            source.space, name=f"data set {names[0]!r}", other_name=f"data set {name!r}"
        )
        if source.pool_size is None and not (source.target != UNKNOWN).any():
            raise DataError(f"the data set {name!r} has no labels, so its images have no captions.")


def labelled_rows(source: EmbeddingSource) -> Tensor:
    """(M,) sorted rows whose caption is known: labelled ones, or all pairs."""
    if isinstance(source, PairSource):
        return source.pair_rows
    rows = source.usable_rows.sort().values
    return rows[source.target[rows] != UNKNOWN]


def class_captions(
    sources: Sequence[EmbeddingSource], chosen: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Texts (1 + sum of K, D) of all classes, and for every chosen row which is its caption.

    The first text is of none of them: it is that of rows of pairs, which have their own captions.
    """
    first_of_name: dict[str, int] = {}
    text_of_class = [0]  # of every class the row of its text, that of the first of its name
    texts = [torch.zeros(1, sources[0].space.embed_dim, dtype=torch.float32)]
    classes = []  # of every chosen row the number of its class, from 1 over all sources
    for source, rows in zip(sources, chosen, strict=True):
        if isinstance(source, PairSource):
            classes.append(torch.zeros(len(rows), dtype=torch.int64))
            continue
        n_before = len(text_of_class)
        classes.append(source.target[rows] + n_before)
        texts.append(source.candidates(rows[:0]).text)
        numbers = range(n_before, n_before + source.n_candidates)
        if source.class_names is None:
            text_of_class += numbers
            continue
        for name, number in zip(source.class_names, numbers, strict=True):
            text_of_class.append(first_of_name.setdefault(name, number))
    return torch.cat(texts), torch.tensor(text_of_class)[torch.cat(classes)]


def first_alike(rows: Tensor, cosine: float | None = None, block_rows: int = NEAR_ROWS) -> Tensor:
    """(N,) int64: for every unit-norm row the first that is alike.

    Alike are equal rows or, with a cosine, those of at least that cosine to a first one. With a
    cosine rows are taken in order, and one that is near none of the firsts before it is a first
    itself, so that likeness does not chain. Memory: N times the number of firsts, in blocks of
    ``block_rows`` rows and as many firsts.
    """
    first = first_equal(rows)
    if cosine is None:
        return first
    distinct = first.unique()
    leader_of = torch.arange(len(rows))
    leaders = distinct[:0]
    for block in distinct.split(block_rows):
        leader = _first_near(rows, block, leaders.split(block_rows), cosine)
        is_led = leader >= 0
        leader_of[block[is_led]] = leader[is_led]
        # those near no leader so far: the block's own leaders are among them
        new = block[~is_led]
        leader_of[new] = new[_greedy(rows[new] @ rows[new].T >= cosine)]
        leaders = torch.cat([leaders, leader_of[new].unique()])
    return leader_of[first]


def _first_near(rows: Tensor, block: Tensor, leaders: Sequence[Tensor], cosine: float) -> Tensor:
    """(B,) the first leader that each row of a block is near; -1 where it is near none.

    The leaders come in tiles, so that few of them are compared together.
    """
    leader = torch.full_like(block, -1)
    for tile in leaders:
        if not len(tile):
            continue
        is_open = (leader < 0)[:, None]
        near = (rows[block] @ rows[tile].T >= cosine) & is_open
        first_in_tile = tile[near.byte().argmax(dim=1)]  # of equal numbers argmax takes the first
        leader = torch.where(near.any(dim=1), first_in_tile, leader)
    return leader


def _greedy(near: Tensor) -> Tensor:
    """(N,) int64: for every row of a symmetric relation (N, N) the first leader it is near.

    A row that is near no leader before it is one itself.
    """
    relation = near.numpy()
    if not len(relation):
        return torch.arange(0)
    np.fill_diagonal(relation, val=True)
    is_leader = np.ones(len(relation), dtype=bool)
    # most rows are near no row before them, and need no look
    first_near = relation.argmax(axis=1)
    for row in np.flatnonzero(first_near < np.arange(len(relation))):
        is_led = (relation[row, :row] & is_leader[:row]).any()
        is_leader[row] = not is_led
    relation &= is_leader  # of each row the leaders are left, so that the first is one
    return torch.from_numpy(relation.argmax(axis=1))


def hard_order(rows: Tensor, pool_size: int, generator: torch.Generator) -> Tensor:
    """(N,) an order in which each ``pool_size`` consecutive rows are alike: hard negatives.

    The rows are halved, at a multiple of the pool size, by their projection on the direction
    between two of them that are far apart, and the halves again: N D log(N / pool_size) operations,
    no matrix of similarities. N is a multiple of the pool size, else the last pool is short; the
    generator chooses the row that a direction starts from.
    """
    pending = [torch.arange(len(rows))]
    pools = []
    while pending:
        part = pending.pop()
        if len(part) <= pool_size:
            pools.append(part)
            continue
        block = rows[part]
        start = int(torch.randint(len(part), (1,), generator=generator))
        # the row farthest from any row, and the one farthest from that, are far apart
        far = int((block @ block[start]).argmin())
        farther = int((block @ block[far]).argmin())
        along = (block @ (block[far] - block[farther])).argsort(stable=True)
        n_pools = len(part) // pool_size
        middle = max(n_pools // 2, 1) * pool_size
        # the last of the list is taken next: the first half
        pending.append(part[along[middle:]])
        pending.append(part[along[:middle]])
    return torch.cat(pools)


def require_full_pools(n_rows: int, pool_size: int, what: str) -> None:
    """Refuse pairs that do not fill one pool."""
    if n_rows < pool_size:
        raise DataError(
            f"{what} has {n_rows} usable pairs, and a pool has {pool_size}: its size is the number "
            "of candidates, so it is never cut short. Give more pairs or a smaller --pool-size."
        )
