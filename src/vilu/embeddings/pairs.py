"""Image-caption pairs, matched in pools, and class texts used as captions."""

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
from vilu.embeddings.checks import SHORT_POOL, VALID, Identifiers, IdentityKind, RowNumbers
from vilu.embeddings.similarity import Matches, index_of_first_equal, row_keys
from vilu.embeddings.source import Batch, Candidates, EmbeddingSource, PooledBatch, hash_row_blocks
from vilu.errors import UNKNOWN, DataError, UsageError
from vilu.validation import checked, checked_fields, require_at_least, require_mask

Direction = Literal["image_to_text", "text_to_image"]

MAX_HARD_ROWS = 2**17
"""Maximum number of rows to sort into hard pools together.

The captions of these rows are in memory at the same time: 256 MiB at width 512.
"""

COSINE_BLOCK_ROWS = 1024
"""Number of rows in a block. The cosines of two blocks are computed together."""


@checked_fields
@dataclass(frozen=True)
class Pools:
    """How image-caption pairs are grouped into pools.

    A row is matched only against the candidates of the same pool. So the pools decide how hard the
    problem is. The rule is recorded with the results. The pools do not depend on how pairs are
    loaded.

    Attributes:
        size: Number of rows in a pool. Every row in the pool has the captions (or images) of these
            rows as candidates.
        direction: With "image_to_text", an image's caption is searched. With "text_to_image", a
            caption's image is searched.
        hard: If true, the captions in a pool are similar (``hard_pool_order``, applied to blocks of
            ``MAX_HARD_ROWS`` rows). If false, pools are random, or in the order of the data if
            ``seed`` is None.
        near_duplicates: Minimum cosine at which two captions in a pool are the same answer. None:
            only equal captions are the same answer.
        seed: Seed for the random pools in scoring. None: the rows keep the order of the data.

    Examples:
        >>> import numpy as np, vilu
        >>> image = [[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [0.0, 0.0, 1.0]]
        >>> text = np.eye(3)[[0, 0, 2]]  # the first two images have the same caption
        >>> pools = vilu.Pools(size=3, direction="text_to_image", seed=None)
        >>> (batch,) = vilu.Embeddings.pairs(image, text, pools).batches(3)
        >>> batch.prediction.tolist()  # the image that each caption finds
        [0, 0, 2]
        >>> batch.failure.tolist()  # row 1 finds image 0, which has the same caption
        [0, 0, 0]
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
    """A source with image-caption pairs: image row i belongs to caption row i.

    Equal captions in a pool are the same answer. With "image_to_text", equal captions become a
    single candidate: the first equal caption. With "text_to_image", all images with equal captions
    are right answers.

    An image with several captions is in several rows, once with each caption. With "image_to_text",
    all captions of the image in the pool are right. With "text_to_image", all equal images are
    right. So an answer is right if any row in the pool has the image together with the caption
    (``Matches``).

    Every row has a query. The query is matched against the candidates. With "image_to_text" the
    query is the row's image, with "text_to_image" the caption. Image columns belong to the queries,
    and candidate columns belong to the candidates. So with "text_to_image" the column "features"
    holds caption features, and "text_features" holds image features. Otherwise a caption would come
    with the matching image's features. These features would reveal the right answer.

    Attributes:
        pools: How the pairs are grouped into pools.
    """

    class_names = None
    pools: Pools
    # (M,) ascending indices of the pairs remaining after ``without``. None: all usable pairs.
    _remaining_pairs: Tensor | None = None

    @cached_property
    def usable_rows(self) -> Tensor:
        """Indices (M,) of the usable pairs in full pools, in pool order."""
        return self._scoring_order(self.pair_rows)

    @property
    def pair_rows(self) -> Tensor:
        """Indices (M,) int64 of all usable pairs, ascending, whether in a full pool or not."""
        if self._remaining_pairs is not None:
            return self._remaining_pairs
        usable_pairs = np.flatnonzero(self._row_status == VALID)
        return torch.from_numpy(usable_pairs)

    @cached_property
    def status(self) -> NDArray[np.uint8]:
        """Status codes (N,). A usable row outside all full pools has the code "short_pool".

        To find these rows, the pool order is computed.
        """
        short_pool = np.uint8(SHORT_POOL)
        status = np.where(self._row_status == VALID, short_pool, self._row_status)
        status[self.usable_rows.numpy()] = VALID
        return status

    @cached_property
    def _row_status(self) -> NDArray[np.uint8]:
        """Status codes (N,) of the embeddings alone, whatever the pools. By default all are 0."""
        return np.broadcast_to(np.uint8(VALID), len(self))

    @abstractmethod
    def picture_rows(self, index: Tensor) -> Tensor:
        """Return unit-norm image embeddings (B, D) float32."""

    @abstractmethod
    def caption_rows(self, index: Tensor) -> Tensor:
        """Return unit-norm caption embeddings (B, D) float32."""

    def of_classes(self, index: Tensor) -> Tensor:
        """Return the mask (B,) of rows with a class text as caption. Many images share the text.

        By default no caption is a class text.
        """
        return torch.zeros(len(index), dtype=torch.bool, device="cpu")

    @property
    def n_candidates(self) -> int:
        """Maximum number K of candidates per row: the pool size."""
        return self.pools.size

    def image_rows(self, index: Tensor) -> Tensor:
        """Return the queries (B, D): images, or captions if the direction is "text_to_image"."""
        if self.pools.direction == "image_to_text":
            return self.picture_rows(index)
        return self.caption_rows(index)

    def _picture_hashes(self, rows: NDArray[np.int64]) -> NDArray[np.uint64]:
        index = torch.from_numpy(rows)
        return hash_row_blocks(index, self.picture_rows)

    def _hashed_numbers(self, index: Tensor) -> Tensor:
        pictures = self.picture_rows(index)
        captions = self.caption_rows(index)
        return torch.cat([pictures, captions], dim=1)

    @torch_defaults()
    def candidates(self, index: Tensor) -> Candidates:
        """Return the candidates for rows ``index`` of a pool: their captions, or their images.

        Examples:
            >>> import numpy as np, torch, vilu
            >>> text = np.eye(3)[[0, 1, 1]]  # the last two captions are equal
            >>> data = vilu.Embeddings.pairs(np.eye(3), text, pool_size=3)
            >>> candidates = data.candidates(torch.arange(3))
            >>> len(candidates.text)  # equal captions are one candidate
            2
            >>> candidates.target.tolist()
            [0, 1, 1]
        """
        caption = self.caption_rows(index)
        picture = self.picture_rows(index)
        # for every row in the pool, the first row with the same caption
        first_with_caption = group_leaders(caption, self.pools.near_duplicates)
        # for every row in the pool, the first row with the same image
        first_with_picture = index_of_first_equal(picture)
        if self.pools.direction == "text_to_image":
            return _picture_candidates(picture, index, first_with_caption, first_with_picture)
        return _caption_candidates(caption, index, first_with_caption, first_with_picture)

    def many(
        self, size: int, *, rows: Tensor | None = None, columns: Sequence[str] = ()
    ) -> Iterator[Batch]:
        """Yield batches like ``EmbeddingSource.many``.

        A pool with possibly equal rows is a separate batch.
        """
        n_rows_together = self._n_rows_in_whole_pools(size)
        batch_holds_one_pool = n_rows_together <= self.pools.size
        has_near_duplicates = self.pools.near_duplicates is not None
        # a ``PooledBatch`` has no columns, and treats near duplicates as different answers
        if batch_holds_one_pool or columns or has_near_duplicates:
            yield from self.batches(size, rows=rows, columns=columns)
            return
        if rows is None:
            rows = self.usable_rows
        rows_in_pools = rows[: self._n_rows_in_whole_pools(len(rows))]
        if not len(rows_in_pools):
            return
        parts = rows_in_pools.split(n_rows_together)
        for batches in self._map_parts(self._pooled_batches, parts):
            yield from batches

    def _n_rows_in_whole_pools(self, n_rows: int) -> int:
        """Count the rows in whole pools, out of ``n_rows`` rows."""
        return n_rows // self.pools.size * self.pools.size

    @torch_defaults()
    def _pooled_batches(self, index: Tensor) -> list[Batch]:
        """Make batches from the rows ``index``. These rows fill whole pools.

        Consecutive pools without equal rows form a single batch. A pool with possibly equal rows is
        a separate batch.
        """
        size = self.pools.size
        picture = self.picture_rows(index)
        caption = self.caption_rows(index)
        may_have_repeats = self._may_have_equal_rows(caption) | self._may_have_equal_rows(picture)
        image = picture
        text = caption
        if self.pools.direction == "text_to_image":
            image = caption
            text = picture
        batches: list[Batch] = []
        for first_pool, end_pool, pools_may_have_repeats in equal_runs(may_have_repeats.tolist()):
            part = slice(first_pool * size, end_pool * size)
            rows = index[part]
            if pools_may_have_repeats:
                # a batch per pool, without columns, like a ``PooledBatch``
                batches += [self._batch(pool, columns=()) for pool in rows.split(size)]
                continue
            n_pools = end_pool - first_pool
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

    def _may_have_equal_rows(self, rows: Tensor) -> Tensor:
        """Return the mask (P,) of pools with possibly equal rows. ``rows`` is (P * size, D).

        Only the row keys are compared. Equal rows have equal keys, and different rows
        seldom have equal keys.
        """
        keys = row_keys(rows)
        keys_of_pools = keys.view(-1, self.pools.size)
        sorted_keys = keys_of_pools.sort(dim=1).values
        # after sorting, equal keys in a pool are neighbours
        equals_next = sorted_keys[:, :-1] == sorted_keys[:, 1:]
        return equals_next.any(dim=1)

    @torch_defaults()
    def without(self, rows: NDArray[np.bool_]) -> PairSource:
        """Return the source without the rows in the mask ``rows`` (N,). The rest forms new pools.

        The removed rows get the status "short_pool". The last rows get this status, too, if they do
        not fill a pool.

        Raises:
            DataError: If ``rows`` is no mask (N,), or if the remaining rows do not fill a pool.

        Examples:
            >>> import numpy as np, vilu
            >>> data = vilu.Embeddings.pairs(np.eye(6), np.eye(6), pool_size=2)
            >>> fewer = data.without(np.arange(6) == 1)
            >>> # five rows remain; they fill two pools of two rows, so row 5 is left out, too
            >>> [batch.index.tolist() for batch in fewer.batches(2)]
            [[0, 2], [3, 4]]
        """
        is_left_out = require_mask("rows", np.asarray(rows), len(self))
        if not is_left_out.any():
            return self
        is_kept = torch.from_numpy(~is_left_out)
        pairs = self.pair_rows
        remaining_pairs = pairs[is_kept[pairs]]
        require_full_pools(len(remaining_pairs), self.pools.size, subject="what is left")
        subset = copy.copy(self)
        subset._remaining_pairs = remaining_pairs
        subset.usable_rows = self._scoring_order(remaining_pairs)
        status = np.full(len(self), SHORT_POOL, np.uint8)
        status[subset.usable_rows.numpy()] = VALID
        # rows without a usable embedding keep their status
        has_embedding = np.isin(self.status, (VALID, SHORT_POOL))
        subset.status = np.where(has_embedding, status, self.status)
        return subset

    def shuffled(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Return the rows in the order of new random pools, for a training pass."""
        rows = super().shuffled(rows, generator)
        if self.pools.hard:
            return self._order_hard_pools(rows, generator)
        return rows

    def _scoring_order(self, rows: Tensor) -> Tensor:
        """Return the rows in the order of the scoring pools.

        The last rows are left out if they do not fill a pool.
        """
        # Without a seed the rows are not shuffled. Hard pools then use seed 0.
        generator = torch.Generator().manual_seed(self.pools.seed or 0)
        if self.pools.seed is not None:
            rows = super().shuffled(rows, generator)
        rows = rows[: self._n_rows_in_whole_pools(len(rows))]
        if self.pools.hard:
            return self._order_hard_pools(rows, generator)
        return rows

    @torch_defaults()
    def _order_hard_pools(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Return the rows in the order of hard pools, formed block by block.

        A block consists of whole pools.
        """
        block_rows = max(self._n_rows_in_whole_pools(MAX_HARD_ROWS), self.pools.size)
        ordered_blocks = []
        for block in rows.split(block_rows):
            order = hard_pool_order(self.caption_rows(block), self.pools.size, generator)
            ordered_blocks.append(block[order])
        return torch.cat(ordered_blocks)


def _picture_candidates(
    picture: Tensor, index: Tensor, first_with_caption: Tensor, first_with_picture: Tensor
) -> Candidates:
    """Make a pool's candidates for captions as queries: all images in the pool.

    Args:
        picture: (B, D) images in the pool.
        index: (B,) row numbers in the source.
        first_with_caption: (B,) for every row in the pool, the first row with the same caption.
        first_with_picture: (B,) for every row in the pool, the first row with the same image.
    """
    all_rows = torch.arange(len(index))
    captions_differ = torch.equal(first_with_caption, all_rows)
    pictures_differ = torch.equal(first_with_picture, all_rows)
    matches = None
    if not (captions_differ and pictures_differ):
        matches = Matches(
            query_of_pair=first_with_caption,
            candidate_of_pair=first_with_picture,
            pair_of_candidate=all_rows,
            query_of_row=first_with_caption,
        )
    return Candidates(text=picture, target=all_rows, matches=matches, row_of_candidate=index)


def _caption_candidates(
    caption: Tensor, index: Tensor, first_with_caption: Tensor, first_with_picture: Tensor
) -> Candidates:
    """Make a pool's candidates for images as queries: the distinct captions in the pool.

    ``caption`` (B, D) has the captions in the pool. See ``_picture_candidates`` for the remaining
    parameters.
    """
    candidate_rows, target = torch.unique(first_with_caption, return_inverse=True)
    # compares every row's caption with the caption of the first row with the same image
    equal_images_have_equal_captions = torch.equal(
        first_with_caption[first_with_picture], first_with_caption
    )
    matches = None
    if not equal_images_have_equal_captions:
        matches = Matches(
            query_of_pair=first_with_picture,
            candidate_of_pair=first_with_caption,
            pair_of_candidate=candidate_rows,
            query_of_row=first_with_picture,
        )
    return Candidates(
        text=caption[candidate_rows],
        target=target,
        matches=matches,
        row_of_candidate=index[candidate_rows],
    )


def equal_runs(values: Sequence[bool]) -> Iterator[tuple[int, int, bool]]:
    """Yield (start, stop, value) for each run of equal values: ``values[start:stop]``."""
    start = 0
    for value, group in itertools.groupby(values):
        stop = start + len(list(group))
        yield start, stop, value
        start = stop


class PseudoCaptions(PairSource):
    """The labelled usable images from several sources, with class texts as captions.

    A class text is a prompt, for example "a photo of a cat". Image-caption pairs keep their
    captions.

    The images from all sources are joined and shuffled with the seed of ``pools``. So a pool holds
    captions from all sources. Classes with the same name share the text from the first source with
    such a class. Classes with equal texts are also the same answer.

    Args:
        sources: Sources with shared candidates or image-caption pairs, all in the same embedding
            space.
        pools: The pool size, or ``Pools`` with all choices.
        names: Each source's prefix for the row identifiers ("name/identifier"). By default the
            prefix is the source number.

    Raises:
        UsageError: If there is no source, or if two sources have the same name in ``names``.
        ProvenanceError: If the embedding spaces differ.
        DataError: If the labelled rows do not fill a pool.

    Source: ViLU (ICCV 2025), supplement C.6, with the prompt "This is a photo of a ...".

    Examples:
        >>> import numpy as np, vilu
        >>> first, second = np.eye(4)[:2], np.eye(4)[2:]
        >>> pets = vilu.Embeddings(first, first, target=[0, 1], class_names=["cat", "dog"])
        >>> food = vilu.Embeddings(second, second, target=[0, 1], class_names=["pie", "soup"])
        >>> data = vilu.PseudoCaptions([pets, food], vilu.Pools(4, seed=None))
        >>> data.n_candidates  # an image of food is matched against the texts of pets, too
        4
        >>> data.origin(3)  # row 3 is row 1 of source 1
        (1, 1)
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
            pools = Pools(size=pools)
        self.pools = pools
        self.pool_size = self.pools.size
        self.space = sources[0].space
        rows_of_sources = [labelled_rows(source) for source in sources]
        n_rows_of_sources = torch.tensor([len(rows) for rows in rows_of_sources])
        # for every row, the number of the source: 0 for all rows in source 0, then 1, ...
        self._source_of_row = torch.repeat_interleave(n_rows_of_sources)
        self._row_in_source = torch.cat(rows_of_sources)  # row number in the source
        n_rows = len(self._row_in_source)
        require_full_pools(n_rows, self.pool_size, subject="the union of the labelled rows")
        # The class texts, and for every row an index into these texts. The index is 0 if the row's
        # source has captions.
        self._class_texts, self._text_of_row = class_captions(sources, rows_of_sources)
        self.target = torch.arange(n_rows) % self.pool_size  # as in ``PairEmbeddings``
        if any(isinstance(source.ids, RowNumbers) for source in sources):
            self.ids = RowNumbers(n_rows)
        else:
            self.ids = PrefixedIds(self, names)

    def picture_rows(self, index: Tensor) -> Tensor:
        """Return image embeddings (B, D) from the sources."""
        pictures = self._class_texts.new_empty(len(index), self.space.embed_dim)
        for number, source in enumerate(self.sources):
            positions, rows = self._find_rows_of_source(number, index)
            if isinstance(source, PairSource):
                pictures[positions] = source.picture_rows(rows)
            else:
                pictures[positions] = source.image_rows(rows)
        return pictures

    def caption_rows(self, index: Tensor) -> Tensor:
        """Return captions (B, D): the class text, or the caption if the source has captions."""
        captions = self._class_texts[self._text_of_row[index]]
        for number, source in enumerate(self.sources):
            if isinstance(source, PairSource):
                positions, rows = self._find_rows_of_source(number, index)
                captions[positions] = source.caption_rows(rows)
        return captions

    @property
    def identified_by(self) -> tuple[IdentityKind, ...]:
        """The identity kinds common to all sources, best first."""
        common_kinds = self.sources[0].identified_by
        for source in self.sources[1:]:
            common_kinds = tuple(kind for kind in common_kinds if kind in source.identified_by)
        return common_kinds

    def identities(
        self, by: IdentityKind, rows: NDArray[np.int64] | None = None
    ) -> NDArray[np.uint64]:
        """Return the rows' identities (M,) in the original sources.

        A row with a class text as caption is identified by the image alone, because all images in
        the class share the caption.
        """
        if by == "names":
            return super().identities(by, rows)
        index = self._as_index(rows)
        identities = np.empty(len(index), np.uint64)
        for number, source in enumerate(self.sources):
            positions, source_rows = self._find_rows_of_source(number, index)
            identities[positions.numpy()] = source.identities(by, source_rows.numpy())
        return identities

    def _picture_hashes(self, rows: NDArray[np.int64]) -> NDArray[np.uint64]:
        index = torch.from_numpy(rows)
        hashes = np.empty(len(rows), np.uint64)
        for number, source in enumerate(self.sources):
            positions, source_rows = self._find_rows_of_source(number, index)
            hashes[positions.numpy()] = source._picture_hashes(source_rows.numpy())
        return hashes

    def of_classes(self, index: Tensor) -> Tensor:
        """Return the mask (B,) of rows from sources without captions.

        Examples:
            >>> import numpy as np, torch, vilu
            >>> image = text = np.eye(4)[:2]
            >>> pets = vilu.Embeddings(image, text, target=[0, 1], class_names=["cat", "dog"])
            >>> captioned = vilu.Embeddings.pairs(image, text, pool_size=2)
            >>> data = vilu.PseudoCaptions([pets, captioned], pools=2)
            >>> data.of_classes(torch.arange(4)).tolist()  # the rows of the pets come first
            [True, True, False, False]
        """
        return self._text_of_row[index] > 0

    def _find_rows_of_source(self, number: int, index: Tensor) -> tuple[Tensor, Tensor]:
        """Find the rows of source ``number`` in ``index``.

        Return the positions of the rows in ``index``, and the row numbers in the source.
        """
        is_of_source = self._source_of_row[index] == number
        positions = is_of_source.nonzero().squeeze(1)
        return positions, self._row_in_source[index[positions]]

    def origin(self, row: int) -> tuple[int, int]:
        """Return the source number of a row, and the row number in the source."""
        return int(self._source_of_row[row]), int(self._row_in_source[row])


class PrefixedIds(Identifiers):
    """Row identifiers for several sources: "source name/identifier"."""

    def __init__(self, rows: PseudoCaptions, names: Sequence[str]) -> None:
        super().__init__(len(rows))
        self._rows = rows
        self._names = names

    def _identifier(self, row: int) -> str:
        source_number, row_in_source = self._rows.origin(row)
        source = self._rows.sources[source_number]
        return f"{self._names[source_number]}/{source.ids[row_in_source]}"


def check_sources(sources: Sequence[EmbeddingSource], names: Sequence[str]) -> None:
    """Raise an error if the sources cannot be joined (see ``PseudoCaptions``)."""
    if not sources:
        raise UsageError("pseudo-captions need at least one data set.")
    if len(names) != len(sources) or len(set(names)) < len(names):
        joined_names = ", ".join(names)
        raise UsageError(
            f"{len(sources)} data sets need as many different names. Got {joined_names}."
        )
    for name, source in zip(names, sources, strict=True):
        sources[0].space.require_match(
            source.space, name=f"data set {names[0]!r}", other_name=f"data set {name!r}"
        )
        if not isinstance(source, PairSource) and (source.target == UNKNOWN).all():
            raise DataError(f"the data set {name!r} has no labels, so its images have no captions.")


def labelled_rows(source: EmbeddingSource) -> Tensor:
    """Return ascending indices (M,) of the usable rows with a label or a caption."""
    if isinstance(source, PairSource):
        return source.pair_rows
    rows = source.usable_rows.sort().values
    return rows[source.target[rows] != UNKNOWN]


def class_captions(
    sources: Sequence[EmbeddingSource], rows_of_sources: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Collect the texts (T, D) of all classes, and for every row the index (M,) of a text.

    ``rows_of_sources`` has row indices for each source, in total M rows. Text 0 is a placeholder of
    zeros, for image-caption pairs. Every class in a source without pairs has a further text.
    """
    # A class number counts the classes in all sources. Number 0 is the placeholder.
    number_of_name: dict[str, int] = {}  # class name -> first class number with this name
    text_of_class = [0]  # for every class number, the first class number with the same name
    texts = [torch.zeros(1, sources[0].space.embed_dim, dtype=torch.float32)]
    class_numbers = []  # for every source, the rows' class numbers
    for source, rows in zip(sources, rows_of_sources, strict=True):
        if isinstance(source, PairSource):
            class_numbers.append(torch.zeros(len(rows), dtype=torch.int64))
            continue
        first_number = len(text_of_class)
        class_numbers.append(source.target[rows] + first_number)
        no_rows = rows[:0]  # the candidates are the same for all rows
        texts.append(source.candidates(no_rows).text)
        numbers = range(first_number, first_number + source.n_candidates)
        if source.class_names is None:  # every class has a different text
            text_of_class += numbers
            continue
        # a new name gets this class's number. A known name keeps its number.
        for name, number in zip(source.class_names, numbers, strict=True):
            text_of_class.append(number_of_name.setdefault(name, number))
    class_of_row = torch.cat(class_numbers)
    return torch.cat(texts), torch.tensor(text_of_class)[class_of_row]


def group_leaders(
    rows: Tensor, cosine: float | None = None, block_rows: int = COSINE_BLOCK_ROWS
) -> Tensor:
    """Group similar unit-norm rows. Return, for every row, its leader's index (N,) int64.

    Without ``cosine``, a row's leader is the first equal row.

    With ``cosine``, rows are visited in order. A row joins the first leader with at least this
    cosine, and belongs to that leader's group. If there is no such leader, the row becomes a
    leader. So two rows near a third row, but not near each other, may be in different groups.

    The time is proportional to N times the number of leaders. The cosines are computed in blocks of
    ``block_rows`` rows and as many leaders.
    """
    first = index_of_first_equal(rows)
    if cosine is None:
        return first
    distinct_rows = first.unique()
    leader_of_row = torch.arange(len(rows))
    leaders = distinct_rows[:0]  # no leader yet
    for block in distinct_rows.split(block_rows):
        leader = _first_leaders_near(rows, block, leaders.split(block_rows), cosine)
        has_leader = leader >= 0
        leader_of_row[block[has_leader]] = leader[has_leader]
        # rows that are near no leader from earlier blocks. Some become leaders.
        new_rows = block[~has_leader]
        are_near = rows[new_rows] @ rows[new_rows].T >= cosine
        leader_of_row[new_rows] = new_rows[_greedy_leaders(are_near)]
        leaders = torch.cat([leaders, leader_of_row[new_rows].unique()])
    return leader_of_row[first]


def _first_leaders_near(
    rows: Tensor, block: Tensor, leader_tiles: Sequence[Tensor], cosine: float
) -> Tensor:
    """Find the first near leader (B,) for each row in a block. -1 if no leader is near.

    Args:
        rows: (N, D) all rows.
        block: (B,) indices of the rows in need of a leader.
        leader_tiles: Indices of all leaders, in tiles. The block is compared with the tiles in
            turn.
        cosine: Minimum cosine between two near rows.
    """
    leader = torch.full_like(block, -1)
    for tile in leader_tiles:
        if not len(tile):
            continue
        has_no_leader = leader < 0
        are_near = rows[block] @ rows[tile].T >= cosine
        # in a row of 0 and 1, argmax is the index of the first 1
        first_in_tile = tile[are_near.byte().argmax(dim=1)]
        joins_tile = has_no_leader & are_near.any(dim=1)
        leader = torch.where(joins_tile, first_in_tile, leader)
    return leader


def _greedy_leaders(are_near: Tensor) -> Tensor:
    """Choose leaders among N rows. Return the index (N,) int64 of each row's first near leader.

    A row is a leader if no earlier leader is near. ``are_near`` (N, N) says which rows are near
    each other.
    """
    is_near = are_near.numpy()
    n_rows = len(is_near)
    if not n_rows:
        return torch.arange(0)
    np.fill_diagonal(is_near, val=True)
    is_leader = np.ones(n_rows, dtype=bool)
    # A row's leader can differ from the row only if the row is near an earlier row. Usually such
    # rows are few.
    first_near = is_near.argmax(axis=1)  # argmax of a boolean row is the index of its first True
    own_index = np.arange(n_rows)
    for row in np.flatnonzero(first_near < own_index):
        is_near_leader = is_near[row, :row] & is_leader[:row]
        is_leader[row] = not is_near_leader.any()
    is_near &= is_leader  # keeps only the leaders' columns
    first_leader = is_near.argmax(axis=1)
    return torch.from_numpy(first_leader)


def hard_pool_order(rows: Tensor, pool_size: int, generator: torch.Generator) -> Tensor:
    """Return an order (N,) of the rows. Each pool gets similar rows: hard negatives.

    1. The generator draws a row. The first end is the row farthest from the drawn row. The second
       end is the row farthest from the first end. So the two ends are far apart.
    2. All rows are sorted by the projection on the direction between the two ends, and split in
       the middle, at a multiple of the pool size.
    3. Both halves are split in the same way, until every part is a single pool.

    This takes N D log(N / pool_size) operations and no similarity matrix. N should be a
    multiple of the pool size. Otherwise the last pool is short.
    """
    pending_parts = [torch.arange(len(rows))]
    pools = []
    while pending_parts:
        part = pending_parts.pop()
        if len(part) <= pool_size:
            pools.append(part)
            continue
        block = rows[part]
        drawn_row = int(torch.randint(len(part), (1,), generator=generator))
        # the farthest unit vector has the smallest cosine
        first_end = int((block @ block[drawn_row]).argmin())
        second_end = int((block @ block[first_end]).argmin())
        projection = block @ (block[first_end] - block[second_end])
        ordered_rows = part[projection.argsort(stable=True)]
        n_pools = len(part) // pool_size
        middle = max(n_pools // 2, 1) * pool_size
        # the first half is appended last, because ``pop`` takes the last part
        pending_parts.append(ordered_rows[middle:])
        pending_parts.append(ordered_rows[:middle])
    return torch.cat(pools)


def require_full_pools(n_rows: int, pool_size: int, *, subject: str) -> None:
    """Raise DataError if ``n_rows`` pairs do not fill a pool. ``subject`` names these pairs."""
    if n_rows < pool_size:
        raise DataError(
            f"{subject} has {n_rows} usable pairs, and a pool has {pool_size}. The size of a pool "
            "is the number of candidates, so a pool is never shortened. Give more pairs or a "
            "smaller --pool-size."
        )
