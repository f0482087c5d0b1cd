"""The opened data of a benchmark, and the rows of each cell."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vilu.benchmark.cells import Cell, origin_of
from vilu.benchmark.config import Config
from vilu.benchmark.parts import Unseen
from vilu.benchmark.rows import class_halves, draw_rows, of_classes, select
from vilu.benchmark.stores import ROLES, Folders, Role, evenly_spaced
from vilu.errors import DataError, ProvenanceError
from vilu.nn.train import SCORING_BATCH
from vilu.space import EmbeddingSpace, digest
from vilu.store.reader import EmbeddingStore
from vilu.types import UNKNOWN, EmbeddingSource
from vilu.validate import STATUS, VALID


@dataclass(frozen=True)
class Truth:
    """What is known of the rows of a test set, whatever the method.

    Attributes:
        rows: Names these rows and candidates; what has the same name may be compared row by row.
        failure: (N,) int64, 1 where the zero-shot answer is wrong, 0 where it is right, -1 where that is unknown.
        reason: Per row why it cannot have an uncertainty, or None.
    """

    rows: str
    failure: NDArray[np.int64]
    reason: tuple[str | None, ...]


class Workbench:
    """Opens each store once and cuts the sets of a cell from it.

    Args:
        config: The benchmark.
        folders: Complete stores by data set.
    """

    def __init__(self, config: Config, folders: Mapping[str, Folders]) -> None:
        self.config = config
        self._folders = folders
        self._opened: dict[tuple[str, Role], tuple[EmbeddingSource, str]] = {}
        self._truth: dict[tuple[str, int | None], Truth] = {}

    def source(self, data: str, role: Role) -> EmbeddingSource:
        """A whole store, or what ``limit`` leaves of it."""
        return self._open(data, role)[0]

    def fingerprint(self, data: str, role: Role) -> str:
        """Hash of everything in it."""
        return self._open(data, role)[1]

    def _open(self, data: str, role: Role) -> tuple[EmbeddingSource, str]:
        if (data, role) not in self._opened:
            store, limit = EmbeddingStore(getattr(self._folders[data], role)), self.config.data[data].limit
            manifest = store.manifest
            cut = limit if limit is not None and limit < len(store) else None
            name = digest([manifest.fingerprint, manifest.classes, manifest.content, cut])
            if cut is None:
                self._opened[data, role] = store, name
            else:
                some = select(store, evenly_spaced(len(store), cut), None, tuple(store.columns))
                self._opened[data, role] = some, name
        return self._opened[data, role]

    def check(self) -> None:
        """Refuse data sets whose two parts do not belong together.

        Raises:
            ProvenanceError: If they differ in their classes or their space.
            DataError: If rows are in both, or there are too few classes for a setting.
        """
        for data in self.config.data:
            for name, setting in self.config.settings.items():
                if isinstance(setting, Unseen) and self.config.is_tested_on(name, data):
                    class_halves(self.source(data, "test").n_candidates, 0)
            train, test = (self.source(data, role) for role in ROLES)
            names = f"the training set of {data}", f"the test set of {data}"
            train.space.require_match(test.space, mine=names[0], theirs=names[1])
            if train.class_names != test.class_names:
                raise ProvenanceError(
                    f"{names[0]} has the classes {train.class_names}, {names[1]} {test.class_names}. Embed both with "
                    "the same names in the same order."
                )
            common = set(train.ids) & set(test.ids)
            if common:
                raise DataError(f"{len(common)} rows are in both parts of {data}, for example {min(common)!r}.")

    def train_set(self, cell: Cell, columns: tuple[str, ...]) -> EmbeddingSource | None:
        """What the method of a cell is fitted on; None where it needs no fit."""
        origin = origin_of(self.config, cell)
        if origin.train is None:
            return None
        source = self.source(origin.train, "train")
        classes = None if origin.halves_seed is None else class_halves(source.n_candidates, origin.halves_seed)[0]
        if classes is None and origin.budget == "all":
            return source
        target = np.where(source.status == VALID, source.target.numpy(), UNKNOWN)
        if classes is not None:
            target = np.where(np.isin(target, classes), target, UNKNOWN)
        if isinstance(origin.budget, int) and origin.rows_seed is not None:
            rows = draw_rows(target, origin.budget, origin.rows_seed)
        else:
            rows = np.flatnonzero(target != UNKNOWN)
        return select(source, rows, classes, columns)

    def test_set(self, cell: Cell, columns: tuple[str, ...]) -> EmbeddingSource:
        """What the method of a cell is tested on."""
        origin = origin_of(self.config, cell)
        source = self.source(origin.test, "test")
        if origin.across_preprocessing and origin.train is not None:
            source = across_preprocessing(source, self.source(origin.train, "train").space)
        if origin.halves_seed is None:
            return source
        classes = class_halves(source.n_candidates, origin.halves_seed)[1]
        return select(source, of_classes(source, classes), classes, columns)

    def candidates(self, cell: Cell) -> tuple[Tensor, Tensor]:
        """Texts (K, D) of the training set's candidates and of the test set's, without their rows."""
        origin, nothing = origin_of(self.config, cell), torch.empty(0, dtype=torch.int64)
        train = self.source(origin.train or origin.test, "train").candidates(nothing).text
        test = self.source(origin.test, "test").candidates(nothing).text
        if origin.halves_seed is None:
            return train, test
        known, unseen = class_halves(len(test), origin.halves_seed)
        return train[known], test[unseen]

    def truth(self, cell: Cell) -> Truth:
        """Which zero-shot answers of a cell's test set are wrong; computed once per test set."""
        origin = origin_of(self.config, cell)
        key = origin.test, origin.halves_seed
        if key not in self._truth:
            name = digest([self.fingerprint(origin.test, "test"), origin.halves_seed])
            self._truth[key] = truth_of(self.test_set(cell, ()), name)
        return self._truth[key]


def truth_of(source: EmbeddingSource, name: str) -> Truth:
    """Failures of the zero-shot answers of a source, and why rows have no uncertainty."""
    failure = torch.full((len(source),), UNKNOWN)
    for batch in source.batches(SCORING_BATCH):
        failure[batch.index] = batch.failure
    reason = tuple(None if code == VALID else STATUS[code] for code in source.status)
    return Truth(name, failure.numpy(), reason)


def across_preprocessing(source: EmbeddingSource, space: EmbeddingSpace) -> EmbeddingSource:
    """The source as if embedded with the preprocessing of ``space``, where nothing but that differs.

    A source of another model is left as it is, and refused by whoever compares the two.
    """
    if dataclasses.replace(source.space, backbone=space.backbone, preprocess=space.preprocess) != space:
        return source
    moved = copy.copy(source)
    moved.space = space
    return moved
