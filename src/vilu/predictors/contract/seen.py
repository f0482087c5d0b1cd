"""Rows of a fit: a few of every class, and a memory of which they were."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vilu.artifacts.hashing import digest
from vilu.callers import warn_caller
from vilu.embeddings.checks import SHORT_POOL, VALID, Identity
from vilu.embeddings.source import EmbeddingSource, say_once
from vilu.errors import UNKNOWN, DataError, UsageError
from vilu.validation import require_at_least

logger = logging.getLogger(__name__)


def shots(source: EmbeddingSource, n: int, seed: int = 0) -> Tensor:
    """Sorted indices of ``n`` random usable labelled rows of every class; all where it has fewer.

    Rows of none of the classes are not counted by class, so all usable ones stay.

    A larger ``n`` only adds rows. Which rows of a class ``seed`` chooses does not depend on the
    rest of the classes.
    """
    require_at_least("shots", n, 1)
    if source.pool_size is not None:
        raise UsageError(
            "shots are rows per class, and image-caption pairs have no classes. Leave shots out."
        )
    rows = source.usable_rows[source.target[source.usable_rows] != UNKNOWN].sort().values
    if not len(rows):
        raise DataError(f"none of the {len(source)} rows has a label, so no class has a shot.")
    target = source.target[rows]
    parts = []
    for label in range(source.n_candidates):
        members = rows[target == label]
        # a generator per class: its order does not depend on the rows of the rest
        order = np.random.default_rng([seed, label]).permutation(len(members))
        parts.append(members[order[:n]])
    sizes = [len(part) for part in parts]
    if min(sizes) < n:
        few = sum(size < n for size in sizes)
        warn_caller(
            f"{few} of {len(sizes)} classes have fewer than {n} labelled rows "
            f"(the fewest: {min(sizes)}); all of theirs are taken.",
        )
    of_none = source.usable_rows[source.outside[source.usable_rows]]
    return torch.cat([*parts, of_none]).sort().values


SIZE = 1 << 14  # hashes that a predictor keeps of the rows of its fit
BLOCK = 1 << 20  # rows whose hashes are in memory together
LARGEST_HASH = np.iinfo(np.int64).max

MAX_SHARED = 0.01
"""Largest share of rows that two sets may have in common and that are left out.

Real data hold some rows twice; more than that is a mistake.
"""

SHOWN = 3

LEARNED_FROM = "It learned from them, so nothing measured on them holds for others."
"""Why rows of a fit are refused."""


@dataclass(frozen=True)
class RowSketch:
    """The smallest 63-bit hashes of a set of rows, sorted (a bottom-k sketch), and its size.

    Up to 16,384 rows it is exact. Of more it is a uniform sample, as hashes are uniform, and the
    same row is in the sketch of any set of the same reach: so membership is certain below the
    largest hash, and unknown above it.
    """

    hashes: torch.Tensor
    n_rows: int

    @classmethod
    def of(cls, source: EmbeddingSource, by: Identity) -> RowSketch:
        """Sketch of the rows of a source."""
        hashes = np.empty(0, np.int64)
        for _, block in _hashes(source, by, np.arange(len(source))):
            hashes = np.unique(np.concatenate([hashes, block]))[:SIZE]
        return cls(torch.from_numpy(hashes), len(source))

    @property
    def whole(self) -> bool:
        """Whether it knows every row of the set, and not a sample."""
        return self.n_rows <= SIZE or len(self.hashes) < SIZE

    @property
    def n_distinct(self) -> int:
        """How many rows differ; of more than 16,384 estimated, with a standard error of 1 %."""
        if self.whole:
            return len(self.hashes)
        # the k-th smallest of n uniform hashes lies near k / n of their range; (k - 1) / share is
        # the unbiased estimate of n (Bar-Yossef et al., RANDOM 2002)
        share = self.hashes[-1].item() / LARGEST_HASH
        return min(round((SIZE - 1) / share), self.n_rows)

    def __or__(self, other: RowSketch) -> RowSketch:
        hashes = torch.cat([self.hashes, other.hashes]).unique()
        return RowSketch(hashes[:SIZE], self.n_rows + other.n_rows)

    def overlap(self, source: EmbeddingSource, by: Identity, rows: NDArray[np.int64]) -> Overlap:
        """Those of some ``rows`` (M,) of a source that are in the set."""
        shared = np.zeros(len(rows), np.bool_)
        n_comparable = 0
        reach = LARGEST_HASH
        if not self.whole:
            reach = int(self.hashes[-1])
        for part, block in _hashes(source, by, rows):
            shared[part] = np.isin(block, self.hashes.numpy())
            n_comparable += int(np.count_nonzero(block <= reach))
        return Overlap(shared & _marked(source, by)[rows], n_comparable, self.whole)


def _hashes(
    source: EmbeddingSource, by: Identity, rows: NDArray[np.int64]
) -> Iterator[tuple[slice, NDArray[np.int64]]]:
    """A slice of the rows, and their hashes, block by block."""
    for start in range(0, len(rows), BLOCK):
        identities = source.identities(by, rows[start : start + BLOCK])
        block = identities & np.uint64(LARGEST_HASH)  # torch has no unsigned 64-bit integers
        yield slice(start, start + len(block)), block.astype(np.int64)


def _marked(source: EmbeddingSource, by: Identity) -> NDArray[np.bool_]:
    """(N,) rows that have a mark of their own.

    All rows that are not usable have one and the same embedding, so by it nothing is recognised.
    """
    if by == "embeddings":
        return np.isin(source.status, (VALID, SHORT_POOL))
    return np.ones(len(source), np.bool_)


@dataclass(frozen=True)
class Overlap:
    """Which rows of a source are in another set, as far as that is known."""

    shared: NDArray[np.bool_]  # (N,) bool, those that are known to be
    n_comparable: int  # rows of which it is known
    whole: bool = True  # whether all of the other set is known

    def __len__(self) -> int:
        return int(np.count_nonzero(self.shared))

    def in_words(self, what: str = "rows") -> str:
        """How many, in words."""
        return counted(len(self), len(self.shared), what, whole=self.whole)

    def unshared(
        self,
        source: EmbeddingSource,
        what: str,
        where: str,
        remedy: str,
        then: str = "they are left out",
    ) -> NDArray[np.bool_]:
        """(N,) the rows of the source that are not shared.

        It warns of those that are, with some of their keys.

        Raises:
            DataError: If more than 1 % of the rows are shared.
        """
        if not len(self):
            return ~self.shared
        keys = [repr(source.ids[row]) for row in np.flatnonzero(self.shared)[:SHOWN].tolist()]
        if len(self) > SHOWN:
            keys.append("...")
        problem = f"{self.in_words(what)} {where} ({', '.join(keys)})"
        if len(self) > MAX_SHARED * self.n_comparable:
            of_sample = ""
            if not self.whole:
                of_sample = f" of the {self.n_comparable} that can be told"
            raise DataError(f"{problem}, more than {MAX_SHARED:.0%}{of_sample}. {remedy}")
        warn_caller(f"{problem}; {then}.")
        return ~self.shared


def counted(n: int, n_rows: int, what: str, *, whole: bool) -> str:
    """So many of the rows, in words."""
    count = f"{n} of {n_rows} {what}"
    if whole:
        return count
    return f"at least {count} (a sample of {SIZE} rows of the fit is known)"


Sketches = Mapping[Identity, RowSketch]
"""What a set of rows is recognised by; empty where nothing is known of them."""


def sketch(source: EmbeddingSource) -> Sketches:
    """Sketches of all that the rows of a source can be recognised by."""
    return {by: RowSketch.of(source, by) for by in source.identified_by}


FEWER = 0.05
"""Share of rows that has to be repeated before an estimate shows it.

It is five standard errors of that estimate.
"""


def warn_of_repeats(source: EmbeddingSource, sketches: Sketches) -> None:
    """Say how many pictures, or image-caption pairs, there are where many rows are repeats.

    Many is more than 1 % of the rows, or 5 % where that is an estimate.
    """
    by = source.identified_by[0]
    if by == "names":
        return
    known = sketches[by]
    n_rows = known.n_rows
    n_distinct = known.n_distinct
    is_marked = _marked(source, by)
    if not is_marked.all():  # all rows without a mark have one hash
        n_rows = int(is_marked.sum())
        n_distinct -= 1
    few = MAX_SHARED
    about = ""
    if not known.whole:
        few = FEWER
        about = "about "
    if n_distinct >= (1 - few) * n_rows:
        return
    what = "pictures"
    if source.pool_size is not None:
        what = "image-caption pairs"
    logger.warning(
        "different %s among the %s training rows: %s%s. The others stand more than once, and each "
        "counts as often as it stands. Leave out the repeats, unless they are meant as weights.",
        what,
        f"{n_rows:,}",
        about,
        f"{n_distinct:,}",
    )


def join(first: Sketches, second: Sketches) -> Sketches:
    """Sketches of two sets together, by what both are recognised by.

    Where that is nothing, each set is recognised by what it is alone.
    """
    common = first.keys() & second.keys()
    if not common:
        return {**first, **second}
    return {by: first[by] | second[by] for by in first if by in common}


def common_identity(
    first: Collection[Identity], second: Collection[Identity], names: tuple[str, str]
) -> Identity | None:
    """The best of what rows of two sets of these ``names`` can be compared by.

    A line is logged where that is their names.
    """
    identities: tuple[Identity, ...] = get_args(Identity)  # the best first
    common = [by for by in identities if by in first and by in second]
    if not common:
        return None
    if common[0] == "names":
        say_once(
            f"rows of {names[0]} and of {names[1]} are compared by their names, not by their "
            "pictures, as they have no other mark in common: another picture of the same name "
            "counts as the same row, and a renamed one does not. To mend it, embed both with this "
            "vilu (--overwrite) and fit again."
        )
    return common[0]


def scored_of(data: EmbeddingSource, fresh: NDArray[np.bool_]) -> Tensor | None:
    """Usable rows (S,) of those that are ``fresh`` (N,).

    They alone are scored, so that the rest does not change their blocks. None with captions, whose
    rows keep the pools of all.
    """
    if data.pool_size is not None:
        return None
    is_fresh = torch.from_numpy(fresh)
    return data.usable_rows[is_fresh[data.usable_rows]]


def overlap(
    first: EmbeddingSource, second: EmbeddingSource, names: tuple[str, str]
) -> Overlap | None:
    """The rows of the second source that are in the first; None where nothing tells."""
    by = common_identity(first.identified_by, second.identified_by, names)
    if by is None:
        return None
    is_in_first = np.isin(second.identities(by), first.identities(by))
    return Overlap(is_in_first & _marked(second, by), len(second))


def one_per_picture(picture: NDArray[np.int64], failure: NDArray[np.int64]) -> NDArray[np.int64]:
    """Indices (M,), ascending, of one row of every picture (N,): a wrong one where there is one.

    Rows whose picture is not known (-1) are pictures of their own.
    """
    alone = np.flatnonzero(picture == UNKNOWN)
    known = np.flatnonzero(picture != UNKNOWN)
    # the last key sorts first: by picture, then wrong rows before right ones, then by index
    order = known[np.lexsort((known, failure[known] != 1, picture[known]))]
    _, first = np.unique(picture[order], return_index=True)
    return np.sort(np.concatenate([alone, order[first]]))


SIMILARITY_ROWS = 100


def similarity_range(data: EmbeddingSource) -> tuple[float, float]:
    """Mean and standard deviation of the largest cosine of a row with a candidate.

    They are over the first 100 usable rows.
    """
    rows = data.usable_rows[: max(SIMILARITY_ROWS, data.pool_size or 0)]
    batch = next(data.batches(SIMILARITY_ROWS, rows=rows))
    best = (batch.image @ batch.text.T).amax(dim=1)
    least = 1e-3 * math.sqrt(len(best))  # of rows that are all alike the deviation would be zero
    deviation = least
    if len(best) > 1:
        deviation = max(float(best.std()), least)
    return float(best.mean()), deviation


DIRECTIONS = 8
SAME_CANDIDATES = 0.02
"""How far two sketches of the same texts may be apart.

bfloat16 moves a sketch by less, another template by ten times it.
"""


def candidates_of(data: EmbeddingSource) -> dict[str, Any]:
    """What the images choose from, as plain JSON.

    It is how many candidates there are, the hash of their names, and a sketch of their texts: the
    mean text in eight fixed random directions, blind to the order of the candidates, and to
    rounding. Of captions there is the size of their pools alone.
    """
    if data.pool_size is not None:
        return {"pool_size": data.pool_size}
    candidates: dict[str, Any] = {"n_candidates": data.n_candidates}
    if data.class_names is not None:
        candidates["classes"] = digest(list(data.class_names))
    text = data.candidates(torch.empty(0, dtype=torch.int64)).text
    mean = text.double().mean(dim=0).numpy(force=True)
    directions = np.random.default_rng(0).standard_normal((DIRECTIONS, data.space.embed_dim))
    candidates["texts"] = (directions @ mean).round(4).tolist()
    return candidates


def same_candidates(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two of ``candidates_of`` may be the same.

    Names count where one of them knows no texts.
    """
    for size in ("n_candidates", "pool_size"):
        if first.get(size) != second.get(size):
            return False
    first_texts = first.get("texts")
    second_texts = second.get("texts")
    if first_texts and second_texts:
        if len(first_texts) != len(second_texts):
            return False
        distance = np.abs(np.subtract(first_texts, second_texts)).max()
        return float(distance) <= SAME_CANDIDATES
    first_classes = first.get("classes")
    second_classes = second.get("classes")
    if first_classes is None or second_classes is None:
        return True
    return bool(first_classes == second_classes)


def warn_of_other_space(data: EmbeddingSource, mean: float, deviation: float) -> None:
    """Warn where the largest cosines are unlike those of the fit, ``mean`` and ``deviation``.

    Without provenance they are all that shows a foreign space of the same width.
    """
    if data.n_candidates < 2 or not len(data.usable_rows):
        return
    mean_here, _ = similarity_range(data)
    if abs(mean_here - mean) > 4 * deviation:
        warn_caller(
            f"the largest cosine of a row is {mean_here:.3f} on average here and was {mean:.3f} ± "
            f"{deviation:.3f} in training: are these embeddings from another model? They carry no "
            "provenance to check.",
        )
