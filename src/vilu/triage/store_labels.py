"""Labels for store rows, from the store and from tables filled in by people."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from vilu.artifacts.tables import csv_rows
from vilu.embeddings.source import EmbeddingSource, warn_once
from vilu.errors import OUTSIDE_NAME, DataError, UsageError
from vilu.store.reader import EmbeddingStore
from vilu.text import plural
from vilu.triage.labels import (
    SKIPPED,
    Entry,
    LabelBook,
    Stream,
    match_photos,
    names_of_labels,
    read_labels,
)
from vilu.triage.photos import Photos


def label_store(store: EmbeddingStore, files: Sequence[Path]) -> tuple[Photos, LabelBook]:
    """Label the rows in a store by the store's labels and by tables.

    Args:
        store: The rows.
        files: Tables from ``vilu next``, or other label files (``labels.read_labels``).

    Returns:
        All rows in the store, with the labels, and the book of these labels.

    Raises:
        DataError: If a table names no row in the store, or a label is no class.
    """
    all_rows = np.arange(len(store))
    photos = Photos([(store, all_rows)], fault_of_path={})
    book = LabelBook()
    book.note_labels(_own_labels(store, photos.ids))
    for file in files:
        entries = read_next_table(file, photos.ids)
        if entries:
            _add_entries(book, entries)
        else:  # another label file, or a table that names no row
            _add_labels(book, file, photos.ids, store.path)
    # An error about a label names the first label file, or else the store.
    source = files[0] if files else store.path
    classes = tuple(photos.candidates_by_name())
    labels = names_of_labels(book.labels, classes, (OUTSIDE_NAME,), source)
    book.note_labels(labels)
    photos.set_labels(book.labels, (OUTSIDE_NAME,))
    return photos, book


def _own_labels(store: EmbeddingStore, paths: Sequence[str]) -> dict[str, str]:
    """Map the row paths to the labels in the store."""
    names = store.class_names
    if names is None:
        names = tuple(str(index) for index in range(store.n_candidates))
    labels = {}
    for path, target in zip(paths, store.target.tolist(), strict=True):
        if target >= 0:  # a row without a class has a negative target
            labels[path] = names[target]
    return labels


def read_next_table(path: Path, keys: Collection[str]) -> dict[str, Entry]:
    """Map the paths in a table from ``vilu next`` to entries. Return {} for other label files.

    Table rows are left out if their path is not in ``keys``.
    """
    if path.suffix.lower() != ".csv":
        return {}
    columns, rows = csv_rows(path)
    is_next_table = {"path", "label", "stream", "predictor"}.issubset(columns)
    if not is_next_table:
        return {}
    known = set(keys)
    entries = {}
    for row in rows:
        key = row["path"]
        if key in known:
            stream: Stream = "calibration" if row["stream"] == "calibration" else "fit"
            label = row["label"] or None  # an empty cell means that there is no label yet
            entries[key] = Entry(key, label, stream, predictor=row["predictor"])
    return entries


def _add_entries(book: LabelBook, entries: dict[str, Entry]) -> None:
    """Add entries to the book. An entry without a label gets the earlier label in the book."""
    for path, entry in entries.items():
        earlier_entry = book.entries.get(path)
        if entry.label is None and earlier_entry is not None:
            book.entries[path] = dataclasses.replace(entry, label=earlier_entry.label)
        else:
            book.entries[path] = entry


def _add_labels(book: LabelBook, file: Path, paths: Sequence[str], root: Path) -> None:
    """Add the labels in a file to the book. ``_add_entries`` adds a table from ``vilu next``.

    ``paths`` are the paths of all rows, and ``root`` is the store's folder.
    """
    labels, streams = read_labels(file)
    path_of_name = match_photos(labels, paths, root, file)
    labels_by_path = {}
    streams_by_path = {}
    for name, path in path_of_name.items():
        labels_by_path[path] = labels[name]
        if name in streams:
            streams_by_path[path] = streams[name]
    book.note_labels(labels_by_path, streams_by_path)


def labelled_rows(store: EmbeddingStore, files: Sequence[Path]) -> EmbeddingSource:
    """Return the rows with a label. Skipped rows are left out.

    Raises:
        DataError: In the cases of ``label_store``, or if no row has a label.
    """
    photos, book = label_store(store, files)
    return _take_labelled(photos, book.labels)


def rows_to_fit_on(store: EmbeddingStore, files: Sequence[Path]) -> EmbeddingSource:
    """Return the labelled rows, without the rows drawn by ``vilu next`` for a guarantee.

    Raises:
        DataError: In the cases of ``label_store``, or if no row is left.
    """
    photos, book = label_store(store, files)
    drawn_paths = {entry.path for entry in book if entry.stream == "calibration"}
    wanted_paths = book.labels.keys() - drawn_paths
    n_left_out = len(book.labels) - len(wanted_paths)
    if n_left_out:
        warn_once(
            f"{plural(n_left_out, 'label')} left out, because `vilu next` drew the rows for a "
            "guarantee. No predictor may be fitted on them"
        )
    return _take_labelled(photos, wanted_paths)


def _take_labelled(photos: Photos, wanted_paths: Collection[str]) -> EmbeddingSource:
    """Return the rows with a path in ``wanted_paths``. Raises DataError without such a row."""
    rows = [row for row, path in enumerate(photos.ids) if path in wanted_paths]
    if not rows:
        raise DataError(
            f"no row of {photos.first_store.path} has a label that may be used here. Fill in the "
            "column label, or give other --labels."
        )
    return photos.take(rows)


def rows_picked_at_random(store: EmbeddingStore, files: Sequence[Path]) -> EmbeddingSource:
    """Return the labelled rows picked at random.

    Skipped rows, and rows chosen to fit on, are left out.

    Raises:
        UsageError: If ``vilu next`` drew some labels for a guarantee. Such labels are no random
            sample of all rows, because they were drawn from the rows that could be accepted.
        DataError: In the cases of ``label_store``, or if no row is left.
    """
    photos, book = label_store(store, files)
    if any(entry.stream == "calibration" for entry in book):
        raise UsageError(
            "`vilu next` drew some of these labels from the rows that could be accepted. "
            "Calibrate by these labels with `--method anytime`. The other methods need rows that "
            "were picked at random from all rows."
        )
    fit_paths = {entry.path for entry in book if entry.stream == "fit"}
    wanted_paths = book.labels.keys() - fit_paths
    rows = [row for row, path in enumerate(photos.ids) if path in wanted_paths]
    if not rows:
        raise DataError(
            "no labelled row was picked at random, but only "
            f"{plural(len(fit_paths), 'row')} chosen to fit on."
        )
    n_skipped = sum(entry.label == SKIPPED and entry.stream == "given" for entry in book)
    if n_skipped:
        n_picked = n_skipped + len(rows)
        warn_once(
            f"{n_skipped} of {n_picked} picked rows have the label {SKIPPED} and are "
            "left out: the guarantee is about pictures that somebody can name. With the label "
            f"{OUTSIDE_NAME} they would count as wrong answers."
        )
    return photos.take(rows)


def all_rows_with_random_labels(store: EmbeddingStore, files: Sequence[Path]) -> EmbeddingSource:
    """Return all rows in a store, with the labels from the store and from the tables.

    The labels are for statements about all rows, so the labelled rows have to be a random sample.

    Raises:
        UsageError: If labelled rows were chosen by score, not at random.
        DataError: In the cases of ``label_store``.
    """
    photos, book = label_store(store, files)
    n_chosen = sum(entry.stream != "given" and entry.label is not None for entry in book)
    if n_chosen:
        raise UsageError(
            f"`vilu next` or `vilu triage` chose {plural(n_chosen, 'labelled row')} by their "
            "scores, so they say nothing about all rows. Draw rows at random, label them, and "
            "give these labels only."
        )
    return photos
