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
    """Sorted positions of ``n`` random usable labelled rows of every class; of all rows where a class has fewer.

    Rows of none of the classes are not counted by class, so all usable ones stay.

    A larger ``n`` only adds rows, and the other classes do not matter to which ones ``seed``
    chooses.
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
    classes = [rows[target == label] for label in range(source.n_candidates)]
    orders = [
        np.random.default_rng([seed, label]).permutation(len(members))
        for label, members in enumerate(classes)
    ]
    parts = [members[order[:n]] for members, order in zip(classes, orders, strict=True)]
    sizes = [len(part) for part in parts]
    if min(sizes) < n:
        few = sum(size < n for size in sizes)
        warn_caller(
            f"{few} of {len(sizes)} classes have fewer than {n} labelled rows (the fewest: {min(sizes)}); "
            "all of theirs are taken."
        )
    of_none = source.usable_rows[source.outside[source.usable_rows]]
    return torch.cat([*parts, of_none]).sort().values


SIZE = 1 << 14  # hashes that a predictor keeps of the rows of its fit
BLOCK = 1 << 20  # rows whose hashes are in memory together

MAX_SHARED = 0.01
"""Largest share of rows of two sets that may be the same and are left out, as real data hold some twice."""

SHOWN = 3

LEARNED_FROM = "It learned from them, so nothing measured on them holds for others."
"""Why rows of a fit are refused."""


@dataclass(frozen=True)
class RowSketch:
    """The smallest 63-bit hashes of a set of rows, sorted (a bottom-k sketch), and its size; exact up to 16,384."""

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
        share = self.hashes[-1].item() / np.iinfo(np.int64).max
        return min(round((SIZE - 1) / share), self.n_rows)

    def __or__(self, other: RowSketch) -> RowSketch:
        hashes = torch.cat([self.hashes, other.hashes]).unique()
        return RowSketch(hashes[:SIZE], self.n_rows + other.n_rows)

    def overlap(self, source: EmbeddingSource, by: Identity, rows: NDArray[np.int64]) -> Overlap:
        """Those of some ``rows`` (M,) of a source that are in the set."""
        shared, told = np.zeros(len(rows), np.bool_), 0
        reach = np.iinfo(np.int64).max if self.whole else self.hashes[-1].item()
        for places, block in _hashes(source, by, rows):
            shared[places] = np.isin(block, self.hashes.numpy())
            told += int(np.count_nonzero(block <= reach))
        return Overlap(shared & _marked(source, by)[rows], told, self.whole)


def _hashes(
    source: EmbeddingSource, by: Identity, rows: NDArray[np.int64]
) -> Iterator[tuple[slice, NDArray[np.int64]]]:
    """Places among the rows, and hashes, block by block."""
    for start in range(0, len(rows), BLOCK):
        block = source.identities(by, rows[start : start + BLOCK]) & np.uint64(
            np.iinfo(np.int64).max
        )
        yield slice(start, start + len(block)), block.astype(np.int64)


def _marked(source: EmbeddingSource, by: Identity) -> NDArray[np.bool_]:
    """(N,) rows that have a mark: one that is not usable has the embedding of all others that are not."""
    return (
        np.isin(source.status, (VALID, SHORT_POOL))
        if by == "embeddings"
        else np.ones(len(source), np.bool_)
    )


@dataclass(frozen=True)
class Overlap:
    """Which rows of a source are in another set, as far as that can be told."""

    shared: NDArray[np.bool_]  # (N,) bool, those that are known to be
    n_told: int  # rows of which it can be told
    whole: bool = True  # whether all of the other set is known

    def __len__(self) -> int:
        return int(np.count_nonzero(self.shared))

    def said(self, what: str = "rows") -> str:
        """How many, in words."""
        return counted(len(self), len(self.shared), what, whole=self.whole)

    def others(
        self,
        source: EmbeddingSource,
        what: str,
        where: str,
        remedy: str,
        then: str = "they are left out",
    ) -> NDArray[np.bool_]:
        """(N,) the rows of the source that are not shared; warns of those that are, with keys: DataError above 1 %."""
        if len(self):
            keys = ", ".join(
                repr(source.ids[row]) for row in np.flatnonzero(self.shared)[:SHOWN].tolist()
            )
            found = f"{self.said(what)} {where} ({keys}{', ...' if len(self) > SHOWN else ''})"
            if len(self) > MAX_SHARED * self.n_told:
                of = "" if self.whole else f" of the {self.n_told} that can be told"
                raise DataError(f"{found}, more than {MAX_SHARED:.0%}{of}. {remedy}")
            warn_caller(f"{found}; {then}.")
        return ~self.shared


def counted(n: int, n_rows: int, what: str, *, whole: bool) -> str:
    """So many of some rows, in words."""
    more = "" if whole else f" (a sample of {SIZE} rows of the fit is known)"
    return f"{'' if whole else 'at least '}{n} of {n_rows} {what}{more}"


Sketches = Mapping[
    Identity, RowSketch
]  # what a set of rows is recognised by; empty where nothing is known of them


def sketch(source: EmbeddingSource) -> Sketches:
    """Sketches of all that the rows of a source can be recognised by."""
    return {by: RowSketch.of(source, by) for by in source.identified_by}


FEWER = 0.05
"""Share of rows that has to be repeated before an estimate tells it from its own error, five of them."""


def warn_of_repeats(source: EmbeddingSource, sketches: Sketches) -> None:
    """Say how many pictures, or image-caption pairs, training rows are, where more than 1 % of them are repeats."""
    by = source.identified_by[0]
    if by == "names":
        return
    known = sketches[by]
    n_rows, n_distinct = known.n_rows, known.n_distinct
    if (
        by == "embeddings" and not _marked(source, by).all()
    ):  # all that are not usable have one hash
        n_rows = int(_marked(source, by).sum())
        n_distinct -= 1
    few = MAX_SHARED if known.whole else FEWER
    if n_distinct >= (1 - few) * n_rows:
        return
    what = "pictures" if source.pool_size is None else "image-caption pairs"
    about = "" if known.whole else "about "
    logger.warning(
        "different %s among the %s training rows: %s%s. The others stand more than once, and each "
        "counts as often as it stands. Leave out the repeats, unless they are meant as weights.",
        what,
        f"{n_rows:,}",
        about,
        f"{n_distinct:,}",
    )


def join(first: Sketches, second: Sketches) -> Sketches:
    """Sketches of two sets together: by what both are recognised by, or else by what one of them is."""
    common = first.keys() & second.keys()
    if not common:
        return {**first, **second}
    return {by: first[by] | second[by] for by in first if by in common}


def common_identity(
    mine: Collection[Identity], theirs: Collection[Identity], names: tuple[str, str]
) -> Identity | None:
    """What rows of two sets of these ``names`` can be compared by, best first, with a line where it is but by name."""
    by = next((by for by in get_args(Identity) if by in mine and by in theirs), None)
    if by == "names":
        say_once(
            f"rows of {names[0]} and of {names[1]} are compared by their names, not by their pictures, as they have no "
            "other mark in common: another picture of the same name counts as the same row, and a renamed one does "
            "not. To mend it, embed both with this vilu (--overwrite) and fit again."
        )
    return by


def scored_of(data: EmbeddingSource, fresh: NDArray[np.bool_]) -> Tensor | None:
    """Usable rows (S,) of those that are ``fresh`` (N,), so that the others do not change their blocks.

    None with captions, whose rows keep the pools of all.
    """
    return (
        None
        if data.pool_size is not None
        else data.usable_rows[torch.from_numpy(fresh)[data.usable_rows]]
    )


def overlap(
    first: EmbeddingSource, second: EmbeddingSource, names: tuple[str, str]
) -> Overlap | None:
    """The rows of the second source that are in the first; None where nothing tells."""
    by = common_identity(first.identified_by, second.identified_by, names)
    if by is None:
        return None
    return Overlap(
        np.isin(second.identities(by), first.identities(by)) & _marked(second, by), len(second)
    )


def one_per_picture(picture: NDArray[np.int64], failure: NDArray[np.int64]) -> NDArray[np.int64]:
    """Places (M,), ascending, of one row of every picture (N,): a wrong one where there is one.

    Rows whose picture is not known (-1) are pictures of their own.
    """
    places = np.arange(len(picture))
    alone = places[picture == UNKNOWN]
    known = places[picture != UNKNOWN]
    order = known[np.lexsort((known, failure[known] != 1, picture[known]))]
    _, first = np.unique(picture[order], return_index=True)
    return np.sort(np.concatenate([alone, order[first]]))


SIMILARITY_ROWS = 100


def similarity_range(data: EmbeddingSource) -> tuple[float, float]:
    """Mean and standard deviation, over the first 100 usable rows, of the largest cosine with a candidate."""
    rows = data.usable_rows[: max(SIMILARITY_ROWS, data.pool_size or 0)]
    batch = next(data.batches(SIMILARITY_ROWS, rows=rows))
    best = (batch.image @ batch.text.T).amax(dim=1)
    return float(best.mean()), max(
        float(best.std()) if len(best) > 1 else 0.0, 1e-3 * math.sqrt(len(best))
    )


DIRECTIONS = 8
SAME_CANDIDATES = 0.02
"""How far two sketches of the same texts may be apart: bfloat16 moves one by less, another template by ten times it."""


def candidates_of(data: EmbeddingSource) -> dict[str, Any]:
    """What the images choose from, as plain JSON: how many, the hash of their names, and a sketch of their texts.

    The sketch is the mean text in eight fixed random directions: blind to the order of the
    candidates, and to rounding. Of captions there is the size of their pools alone.
    """
    if data.pool_size is not None:
        return {"pool_size": data.pool_size}
    names = {} if data.class_names is None else {"classes": digest(list(data.class_names))}
    directions = np.random.default_rng(0).standard_normal((DIRECTIONS, data.space.embed_dim))
    mean = (
        data.candidates(torch.empty(0, dtype=torch.int64))
        .text.double()
        .mean(dim=0)
        .numpy(force=True)
    )
    return {
        "n_candidates": data.n_candidates,
        **names,
        "texts": (directions @ mean).round(4).tolist(),
    }


def same_candidates(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two of ``candidates_of`` may be the same: names count where one of them knows no texts."""
    sizes = ("n_candidates", "pool_size")
    if any(one.get(name) != other.get(name) for name in sizes):
        return False
    if one.get("texts") and other.get("texts"):
        if len(one["texts"]) != len(other["texts"]):
            return False
        return float(np.abs(np.subtract(one["texts"], other["texts"])).max()) <= SAME_CANDIDATES
    return None in (one.get("classes"), other.get("classes")) or one["classes"] == other["classes"]


def warn_of_other_space(data: EmbeddingSource, mean: float, deviation: float) -> None:
    """Without provenance, the largest cosines are all that can tell a foreign space of the same width."""
    if data.n_candidates < 2 or not len(data.usable_rows):
        return
    found, _ = similarity_range(data)
    if abs(found - mean) > 4 * deviation:
        warn_caller(
            f"the largest cosine of a row is {found:.3f} on average here and was {mean:.3f} ± {deviation:.3f} in "
            "training: are these embeddings from another model? They carry no provenance to check."
        )
