"""The rows of a cell: which embeddings a fit sees, and which are scored."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vilu.artifacts.hashing import digest
from vilu.embeddings.checks import STATUS, VALID
from vilu.embeddings.pairs import Pools, PseudoCaptions
from vilu.embeddings.rows import SCORING_BATCH
from vilu.embeddings.source import EmbeddingSource
from vilu.embeddings.space import EmbeddingSpace
from vilu.embeddings.two_models import TwoModels
from vilu.errors import UNKNOWN, DataError, ProvenanceError
from vilu.predictors.contract.seen import overlap
from vilu.scoring.score import source_fingerprint
from vilu.store.reader import CaptionStore, EmbeddingStore, open_source
from vilu_bench.studies.cells import (
    Cell,
    Origin,
    ScoredSet,
    needed_parts,
    origin_of,
    plan,
    scored_set_of,
    selects,
)
from vilu_bench.studies.config import Config, Unseen
from vilu_bench.studies.parts import ROLES, Role
from vilu_bench.studies.stores import Part, evenly_spaced

DRAW, HALVES, DIVISION = (
    1,
    2,
    3,
)  # what a generator is for: two draws of one seed must not go together


def draw_rows(target: NDArray[np.int64], per_class: int, seed: int) -> NDArray[np.int64]:
    """Sorted positions of ``per_class`` labelled rows of every class, or of all where a class has fewer.

    The rows for a smaller number are among those for a larger one of the same seed.
    """
    rng = np.random.default_rng([DRAW, seed])
    order = rng.permutation(len(target))
    chosen = [
        order[target[order] == label][:per_class] for label in np.unique(target[target != UNKNOWN])
    ]
    return np.sort(np.concatenate([np.empty(0, np.int64), *chosen]))


def draw_share(target: NDArray[np.int64], share: float, seed: int) -> NDArray[np.int64]:
    """Sorted positions of a share of the labelled rows, at least one; those of a smaller share are among them."""
    rows = np.random.default_rng([DRAW, seed]).permutation(np.flatnonzero(target != UNKNOWN))
    return np.sort(rows[: max(round(share * len(rows)), 1)])


def held_out(identities: NDArray[np.uint64], share: float) -> NDArray[np.bool_]:
    """(N,) whether a row is held out: where the hash that tells it from others, bytes reversed, is below the share."""
    return identities.byteswap() < share * 2.0**64


def divided(n: int, share: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of n to fit on, a share of them drawn by the seed, and the others, to test on; each sorted."""
    order = np.random.default_rng([DIVISION, seed]).permutation(n)
    first = round(share * n)
    return np.sort(order[:first]), np.sort(order[first:])


def class_halves(n_classes: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Classes to fit on and classes to test on, each sorted; the second half is the larger one of an odd number."""
    if n_classes < 4:
        raise DataError(
            f"unseen classes need at least 4 classes, 2 to fit on and 2 to test on. Got {n_classes}."
        )
    order = np.random.default_rng([HALVES, seed]).permutation(n_classes)
    return np.sort(order[: n_classes // 2]), np.sort(order[n_classes // 2 :])


def of_classes(source: EmbeddingSource, classes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Positions of the rows that belong to some classes."""
    return np.flatnonzero(np.isin(source.target.numpy(), classes))


@dataclass(frozen=True)
class Truth:
    """What is known of the rows of a test set, whatever the method."""

    rows: str  # names these rows and candidates; what has the same name may be compared row by row
    # (N,) int64, 1 where the zero-shot answer is wrong, 0 where it is right, -1 where that is
    # unknown
    failure: NDArray[np.int64]
    outside: NDArray[np.bool_]  # (N,) whether a picture is of none of the classes
    reason: tuple[str | None, ...]  # per row why it cannot have an uncertainty, or None


class Workbench:
    """Opens each store once and cuts the sets of a cell from it; ``seconds`` are those of a second model."""

    def __init__(
        self,
        config: Config,
        folders: Mapping[Part, Path],
        seconds: Mapping[Part, Path] = MappingProxyType({}),
    ) -> None:
        self.config, self.folders, self.seconds = config, folders, seconds
        self._open = cache(self._open_part)
        self._truth = cache(self._truth_of)

    def source(self, data: str, role: Role, pool_size: int | None = None) -> EmbeddingSource:
        """The rows of a role, or what ``limit`` leaves of them."""
        return self._open(data, role, pool_size)[0]

    def fingerprint(self, data: str, role: Role, pool_size: int | None = None) -> str:
        """Hash of everything in it."""
        return self._open(data, role, pool_size)[1]

    def _open_part(
        self, data: str, role: Role, pool_size: int | None
    ) -> tuple[EmbeddingSource, str]:
        share = self.config.data[data].validation
        if not isinstance(share, float) or role == "test":
            return self._open_store(data, role, pool_size)
        whole, name = self._open_store(data, "train", None)
        # by what rows are recognised by: a picture that is there twice is on one side
        chosen = held_out(whole.identities(whole.identified_by[0]), share) == (role == "validation")
        return whole.take(np.flatnonzero(chosen)), digest([name, role, share])

    def _open_store(
        self, data: str, role: Role, pool_size: int | None
    ) -> tuple[EmbeddingSource, str]:
        entry, folder = self.config.data[data], self.folders[data, role]
        pools = Pools(pool_size or entry.pool_size) if entry.captions else None
        source = open_source(folder, pools=pools, fold=role if entry.captions else None)
        if not isinstance(source, EmbeddingStore | CaptionStore):
            raise ProvenanceError(
                f"{folder} was not made by vilu embed, so nothing says what is in it."
            )
        manifest, limit = source.manifest, entry.limit_of(role)
        what = [manifest.fingerprint, manifest.classes, manifest.content]
        if pools is not None:
            return source, digest([*what, role, asdict(pools)])
        second = self.seconds.get((data, role))
        if second is not None:
            other = open_source(second)
            source, what = TwoModels(source, other), [*what, source_fingerprint(other)]
        cut = limit if limit is not None and limit < len(source) else None
        name = digest([*what, cut])
        return (source if cut is None else source.take(evenly_spaced(len(source), cut))), name

    def _divided(
        self, data: str, seed: int | None, part: int, source: EmbeddingSource
    ) -> EmbeddingSource:
        """The rows to fit on (part 0) or to test on (1), where they are of one set."""
        share = self.config.data[data].fit_share
        if seed is None or share is None:
            return source
        fit, test = (source.take(rows) for rows in divided(len(source), share, seed))
        common = (
            None if part else overlap(test, fit, (f"the test rows of {data}", "its training rows"))
        )
        if common:
            warnings.warn(
                f"{common.said('rows to fit on')} of {data} are left out: they are tested on.",
                stacklevel=2,
            )
            return fit.take(np.flatnonzero(~common.shared))
        return test if part else fit

    def check(self) -> None:
        """Refuse data sets whose parts do not belong together."""
        parts = needed_parts(self.config, plan(self.config))
        for data in self.config.data:
            roles = [role for role in ROLES if (data, role) in parts]
            if "test" in roles and not self.config.data[data].captions:
                self._require_labels(data)
            for name, setting in self.config.settings.items():
                if isinstance(setting, Unseen) and self.config.is_tested_on(name, data):
                    class_halves(self.source(data, "test").n_candidates, 0)
            if self.config.data[data].fit_share is not None:
                continue  # one set
            for number, mine in enumerate(roles):
                for other in roles[:number]:
                    self._check_pair(data, other, mine)

    def _require_labels(self, data: str) -> None:
        test = self.source(data, "test")
        if not ((test.target != UNKNOWN) | test.outside).any():
            raise DataError(
                f"the test set of {data} has no labels, so nothing can be measured on it. Embed labelled images."
            )

    def _check_pair(self, data: str, role_a: Role, role_b: Role) -> None:
        a, b = self.source(data, role_a), self.source(data, role_b)
        mine, theirs = (
            f"the {'training' if role == 'train' else role} set of {data}"
            for role in (role_a, role_b)
        )
        a.space.require_match(b.space, mine=mine, theirs=theirs)
        if a.class_names != b.class_names:
            raise ProvenanceError(
                f"{mine} has the classes {a.class_names}, {theirs} {b.class_names}. Embed both with the same names in "
                "the same order."
            )
        if self.config.data[data].captions:
            return  # folds of one store: what they have in common is decided by a hash
        common = overlap(a, b, (mine, theirs))
        if common is not None:
            then = (
                "a fit leaves them out"
                if role_b == "validation"
                else "they are scored all the same"
            )
            where = f"are in its {role_a} part, too"
            common.others(
                b, f"{role_b} rows of {data}", where, "Take them out of one of the two.", then
            )

    def train_set(self, origin: Origin, columns: tuple[str, ...]) -> EmbeddingSource:
        """What a method is fitted on; ``origin`` names some data set."""
        if origin.pool_size is not None:
            sources = [self._whole(data, origin) for data in origin.train]
            if origin.across_preprocessing:
                sources = [across_preprocessing(source, sources[0].space) for source in sources]
            return PseudoCaptions(sources, origin.pool_size, origin.train)
        source = self._whole(origin.train[0], origin)
        if origin.halves_seed is not None or not isinstance(origin.budget, str):
            source = self._some_rows(source, origin, columns)
        return without_labels(source) if origin.budget == "none" else source

    def _whole(self, data: str, origin: Origin) -> EmbeddingSource:
        return self._divided(data, origin.division_seed, 0, self.source(data, "train"))

    def unlabelled_set(self, origin: Origin) -> EmbeddingSource | None:
        """All rows of the training set without labels, where the method is given them beside."""
        return without_labels(self._whole(origin.train[0], origin)) if origin.unlabelled else None

    def _some_rows(
        self, source: EmbeddingSource, origin: Origin, columns: tuple[str, ...]
    ) -> EmbeddingSource:
        """Of training rows those that the budget and the classes leave."""
        target = np.where(source.status == VALID, source.target.numpy(), UNKNOWN)
        of_none = np.flatnonzero(
            source.outside.numpy() & (source.status == VALID)
        )  # a budget is of labels a class
        if origin.halves_seed is None:
            return source.take(np.union1d(drawn(target, origin), of_none))
        classes = class_halves(source.n_candidates, origin.halves_seed)[0]
        rows = drawn(np.where(np.isin(target, classes), target, UNKNOWN), origin)
        return source.take(np.union1d(rows, of_none), classes, columns)

    def validation_set(self, origin: Origin) -> EmbeddingSource | None:
        """What a method may select on; None where it has to hold out rows of its own (a small share may hold none)."""
        if not selects(origin) or self.config.data[origin.train[0]].validation is None:
            return None
        found = self.source(origin.train[0], "validation")
        return found if len(found) else None

    def test_set(self, cell: Cell, columns: tuple[str, ...]) -> EmbeddingSource:
        """What the method of a cell is tested on."""
        origin, scored = origin_of(self.config, cell), scored_set_of(self.config, cell)
        found = self._scored(scored, columns)
        if scored.across_preprocessing:
            return across_preprocessing(found, self.source(origin.train[0], "train").space)
        return found

    def _scored(self, scored: ScoredSet, columns: tuple[str, ...] = ()) -> EmbeddingSource:
        source = self.source(scored.data, scored.role, scored.pool_size)
        source = self._divided(scored.data, scored.division_seed, 1, source)
        if scored.halves_seed is None:
            return source
        classes = class_halves(source.n_candidates, scored.halves_seed)[1]
        return source.take(of_classes(source, classes), classes, columns)

    def candidates(self, cell: Cell) -> tuple[Tensor, Tensor] | None:
        """Texts (K, D) of the training set's candidates and of the test set's, without their rows; None of captions."""
        origin, scored, nothing = (
            origin_of(self.config, cell),
            scored_set_of(self.config, cell),
            torch.arange(0),
        )
        train, test = (
            self.source(origin.train[0], "train"),
            self.source(scored.data, scored.role, scored.pool_size),
        )
        if (
            train.pool_size is not None
            or test.pool_size is not None
            or origin.pool_size is not None
        ):
            return None
        known, asked = train.candidates(nothing).text, test.candidates(nothing).text
        if scored.halves_seed is None:
            return known, asked
        seen, unseen = class_halves(len(asked), scored.halves_seed)
        return known[seen], asked[unseen]

    def truth(self, cell: Cell) -> Truth:
        """Which zero-shot answers of a cell's test set are wrong; computed once per test set."""
        return self._truth(scored_set_of(self.config, cell))

    def _truth_of(self, scored: ScoredSet) -> Truth:
        what = [self.fingerprint(scored.data, scored.role, scored.pool_size), scored.halves_seed]
        share = self.config.data[scored.data].fit_share
        name = digest(what if share is None else [*what, share, scored.division_seed])
        return truth_of(self._scored(scored), name)


def without_labels(source: EmbeddingSource) -> EmbeddingSource:
    """All rows of a source, as if nothing were known of them; pairs as they are, which those methods refuse."""
    if source.pool_size is not None:
        return source
    rows = source.take(np.arange(len(source)))
    rows.target, rows.outside = (
        torch.full((len(rows),), UNKNOWN),
        torch.zeros(len(rows), dtype=torch.bool),
    )
    return rows


def drawn(target: NDArray[np.int64], origin: Origin) -> NDArray[np.int64]:
    """Positions of the labelled rows that the budget and the seed choose."""
    if origin.rows_seed is None:
        return np.flatnonzero(target != UNKNOWN)
    if isinstance(origin.budget, int):
        return draw_rows(target, origin.budget, origin.rows_seed)
    return draw_share(target, float(origin.budget), origin.rows_seed)


def truth_of(source: EmbeddingSource, name: str) -> Truth:
    """Failures of the zero-shot answers of a source, and why rows have no uncertainty."""
    failure = torch.full((len(source),), UNKNOWN)
    for batch in source.batches(SCORING_BATCH):
        failure[batch.index] = batch.failure
    reason = tuple(None if code == VALID else STATUS[code] for code in source.status)
    return Truth(name, failure.numpy(), source.outside.numpy(), reason)


def differs_in_preprocessing(a: EmbeddingSpace | None, b: EmbeddingSpace) -> bool:
    """Whether two spaces are of one model with other preprocessing, such as another picture size."""
    return (
        a is not None and a != b and replace(a, backbone=b.backbone, preprocess=b.preprocess) == b
    )


def across_preprocessing(source: EmbeddingSource, space: EmbeddingSpace) -> EmbeddingSource:
    """The source as if embedded with the preprocessing of ``space``, where nothing but that differs.

    A source of another model is left as it is, and refused by whoever compares the two.
    """
    if not differs_in_preprocessing(source.space, space):
        return source
    moved = copy.copy(source)
    moved.space = space
    return moved
