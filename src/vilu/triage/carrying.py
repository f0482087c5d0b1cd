"""Carries a triage over to other settings: labels stay, predictors and guarantees are removed.

- Labels and the random order stay. The share of the level used by earlier tests stays used.
- Predictors are fitted anew. Old guarantees are removed, because they were about other settings.
- Photos are embedded again if the model or its texts have changed.
- Labels of classes that no longer exist are moved to a second book, the book of former labels. Once
  a class exists again, its labels are moved back.
"""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from vilu.text import plural
from vilu.triage.labels import Entry, LabelBook, meant_name
from vilu.triage.photos import EMBEDDINGS_FOLDER
from vilu.triage.state import (
    BOOK_FILE,
    CANDIDATE_FOLDER,
    FORMER_BOOK_FILE,
    PREDICTOR_FOLDER,
    GuaranteePopulation,
    TriageSettings,
    TriageState,
)

SETTINGS_OF_EMBEDDINGS: Final = (
    "classes",
    "backbone",
    "full_decode",
    "templates",
    "negatives",
)
"""Photos are embedded again if one of these settings changes."""

FIXED_SETTINGS: Final = ("seed", "about")
"""Settings that never change (``open_state``)."""

MOST_NAMES: Final = 5
"""Maximum number of classes in a message."""

logger = logging.getLogger(__name__)


def carry_over(root: Path, state: TriageState, settings: TriageSettings) -> TriageState:
    """Carry a triage over to the settings of this run, and log the changes.

    The caller writes the returned state at the end. So if the process is killed in this function,
    the next run calls this function again with the same state.

    Args:
        root: The triage folder.
        state: State after the last run.
        settings: This run's settings.

    Returns:
        The state for this run: ``state`` without a change if all settings are the same.
    """
    move_former_labels(root, settings.known_labels, settings.about)
    changes = changed_settings(state.settings, settings.recorded_settings)
    if not changes:
        return state
    outdated_folders = [PREDICTOR_FOLDER, CANDIDATE_FOLDER]
    embeds_again = any(name in SETTINGS_OF_EMBEDDINGS for name in changes)
    if embeds_again:
        # If the model cannot be loaded, the run ends here, before anything is removed.
        settings.embedding.backbone.load()
        outdated_folders.append(EMBEDDINGS_FOLDER)
    message = _changes_in_words(changes, state, embeds_again=embeds_again)
    logger.warning("%s", message)
    for name in outdated_folders:
        if (root / name).is_dir():
            shutil.rmtree(root / name)
    return state.with_settings(settings)


def changed_settings(
    old_settings: Mapping[str, object], new_settings: Mapping[str, object]
) -> dict[str, tuple[object, object]]:
    """Map the name of every changed recorded setting to the values before and now."""
    changes = {}
    for name, value in new_settings.items():
        if name in FIXED_SETTINGS:
            continue
        if old_settings.get(name) != value:
            changes[name] = (old_settings.get(name), value)
    return changes


def _changes_in_words(
    changes: Mapping[str, tuple[object, object]], state: TriageState, *, embeds_again: bool
) -> str:
    """Write a text on the changed settings, and on the consequences for the run."""
    phrases = []
    for name, (old, new) in changes.items():
        if isinstance(old, list) and isinstance(new, list):
            difference = _lists_in_words(old, new)
            phrases.append(f"{name} {difference}")
        else:
            phrases.append(f"{name} {old!r}, now {new!r}")
    sentences = [
        f"settings have changed: {'; '.join(phrases)}",
        "The labels stay, and a predictor is fitted anew",
    ]
    if embeds_again:
        sentences.append("All photos are embedded again")
    if state.n_tested:
        sentences.append(
            f"{plural(state.n_tested, 'earlier test')} of a guarantee used a part of the level, "
            "which stays used"
        )
    return ". ".join(sentences)


def _lists_in_words(old: Sequence[object], new: Sequence[object]) -> str:
    """Write a text on a list's removed values and new values."""
    removed_values = [repr(value) for value in old if value not in new]
    new_values = [repr(value) for value in new if value not in old]
    phrases = []
    if removed_values:
        removed_names = _join_names(removed_values)
        phrases.append(f"without {removed_names}")
    if new_values:
        new_names = _join_names(new_values)
        phrases.append(f"with {new_names}")
    return " and ".join(phrases) or "in another order"


def _join_names(names: Sequence[str]) -> str:
    """Join the first ``MOST_NAMES`` names with commas, and add the number of further names."""
    text = ", ".join(names[:MOST_NAMES])
    if len(names) > MOST_NAMES:
        text += f" and {len(names) - MOST_NAMES} more"
    return text


def move_former_labels(root: Path, known_labels: set[str], about: GuaranteePopulation) -> None:
    """Move labels without a class to the book of former labels, and labels with a class back.

    A former label is moved back to the triage's book if its class exists again, unless the photo
    has a new label. The book of former labels also keeps returned labels. This book is saved
    first, so no label is lost if the process is killed.

    Args:
        root: The triage folder.
        known_labels: All allowed labels: the class names, and words such as "(skip)".
        about: Which photos the guarantee is about: "new" or "folder".
    """
    book = LabelBook.load(root / BOOK_FILE)
    former_book = LabelBook.load(root / FORMER_BOOK_FILE)
    removed_entries, returning_entries = _entries_to_move(book, former_book, known_labels)
    if not removed_entries and not returning_entries:
        return
    for entry in removed_entries:
        former_book.add_label(entry)
        del book.entries[entry.path]
    for entry in returning_entries:
        book.entries[entry.path] = entry
    # If the guarantee is about the folder, labels in the stream "given" do not count anyway. These
    # labels keep the stream, because some of them must not be fitted on.
    if about == "new" and any(entry.stream == "given" for entry in removed_entries):
        _change_given_to_fit(book)
        _change_given_to_fit(former_book)
    former_book.save(root / FORMER_BOOK_FILE)
    book.save(root / BOOK_FILE)
    _log_moved_labels(removed_entries, returning_entries)


def _entries_to_move(
    book: LabelBook, former_book: LabelBook, known_labels: Collection[str]
) -> tuple[list[Entry], list[Entry]]:
    """Return the entries to move to the book of former labels, and the entries to move back."""
    removed_entries = [entry for entry in book if entry.label not in {*known_labels, None}]
    returning_entries = []
    for entry in former_book:
        if entry.label in known_labels and not book.has_label(entry.path):
            returning_entries.append(entry)
    return removed_entries, returning_entries


def _change_given_to_fit(book: LabelBook) -> None:
    """Change the stream "given" to "fit", so no label counts as picked at random.

    The labels of some classes were removed. So the remaining labels in the stream "given" are no
    random sample any more, and their error rate would be too low.
    """
    for path, entry in book.entries.items():
        if entry.stream == "given":
            book.entries[path] = replace(entry, stream="fit")


def _names_with_numbers(labels: Sequence[str]) -> str:
    """Write a text on the different labels with their counts, the most frequent label first."""
    counts = Counter(labels).most_common()
    return _join_names([f"{label!r} ({n})" for label, n in counts])


def _log_moved_labels(removed_entries: Sequence[Entry], returning_entries: Sequence[Entry]) -> None:
    """Log how many labels were moved to the book of former labels, and how many back."""
    if removed_entries:
        removed_in_words = plural(len(removed_entries), "label")
        removed_names = _names_with_numbers([str(entry.label) for entry in removed_entries])
        logger.warning(
            "%s left out, because the class no longer exists: %s. They stay in %s and count again "
            "once the class is back",
            removed_in_words,
            removed_names,
            FORMER_BOOK_FILE,
        )
    if returning_entries:
        returning_in_words = plural(len(returning_entries), "label")
        logger.warning("%s of classes that are back count again", returning_in_words)


def without_former_labels(
    labels: Mapping[str, str], former_classes: Collection[str], source: Path
) -> dict[str, str]:
    """Leave out labels of classes that no longer exist, with a warning.

    Args:
        labels: Maps photo names to the labels in the file ``source``.
        former_classes: Names of the triage's former classes.
        source: The file, for the warning.
    """
    remaining_labels = {}
    former_labels = []
    for name, label in labels.items():
        if meant_name(label, former_classes) is None:
            remaining_labels[name] = label
        else:
            former_labels.append(label)
    if former_labels:
        left_out_in_words = plural(len(former_labels), "label")
        former_names = _names_with_numbers(former_labels)
        logger.warning(
            "%s: %s left out, because the class no longer exists: %s",
            source,
            left_out_in_words,
            former_names,
        )
    return remaining_labels


def former_class_names(root: Path, known_labels: Collection[str]) -> set[str]:
    """Return the class names in a triage's labels, without the ``known_labels``."""
    labels = all_labels(root).labels
    return set(labels.values()) - set(known_labels)


def all_labels(root: Path) -> LabelBook:
    """Return a triage's labels together with the former labels.

    A photo with a former label and a new label gets the new label.
    """
    book = LabelBook.load(root / FORMER_BOOK_FILE)
    for entry in LabelBook.load(root / BOOK_FILE):
        if entry.label is not None or entry.path not in book.entries:
            book.entries[entry.path] = entry
    return book
