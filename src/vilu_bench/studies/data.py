"""Selects a cell's rows: the embeddings to fit on, and the embeddings to score."""

from __future__ import annotations

import copy
import itertools
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
from vilu.callers import warn_caller
from vilu.embeddings.checks import STATUS_NAMES, VALID
from vilu.embeddings.pairs import Pools, PseudoCaptions
from vilu.embeddings.rows import SCORING_BATCH
from vilu.embeddings.source import EmbeddingSource
from vilu.embeddings.space import EmbeddingSpace
from vilu.embeddings.two_models import TwoModels
from vilu.errors import UNKNOWN, DataError, ProvenanceError
from vilu.predictors.contract.seen import find_overlap
from vilu.scoring.score import source_fingerprint
from vilu.store.reader import CaptionStore, EmbeddingStore, open_source
from vilu_bench.studies.cells import (
    Cell,
    FitInputs,
    ScoredSet,
    fit_inputs_of,
    may_select_on_validation,
    needed_parts,
    plan_cells,
    scored_set_of,
)
from vilu_bench.studies.config import Config, UnseenSetting
from vilu_bench.studies.parts import ROLES, Role
from vilu_bench.studies.stores import Part, evenly_spaced

# Purposes of random draws: training rows, class halves, and a division into rows to fit on and rows
# to test on. A generator's seed begins with the draw's purpose, so draws for different purposes are
# independent.
DRAW_ROWS = 1
DRAW_HALVES = 2
DRAW_DIVISION = 3


def draw_rows(target: NDArray[np.int64], per_class: int, seed: int) -> NDArray[np.int64]:
    """Draw ``per_class`` labelled rows per class at random, and return sorted indices.

    If a class has fewer labelled rows, all its labelled rows are drawn. With the same seed, a
    larger ``per_class`` draws the same rows and further rows.
    """
    rng = np.random.default_rng([DRAW_ROWS, seed])
    order = rng.permutation(len(target))
    drawn_rows = [np.empty(0, np.int64)]  # for the case that no row has a label
    for label in np.unique(target[target != UNKNOWN]):
        shuffled = order[target[order] == label]  # the rows with this label, in random order
        drawn_rows.append(shuffled[:per_class])
    return np.sort(np.concatenate(drawn_rows))


def draw_share(target: NDArray[np.int64], share: float, seed: int) -> NDArray[np.int64]:
    """Draw a share of the labelled rows at random, at least one row, and return sorted indices.

    With the same seed, a larger share draws the same rows and further rows.
    """
    rng = np.random.default_rng([DRAW_ROWS, seed])
    labelled_rows = np.flatnonzero(target != UNKNOWN)
    rows = rng.permutation(labelled_rows)
    n_drawn = max(round(share * len(rows)), 1)
    return np.sort(rows[:n_drawn])


def held_out_mask(identities: NDArray[np.uint64], share: float) -> NDArray[np.bool_]:
    """Compute a mask (N,) for the rows to hold out, about ``share`` of all rows.

    ``identities`` (N,) are hashes of the rows. A row is held out if the hash, with the bytes in
    reverse order, is below share * 2^64.
    """
    return identities.byteswap() < share * 2.0**64


def divide_rows(n: int, share: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Divide n rows at random into a share to fit on and the rest to test on.

    Returns:
        Sorted indices: first the rows to fit on, then the rows to test on.
    """
    rng = np.random.default_rng([DRAW_DIVISION, seed])
    order = rng.permutation(n)
    n_fit = round(share * n)
    fit_rows = np.sort(order[:n_fit])
    test_rows = np.sort(order[n_fit:])
    return fit_rows, test_rows


def class_halves(n_classes: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Draw the classes to fit on and the classes to test on, both sorted.

    If the number of classes is odd, there is one more class to test on.
    """
    if n_classes < 4:
        raise DataError(
            "unseen classes need at least 4 classes, 2 to fit on and 2 to test on. "
            f"Got {n_classes}."
        )
    rng = np.random.default_rng([DRAW_HALVES, seed])
    order = rng.permutation(n_classes)
    half = n_classes // 2
    classes_to_fit = np.sort(order[:half])
    classes_to_test = np.sort(order[half:])
    return classes_to_fit, classes_to_test


def rows_of_classes(source: EmbeddingSource, classes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Find the rows with a label in ``classes``, and return their indices."""
    target = source.target.numpy()
    is_of_classes = np.isin(target, classes)
    return np.flatnonzero(is_of_classes)


@dataclass(frozen=True)
class Truth:
    """Facts about a test set's rows, the same for every method."""

    # Hash of the rows and candidates. Results with equal hashes can be compared row by row.
    rows_hash: str
    # (N,) int64: 1 if the zero-shot answer is wrong, 0 if the answer is right, -1 if unknown
    failure: NDArray[np.int64]
    outside: NDArray[np.bool_]  # (N,) whether a picture is outside all classes
    # for every row, why no uncertainty exists, or None for a row with an uncertainty
    reason: tuple[str | None, ...]


class StudyData:
    """Opens every store once, and selects the training, validation and test rows of a cell.

    Args:
        config: The benchmark.
        folders: The store folder for each part of a data set.
        second_folders: The second model's store folder, for each part with a second model.
    """

    def __init__(
        self,
        config: Config,
        folders: Mapping[Part, Path],
        second_folders: Mapping[Part, Path] = MappingProxyType({}),
    ) -> None:
        self.config = config
        self.folders = folders
        self.second_folders = second_folders
        self._open = cache(self._open_part)
        self._truth = cache(self._compute_truth)

    def source(self, data: str, role: Role, pool_size: int | None = None) -> EmbeddingSource:
        """Return a role's rows, within the data set's ``limit``."""
        source, _ = self._open(data, role, pool_size)
        return source

    def fingerprint(self, data: str, role: Role, pool_size: int | None = None) -> str:
        """Return the hash of the rows that ``source`` returns for the same arguments."""
        _, content_hash = self._open(data, role, pool_size)
        return content_hash

    def _open_part(
        self, data: str, role: Role, pool_size: int | None
    ) -> tuple[EmbeddingSource, str]:
        """Return a role's rows, and the hash of these rows.

        If the data set holds out a share of the training rows, the held-out rows are the validation
        rows. The training rows are then the remaining rows.
        """
        share = self.config.data[data].validation
        if not isinstance(share, float) or role == "test":
            return self._open_store(data, role, pool_size)
        training_rows, training_hash = self._open_store(data, "train", pool_size=None)
        # Copies of a picture have the same identity, so either all copies or none are held out.
        best_kind, *_ = training_rows.identified_by  # the kind that recognises copies best is first
        is_held_out = held_out_mask(training_rows.identities(best_kind), share)
        is_chosen = is_held_out if role == "validation" else ~is_held_out
        chosen_rows = np.flatnonzero(is_chosen)
        return training_rows.take(chosen_rows), digest([training_hash, role, share])

    def _open_store(
        self, data: str, role: Role, pool_size: int | None
    ) -> tuple[EmbeddingSource, str]:
        """Return the rows in a part's store, within the limit, and the hash of these rows."""
        entry = self.config.data[data]
        folder = self.folders[data, role]
        if entry.captions:
            pools = Pools(pool_size or entry.pool_size)
            pairs, content_hashes = _open_vilu_store(folder, pools, role)
            pool_settings = asdict(pools)
            return pairs, digest([*content_hashes, role, pool_settings])
        source, content_hashes = _open_vilu_store(folder)
        second_folder = self.second_folders.get((data, role))
        if second_folder is not None:
            second_source = open_source(second_folder)
            source = TwoModels(source, second_source)
            second_hash = source_fingerprint(second_source)
            content_hashes.append(second_hash)
        limit = entry.limit_of(role)
        if limit is None or limit >= len(source):
            return source, digest([*content_hashes, None])  # None: no limit
        chosen_rows = evenly_spaced(len(source), limit)
        return source.take(chosen_rows), digest([*content_hashes, limit])

    def _fit_or_test_rows(
        self, data: str, seed: int | None, source: EmbeddingSource, *, to_fit: bool
    ) -> EmbeddingSource:
        """Return the rows in ``source`` to fit on if ``to_fit``, else the rows to test on.

        ``seed`` divides the rows. Without a seed, or if the data set has no ``fit_share``, the rows
        are not divided, and all rows are returned.
        """
        share = self.config.data[data].fit_share
        if seed is None or share is None:
            return source
        fit_rows, test_rows = divide_rows(len(source), share, seed)
        test = source.take(test_rows)
        if not to_fit:
            return test
        fit = source.take(fit_rows)
        shared_rows = find_overlap(test, fit, (f"the test rows of {data}", "its training rows"))
        if not shared_rows:  # none are shared, or the rows cannot be compared
            return fit
        rows_in_words = shared_rows.in_words("rows to fit on")
        warn_caller(f"{rows_in_words} of {data} are left out: they are tested on.")
        is_tested_on = shared_rows.shared  # for every row in ``fit``
        untested_rows = np.flatnonzero(~is_tested_on)
        return fit.take(untested_rows)

    def check(self) -> None:
        """Raise an error for data sets with parts that do not belong together."""
        cells = plan_cells(self.config)
        parts = needed_parts(self.config, cells)
        for data in self.config.data:
            roles = [role for role in ROLES if (data, role) in parts]
            if "test" in roles and not self.config.data[data].captions:
                self._require_labels(data)
            for name, setting in self.config.settings.items():
                if isinstance(setting, UnseenSetting) and self.config.is_tested_on(name, data):
                    # raises an error if there are too few classes
                    class_halves(self.source(data, "test").n_candidates, seed=0)
            if self.config.data[data].fit_share is not None:
                continue  # all roles are the same set of rows
            for first_role, second_role in itertools.combinations(roles, 2):
                self._check_pair(data, first_role, second_role)

    def _require_labels(self, data: str) -> None:
        """Refuse a test set without labels."""
        test = self.source(data, "test")
        is_measurable = (test.target != UNKNOWN) | test.outside
        if not is_measurable.any():
            raise DataError(
                f"the test set of {data} has no labels, so nothing can be measured on it. "
                "Embed labelled images."
            )

    def _check_pair(self, data: str, role_a: Role, role_b: Role) -> None:
        """Refuse parts with different spaces or classes. Warn of common rows, or refuse many."""
        a = self.source(data, role_a)
        b = self.source(data, role_b)
        name_a = _name_of_set(data, role_a)
        name_b = _name_of_set(data, role_b)
        a.space.require_match(b.space, name=name_a, other_name=name_b)
        if a.class_names != b.class_names:
            raise ProvenanceError(
                f"{name_a} has the classes {a.class_names}, {name_b} {b.class_names}. "
                "Embed both with the same names in the same order."
            )
        if self.config.data[data].captions:
            return  # folds of a store have no common row: a hash puts every row into a single fold
        shared_rows = find_overlap(a, b, (name_a, name_b))
        if shared_rows is None:
            return
        consequence = "they are scored nevertheless"
        if role_b == "validation":
            consequence = "a fit leaves them out"
        # called only for the warning or the error, not for the mask
        shared_rows.unshared_mask(
            b,
            rows_name=f"{role_b} rows of {data}",
            predicate=f"are in its {role_a} part, too",
            remedy="Take them out of one of the two.",
            consequence=consequence,
        )

    def train_set(self, fit_inputs: FitInputs, columns: tuple[str, ...]) -> EmbeddingSource:
        """Return the rows to fit on. ``fit_inputs`` must name a data set."""
        if fit_inputs.pool_size is not None:
            sources = [self._all_training_rows(data, fit_inputs) for data in fit_inputs.train]
            if fit_inputs.across_preprocessing:
                first_space = sources[0].space
                sources = [ignore_preprocessing(source, first_space) for source in sources]
            return PseudoCaptions(sources, fit_inputs.pool_size, fit_inputs.train)
        source = self._all_training_rows(fit_inputs.train[0], fit_inputs)
        has_all_classes = fit_inputs.halves_seed is None
        has_all_rows = isinstance(fit_inputs.budget, str)  # "all", or "none": all without labels
        if not (has_all_classes and has_all_rows):
            source = self._chosen_training_rows(source, fit_inputs, columns)
        if fit_inputs.budget == "none":
            return without_labels(source)
        return source

    def _all_training_rows(self, data: str, fit_inputs: FitInputs) -> EmbeddingSource:
        """Return all training rows of a data set, labels included."""
        source = self.source(data, "train")
        return self._fit_or_test_rows(data, fit_inputs.division_seed, source, to_fit=True)

    def unlabelled_set(self, fit_inputs: FitInputs) -> EmbeddingSource | None:
        """Return all training rows, without labels, if the fit gets unlabelled rows, else None."""
        if not fit_inputs.unlabelled:
            return None
        training_rows = self._all_training_rows(fit_inputs.train[0], fit_inputs)
        return without_labels(training_rows)

    def _chosen_training_rows(
        self, source: EmbeddingSource, fit_inputs: FitInputs, columns: tuple[str, ...]
    ) -> EmbeddingSource:
        """Choose training rows in the classes to fit on, as many as the budget allows."""
        is_valid = source.status == VALID
        target = np.where(is_valid, source.target.numpy(), UNKNOWN)
        # Pictures outside all classes are all taken, because a budget limits labels per class.
        outside_rows = np.flatnonzero(source.outside.numpy() & is_valid)
        if fit_inputs.halves_seed is None:
            labelled_rows = rows_in_budget(target, fit_inputs)
            return source.take(np.union1d(labelled_rows, outside_rows))
        classes, _ = class_halves(source.n_candidates, fit_inputs.halves_seed)
        # if a row's class is in the other half, the row gets no label here, and is not drawn
        is_in_half = np.isin(target, classes)
        target_of_half = np.where(is_in_half, target, UNKNOWN)
        rows_of_half = rows_in_budget(target_of_half, fit_inputs)
        rows = np.union1d(rows_of_half, outside_rows)
        return source.take(rows, classes, columns)

    def validation_set(self, fit_inputs: FitInputs) -> EmbeddingSource | None:
        """Return the validation rows, or None if the method must hold out training rows itself."""
        data = fit_inputs.train[0]
        if not may_select_on_validation(fit_inputs):
            return None
        if self.config.data[data].validation is None:
            return None
        source = self.source(data, "validation")
        if len(source) == 0:  # a small share may leave no rows
            return None
        return source

    def test_set(self, cell: Cell, columns: tuple[str, ...]) -> EmbeddingSource:
        """Return the rows to test a cell's method on."""
        scored_set = scored_set_of(self.config, cell)
        source = self._test_rows(scored_set, columns)
        if not scored_set.across_preprocessing:
            return source
        fit_inputs = fit_inputs_of(self.config, cell)
        # in a union, all training rows have the first data set's space
        fitted_on = self.source(fit_inputs.train[0], "train")
        return ignore_preprocessing(source, fitted_on.space)

    def _test_rows(self, scored_set: ScoredSet, columns: tuple[str, ...] = ()) -> EmbeddingSource:
        """Return a test set's rows, in the store's embedding space."""
        source = self.source(scored_set.data, scored_set.role, scored_set.pool_size)
        source = self._fit_or_test_rows(
            scored_set.data, scored_set.division_seed, source, to_fit=False
        )
        if scored_set.halves_seed is None:
            return source
        _, classes = class_halves(source.n_candidates, scored_set.halves_seed)
        rows = rows_of_classes(source, classes)
        return source.take(rows, classes, columns)

    def candidates(self, cell: Cell) -> tuple[Tensor, Tensor] | None:
        """Return training and test candidate texts, each (K, D), or None for captions."""
        fit_inputs = fit_inputs_of(self.config, cell)
        scored_set = scored_set_of(self.config, cell)
        if fit_inputs.pool_size is not None:  # in a union, class texts are used as captions
            return None
        train = self.source(fit_inputs.train[0], "train")
        test = self.source(scored_set.data, scored_set.role, scored_set.pool_size)
        has_captions = train.pool_size is not None or test.pool_size is not None
        if has_captions:
            return None
        no_rows = torch.arange(0)  # all rows have the same candidates, so no row is needed
        train_texts = train.candidates(no_rows).text
        test_texts = test.candidates(no_rows).text
        if scored_set.halves_seed is None:
            return train_texts, test_texts
        seen_classes, unseen_classes = class_halves(len(test_texts), scored_set.halves_seed)
        return train_texts[seen_classes], test_texts[unseen_classes]

    def truth(self, cell: Cell) -> Truth:
        """Return the truth about a cell's test set, computed once per test set."""
        scored_set = scored_set_of(self.config, cell)
        return self._truth(scored_set)

    def _compute_truth(self, scored_set: ScoredSet) -> Truth:
        """Compute the truth about a test set."""
        content_hash = self.fingerprint(scored_set.data, scored_set.role, scored_set.pool_size)
        # the facts that decide which rows are tested
        facts: list[object] = [content_hash, scored_set.halves_seed]
        share = self.config.data[scored_set.data].fit_share
        if share is not None:
            facts += [share, scored_set.division_seed]
        test_rows = self._test_rows(scored_set)
        rows_hash = digest(facts)
        return truth_of(test_rows, rows_hash)


def _open_vilu_store(
    folder: Path, pools: Pools | None = None, fold: Role | None = None
) -> tuple[EmbeddingSource, list[object]]:
    """Open a store made by vilu. Return the rows, and hashes that identify the content."""
    source = open_source(folder, pools=pools, fold=fold)
    if not isinstance(source, EmbeddingStore | CaptionStore):
        raise ProvenanceError(
            f"{folder} was not made by vilu embed, so nothing says what is in it."
        )
    manifest = source.manifest
    return source, [manifest.fingerprint, manifest.classes, manifest.content]


def _name_of_set(data: str, role: Role) -> str:
    if role == "train":
        return f"the training set of {data}"
    return f"the {role} set of {data}"


def without_labels(source: EmbeddingSource) -> EmbeddingSource:
    """Return a copy of a source without labels and without ``outside``.

    Pairs are returned unchanged. A fit refuses them as unlabelled rows.
    """
    if source.pool_size is not None:
        return source
    rows = source.take(np.arange(len(source)))
    rows.target = torch.full((len(rows),), UNKNOWN)
    rows.outside = torch.zeros(len(rows), dtype=torch.bool)
    return rows


def rows_in_budget(target: NDArray[np.int64], fit_inputs: FitInputs) -> NDArray[np.int64]:
    """Find the labelled rows to fit on, as many as the budget allows, and return their indices.

    If ``fit_inputs`` has no seed for a row draw, all labelled rows are returned.
    """
    if fit_inputs.rows_seed is None:
        return np.flatnonzero(target != UNKNOWN)
    if isinstance(fit_inputs.budget, int):
        return draw_rows(target, fit_inputs.budget, fit_inputs.rows_seed)
    return draw_share(target, float(fit_inputs.budget), fit_inputs.rows_seed)


def truth_of(source: EmbeddingSource, rows_hash: str) -> Truth:
    """Compute the truth about a source. ``rows_hash`` is the hash of the rows and candidates."""
    failure = torch.full((len(source),), UNKNOWN)
    for batch in source.batches(SCORING_BATCH):
        failure[batch.index] = batch.failure
    reason = tuple(None if code == VALID else STATUS_NAMES[code] for code in source.status)
    return Truth(rows_hash, failure.numpy(), source.outside.numpy(), reason)


def differs_in_preprocessing(a: EmbeddingSpace | None, b: EmbeddingSpace) -> bool:
    """Return whether two spaces differ only in preprocessing, such as the picture size."""
    if a is None:
        return False
    if a == b:
        return False
    # a backbone's name may have the picture size, as "compact:64" does
    return replace(a, backbone=b.backbone, preprocess=b.preprocess) == b


def ignore_preprocessing(source: EmbeddingSource, space: EmbeddingSpace) -> EmbeddingSource:
    """Return a copy of the source with ``space``, if the spaces differ only in preprocessing.

    Any other source is returned unchanged. A source from another model is refused later, when the
    spaces are compared.
    """
    if not differs_in_preprocessing(source.space, space):
        return source
    changed_source = copy.copy(source)
    changed_source.space = space
    return changed_source
