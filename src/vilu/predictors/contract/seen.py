"""Rows of a fit: choosing a few rows per class, and recognising rows after the fit.

Rows are recognised by hashes of pictures, embeddings or names (``IdentityKind``).
"""

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
from vilu.embeddings.checks import SHORT_POOL, VALID, IdentityKind
from vilu.embeddings.source import EmbeddingSource, warn_once
from vilu.errors import UNKNOWN, DataError, UsageError
from vilu.validation import require_at_least

logger = logging.getLogger(__name__)


def draw_shots(source: EmbeddingSource, n_per_class: int, seed: int = 0) -> Tensor:
    """Return sorted indices of ``n_per_class`` random usable labelled rows per class.

    If a class has fewer rows, all are taken. All usable rows outside the classes are taken as well.

    A larger ``n_per_class`` only adds rows. The rows that ``seed`` chooses from a class do not
    depend on the remaining classes.
    """
    require_at_least("shots", n_per_class, 1)
    if source.pool_size is not None:
        raise UsageError(
            "shots are rows per class, and image-caption pairs have no classes. Leave shots out."
        )
    usable_rows = source.usable_rows
    is_labelled = source.target[usable_rows] != UNKNOWN
    rows = usable_rows[is_labelled].sort().values
    if not len(rows):
        raise DataError(f"none of the {len(source)} rows has a label, so no class has a shot.")
    target = source.target[rows]
    chosen_rows = []
    for label in range(source.n_candidates):
        rows_of_class = rows[target == label]
        # a generator for each class: the order then depends only on the rows in the class
        rng = np.random.default_rng([seed, label])
        order = rng.permutation(len(rows_of_class))
        chosen_rows.append(rows_of_class[order[:n_per_class]])
    _warn_of_small_classes([len(rows_of_class) for rows_of_class in chosen_rows], n_per_class)
    ood_rows = usable_rows[source.outside[usable_rows]]
    shots = torch.cat([*chosen_rows, ood_rows])
    return shots.sort().values


def _warn_of_small_classes(sizes: list[int], n_per_class: int) -> None:
    """Warn if classes have fewer than ``n_per_class`` rows. ``sizes`` are the row counts."""
    n_small_classes = sum(size < n_per_class for size in sizes)
    if n_small_classes:
        warn_caller(
            f"{n_small_classes} of {len(sizes)} classes have fewer than {n_per_class} labelled "
            f"rows (the fewest: {min(sizes)}); all their rows are taken.",
        )


# Constants for recognising rows.

MAX_HASHES = 16_384  # a predictor stores at most this many hashes of fit rows
BLOCK_ROWS = 2**20  # number of rows with hashes in memory at the same time
LARGEST_HASH = np.iinfo(np.int64).max  # hashes have 63 bits

MAX_OVERLAP_SHARE = 0.01
"""Largest share of common rows between two sets.

Real data contain some rows twice. Such rows are left out. A larger share is a mistake and is
refused.
"""

MAX_SHOWN_NAMES = 3  # number of row names listed in a message

WHY_NOT_FIT_ROWS = "It learned from them, so nothing measured on them holds for others."
"""The reason, in messages, why a measurement refuses the rows that were used to fit."""


@dataclass(frozen=True)
class RowSketch:
    """Bottom-k sketch of a row set: the smallest 63-bit hashes, sorted, and the row count.

    If the set has at most 16,384 rows, the sketch has all hashes. For a larger set the sketch is a
    uniform sample, since hashes are uniform. Such a sketch has every hash of the set up to the
    largest hash in the sketch. For a row with a larger hash, membership in the set is unknown.
    """

    hashes: torch.Tensor  # (min(number of different rows, MAX_HASHES),) int64, ascending
    n_rows: int  # number of rows in the set, including repeats

    @classmethod
    def of(cls, source: EmbeddingSource, kind: IdentityKind) -> RowSketch:
        """Make a sketch of all rows in a source. ``kind`` says which identities are hashed."""
        hashes = np.empty(0, np.int64)
        all_rows = np.arange(len(source))
        for _, hashes_of_block in _hash_blocks(source, kind, all_rows):
            all_hashes = np.concatenate([hashes, hashes_of_block])
            hashes = np.unique(all_hashes)[:MAX_HASHES]  # sorted, so the smallest stay
        return cls(torch.from_numpy(hashes), len(source))

    @property
    def is_complete(self) -> bool:
        """Whether the sketch has the hashes of all rows in the set, not only a sample."""
        is_small_set = self.n_rows <= MAX_HASHES
        has_few_hashes = len(self.hashes) < MAX_HASHES  # also in a large set with many repeats
        return is_small_set or has_few_hashes

    @property
    def n_distinct(self) -> int:
        """Number of different rows. Above 16,384, an estimate with about 1 % standard error."""
        if self.is_complete:
            return len(self.hashes)
        # Among n uniform hashes, the k-th smallest is at about the share k / n of the hash range.
        # From this share s, (k - 1) / s estimates n without bias (Bar-Yossef et al., RANDOM 2002).
        share = self.hashes[-1].item() / LARGEST_HASH
        return min(round((MAX_HASHES - 1) / share), self.n_rows)

    def __or__(self, other: RowSketch) -> RowSketch:
        """Make the sketch of the union."""
        joint_hashes = torch.cat([self.hashes, other.hashes])
        hashes = joint_hashes.unique()
        return RowSketch(hashes[:MAX_HASHES], self.n_rows + other.n_rows)

    def overlap(
        self, source: EmbeddingSource, kind: IdentityKind, rows: NDArray[np.int64]
    ) -> Overlap:
        """Find which ``rows`` (M,) of a source are in the set."""
        has_known_hash = np.zeros(len(rows), np.bool_)
        n_comparable = 0
        largest_known_hash = LARGEST_HASH
        if not self.is_complete:
            largest_known_hash = int(self.hashes[-1])
        known_hashes = self.hashes.numpy()
        for block, hashes in _hash_blocks(source, kind, rows):
            has_known_hash[block] = np.isin(hashes, known_hashes)
            n_comparable += int(np.count_nonzero(hashes <= largest_known_hash))
        shared = has_known_hash & _has_identity(source, kind)[rows]
        return Overlap(
            shared=shared,
            n_comparable=n_comparable,
            is_complete=self.is_complete,
        )


def _hash_blocks(
    source: EmbeddingSource, kind: IdentityKind, rows: NDArray[np.int64]
) -> Iterator[tuple[slice, NDArray[np.int64]]]:
    """Yield blocks of ``rows`` (M,): the block's slice of ``rows``, and the hashes of its rows."""
    for start in range(0, len(rows), BLOCK_ROWS):
        identities = source.identities(kind, rows[start : start + BLOCK_ROWS])
        # the highest bit is dropped, because torch has no unsigned 64-bit integers
        hashes = (identities & np.uint64(LARGEST_HASH)).astype(np.int64)
        yield slice(start, start + len(hashes)), hashes


def _has_identity(source: EmbeddingSource, kind: IdentityKind) -> NDArray[np.bool_]:
    """Return a mask (N,): false if the identity cannot tell the row from other rows.

    All rows without a usable embedding have the same embedding. So if ``kind`` is "embeddings", all
    these rows have the same identity.
    """
    if kind == "embeddings":
        return np.isin(source.status, (VALID, SHORT_POOL))
    return np.ones(len(source), np.bool_)


@dataclass(frozen=True)
class Overlap:
    """Which rows of a source are in a second set, as far as known."""

    shared: NDArray[np.bool_]  # (N,) whether a row is known to be in the second set
    n_comparable: int  # number of rows comparable with the second set
    is_complete: bool = True  # whether all rows in the second set are known, not a sample

    def __len__(self) -> int:
        """Count the shared rows."""
        return int(np.count_nonzero(self.shared))

    def in_words(self, rows_name: str = "rows") -> str:
        """Return a phrase for a message, such as "3 of 200 rows"."""
        return count_in_words(len(self), len(self.shared), rows_name, is_complete=self.is_complete)

    def unshared_mask(
        self,
        source: EmbeddingSource,
        rows_name: str,
        predicate: str,
        remedy: str,
        consequence: str = "they are left out",
    ) -> NDArray[np.bool_]:
        """Return a mask (N,) over ``source``: true for rows not known as shared.

        Args:
            source: The source with the N rows. Messages name rows by the source's ``ids``.
            rows_name: The subject of a message, such as "validation rows".
            predicate: The verb phrase of a message, such as "are in the training set, too".
            remedy: Advice in whole sentences, at the end of the error.
            consequence: Clause about the shared rows, at the end of the warning.

        Warns:
            UserWarning: If a row is shared. Example: "1 of 200 validation rows are in the training
                set, too ('a.jpg'); they are left out."

        Raises:
            DataError: If more than 1 % of the comparable rows are shared.
        """
        if not len(self):
            return ~self.shared
        shown_rows = np.flatnonzero(self.shared)[:MAX_SHOWN_NAMES]
        names = [repr(source.ids[row]) for row in shown_rows.tolist()]
        if len(self) > MAX_SHOWN_NAMES:
            names.append("...")
        problem = f"{self.in_words(rows_name)} {predicate} ({', '.join(names)})"
        if len(self) > MAX_OVERLAP_SHARE * self.n_comparable:
            limit = f"{MAX_OVERLAP_SHARE:.0%}"
            if not self.is_complete:
                limit += f" of the {self.n_comparable} that can be compared"
            raise DataError(f"{problem}, more than {limit}. {remedy}")
        warn_caller(f"{problem}; {consequence}.")
        return ~self.shared


def count_in_words(n: int, n_rows: int, rows_name: str, *, is_complete: bool) -> str:
    """Return a phrase: "3 of 200 rows", or "at least ..." if only a sample was compared."""
    count = f"{n} of {n_rows} {rows_name}"
    if is_complete:
        return count
    return f"at least {count} (a sample of {MAX_HASHES} rows of the fit is known)"


Sketches = Mapping[IdentityKind, RowSketch]
"""Maps an identity kind to the sketch of a row set. Empty if no rows are known."""


def make_sketches(source: EmbeddingSource) -> Sketches:
    """Make a sketch of the source rows for every available identity kind."""
    return {kind: RowSketch.of(source, kind) for kind in source.identified_by}


MAX_ESTIMATED_REPEATS = 0.05
"""Largest share of repeated rows without a warning, if the share is estimated from a sample.

This limit is five standard errors of the estimate.
"""


def warn_of_repeats(source: EmbeddingSource, sketches: Sketches) -> None:
    """Warn if more than 1 % of the training rows are repeats, or 5 % by an estimate.

    The warning counts the different pictures, or the different image-caption pairs. Rows recognised
    only by names are not checked.
    """
    if not source.has_vectors:
        return
    kind = source.identified_by[0]  # the most reliable kind
    if kind == "names":
        return
    row_sketch = sketches[kind]
    n_rows = row_sketch.n_rows
    n_distinct = row_sketch.n_distinct
    has_identity = _has_identity(source, kind)
    if not has_identity.all():  # leave out rows without a usable embedding, which share a hash
        n_rows = int(has_identity.sum())
        n_distinct -= 1
    max_repeats = MAX_OVERLAP_SHARE
    qualifier = ""
    if not row_sketch.is_complete:
        max_repeats = MAX_ESTIMATED_REPEATS
        qualifier = "about "
    if n_distinct >= (1 - max_repeats) * n_rows:
        return
    counted_things = "pictures"
    if source.pool_size is not None:
        counted_things = "image-caption pairs"
    logger.warning(
        "the %s training rows have only %s%s different %s: the other rows are repeats. The fit "
        "counts every repeat. Leave out the repeats, unless they are meant as weights.",
        f"{n_rows:,}",
        qualifier,
        f"{n_distinct:,}",
        counted_things,
    )


def join_sketches(first: Sketches, second: Sketches) -> Sketches:
    """Join the sketches of two sets, for the common identity kinds.

    If the sets have no kind in common, all sketches are returned unchanged.
    """
    common_kinds = first.keys() & second.keys()
    if not common_kinds:
        return {**first, **second}
    return {kind: first[kind] | second[kind] for kind in first if kind in common_kinds}


def common_identity(
    first: Collection[IdentityKind], second: Collection[IdentityKind], names: tuple[str, str]
) -> IdentityKind | None:
    """Find the most reliable identity kind in both sets. None if the sets have no kind in common.

    If rows can be compared only by names, a message is logged. The message calls the two sets by
    ``names``.
    """
    identities: tuple[IdentityKind, ...] = get_args(IdentityKind)  # the most reliable kind first
    common_kinds = [kind for kind in identities if kind in first and kind in second]
    if not common_kinds:
        return None
    if common_kinds[0] == "names":
        warn_once(
            f"rows of {names[0]} and of {names[1]} are compared by their names, not by their "
            "pictures, as they have no other mark in common: another picture of the same name "
            "counts as the same row, and a renamed one does not. To mend it, embed both with this "
            "vilu (--overwrite) and fit again."
        )
    return common_kinds[0]


def rows_to_score(data: EmbeddingSource, is_unseen: NDArray[np.bool_]) -> Tensor | None:
    """Return indices (S,) of the usable rows in the mask ``is_unseen`` (N,).

    Scoring divides only these rows into blocks. So rows outside the mask cannot change the blocks.
    For image-caption pairs the result is None, for all rows, since pools are made from all rows.
    """
    if data.pool_size is not None:
        return None
    mask = torch.from_numpy(is_unseen)
    return data.usable_rows[mask[data.usable_rows]]


def find_overlap(
    first: EmbeddingSource, second: EmbeddingSource, names: tuple[str, str]
) -> Overlap | None:
    """Find which rows of ``second`` are in ``first``. None if the sources are not comparable.

    Messages call ``first`` and ``second`` by ``names``.
    """
    kind = common_identity(first.identified_by, second.identified_by, names)
    if kind is None:
        return None
    second_identities = second.identities(kind)
    first_identities = first.identities(kind)
    is_in_first = np.isin(second_identities, first_identities)
    shared = is_in_first & _has_identity(second, kind)
    return Overlap(shared=shared, n_comparable=len(second))


def one_row_per_picture(
    picture: NDArray[np.int64], failure: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Choose one row per picture, a failure if possible. Return ascending row indices (M,).

    Args:
        picture: (N,) picture identity of every row. Every row with an unknown picture (-1) counts
            as a separate picture.
        failure: (N,) 1 if the answer is wrong. If a picture has no such row, the first row is
            chosen.
    """
    rows_of_unknown_picture = np.flatnonzero(picture == UNKNOWN)
    known_rows = np.flatnonzero(picture != UNKNOWN)
    is_no_failure = failure[known_rows] != 1
    # Rows are sorted by picture. Within a picture, failures come first, and then lower indices.
    # (The last key of ``np.lexsort`` is the most important key.) ``np.unique`` then finds the first
    # row for every picture.
    order = known_rows[np.lexsort((known_rows, is_no_failure, picture[known_rows]))]
    _, first_positions = np.unique(picture[order], return_index=True)
    chosen_rows = np.concatenate([rows_of_unknown_picture, order[first_positions]])
    return np.sort(chosen_rows)


SIMILARITY_ROWS = 100  # usable rows read by ``similarity_statistics``


def similarity_statistics(data: EmbeddingSource) -> tuple[float, float]:
    """Compute mean and standard deviation of the largest cosines, over the first 100 usable rows.

    A row's largest cosine is the cosine with the nearest candidate.
    """
    # pools can only be read as a whole, so a pool with more than 100 rows is read in full
    rows = data.usable_rows[: max(SIMILARITY_ROWS, data.pool_size or 0)]
    batch = next(data.batches(SIMILARITY_ROWS, rows=rows))
    largest_cosine = (batch.image @ batch.text.T).amax(dim=1)
    # Equal rows have a standard deviation of zero. ``warn_of_other_space`` would then warn of any
    # difference, however small. Hence the minimum.
    min_deviation = 1e-3 * math.sqrt(len(largest_cosine))
    deviation = min_deviation
    if len(largest_cosine) > 1:
        deviation = max(float(largest_cosine.std()), min_deviation)
    return float(largest_cosine.mean()), deviation


N_DIRECTIONS = 8  # random projections in a sketch of candidate texts
MAX_SKETCH_DIFFERENCE = 0.02
"""Largest difference between two sketches of the same candidate texts.

Rounding to bfloat16 changes a sketch by less. A different prompt template changes a sketch by ten
times as much.
"""


def describe_candidates(data: EmbeddingSource) -> dict[str, Any]:
    """Describe the candidates as plain JSON.

    The description has the candidate count, the hashed class names if known, and a sketch of the
    candidate texts. The sketch has eight rounded numbers: the products of the mean text vector with
    eight fixed random vectors. The candidate order has no effect on the sketch. Without texts
    (given logits) the sketch is empty. For image-caption pairs the description is only the pool
    size.
    """
    if data.pool_size is not None:
        return {"pool_size": data.pool_size}
    candidates: dict[str, Any] = {"n_candidates": data.n_candidates}
    if data.class_names is not None:
        candidates["classes"] = digest(list(data.class_names))
    if not data.has_texts:
        candidates["texts"] = []
        return candidates
    no_rows = torch.empty(0, dtype=torch.int64)
    text = data.candidates(no_rows).text
    mean_text = text.double().mean(dim=0)
    rng = np.random.default_rng(0)
    directions = rng.standard_normal((N_DIRECTIONS, data.space.embed_dim))
    sketch = directions @ mean_text.numpy(force=True)
    candidates["texts"] = sketch.round(4).tolist()
    return candidates


def candidates_agree(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Return whether two results from ``describe_candidates`` may describe the same candidates.

    The texts are compared, or the names if a description has no texts.
    """
    for size in ("n_candidates", "pool_size"):
        if first.get(size) != second.get(size):
            return False
    first_texts = first.get("texts")
    second_texts = second.get("texts")
    if first_texts is not None and second_texts is not None:
        # the sketch of given logits is empty, so given logits differ from texts
        if len(first_texts) != len(second_texts):
            return False
    if first_texts and second_texts:
        differences = np.subtract(first_texts, second_texts)
        distance = np.abs(differences).max()
        return float(distance) <= MAX_SKETCH_DIFFERENCE
    first_classes = first.get("classes")
    second_classes = second.get("classes")
    if first_classes is None or second_classes is None:
        return True
    return bool(first_classes == second_classes)


def warn_of_other_space(data: EmbeddingSource, mean: float, deviation: float) -> None:
    """Warn if the embeddings in ``data`` and in the fit seem to come from two models.

    ``mean`` and ``deviation`` are the ``similarity_statistics`` for the fit: average and standard
    deviation of the rows' largest cosines. The warning comes if the average for ``data`` is more
    than 4 standard deviations away from ``mean``.

    Embeddings without provenance may come from a different model with the same width. Only this
    check recognises such embeddings.
    """
    if data.n_candidates < 2 or not len(data.usable_rows):
        return
    mean_here, _ = similarity_statistics(data)
    if abs(mean_here - mean) > 4 * deviation:
        warn_caller(
            f"the largest cosine of a row is {mean_here:.3f} on average here and was {mean:.3f} ± "
            f"{deviation:.3f} in training: are these embeddings from another model? They carry no "
            "provenance to check.",
        )
