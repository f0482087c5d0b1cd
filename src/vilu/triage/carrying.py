"""Carries a triage over to other settings: labels stay, predictors and guarantees are removed.

- Labels and the random order stay. What earlier tests have used of the level stays used.
- Predictors are fitted anew. Their guarantee is removed, because it was about other settings.
- Photos are embedded again if the model or its texts have changed.
- A label whose class no longer exists is moved to a second book, the book of former labels. It is
  moved back once the class exists again.
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
from vilu.triage.photos import FOLDER
from vilu.triage.state import (
    BOOK,
    CANDIDATE_FOLDER,
    FORMER_BOOK,
    PREDICTOR_FOLDER,
    About,
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
"""Settings that embeddings depend on."""

FIXED_SETTINGS: Final = ("seed", "about")
"""Settings that never change (``open_state``)."""

MOST_NAMES: Final = 5
"""Maximum number of classes that a message names."""

logger = logging.getLogger(__name__)


def carry_over(root: Path, state: TriageState, settings: TriageSettings) -> TriageState:
    """Carry a triage over to the settings of this run, and log what has changed.

    The caller writes the returned state at the end. So if the process is killed in this function,
    the next run calls it again with the same state.

    Args:
        root: The folder of the triage.
        state: State after the last run.
        settings: Settings of this run.

    Returns:
        The state for this run: ``state`` itself if no setting has changed.
    """
    move_former_labels(root, settings.known_labels, settings.about)
    changed = changed_settings(state.settings, settings.recorded_settings)
    if not changed:
        return state
    outdated_folders = [PREDICTOR_FOLDER, CANDIDATE_FOLDER]
    embeds_again = any(name in SETTINGS_OF_EMBEDDINGS for name in changed)
    if embeds_again:
        # If the model cannot be loaded, the run ends here, before anything is removed.
        settings.embedding.backbone.load()
        outdated_folders.append(FOLDER)
    logger.warning("%s", _change_in_words(changed, state, embeds_again=embeds_again))
    for name in outdated_folders:
        if (root / name).is_dir():
            shutil.rmtree(root / name)
    return state.with_settings(settings)


def changed_settings(
    before: Mapping[str, object], now: Mapping[str, object]
) -> dict[str, tuple[object, object]]:
    """Map the name of every recorded setting that has changed to its values before and now."""
    changed = {}
    for name, value in now.items():
        if name in FIXED_SETTINGS:
            continue
        if before.get(name) != value:
            changed[name] = (before.get(name), value)
    return changed


def _change_in_words(
    changed: Mapping[str, tuple[object, object]], state: TriageState, *, embeds_again: bool
) -> str:
    """Text on the settings that have changed, and on what the run does about it."""
    phrases = []
    for name, (before, now) in changed.items():
        if isinstance(before, list) and isinstance(now, list):
            phrases.append(f"{name} {_lists_in_words(before, now)}")
        else:
            phrases.append(f"{name} {before!r}, now {now!r}")
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


def _lists_in_words(before: Sequence[object], now: Sequence[object]) -> str:
    """Text on the values that were removed from a list, and on new values in it."""
    removed_values = [repr(value) for value in before if value not in now]
    new_values = [repr(value) for value in now if value not in before]
    phrases = []
    if removed_values:
        phrases.append(f"without {_join_names(removed_values)}")
    if new_values:
        phrases.append(f"with {_join_names(new_values)}")
    return " and ".join(phrases) or "in another order"


def _join_names(names: Sequence[str]) -> str:
    """Join the first ``MOST_NAMES`` names with commas, and say how many more there are."""
    text = ", ".join(names[:MOST_NAMES])
    if len(names) > MOST_NAMES:
        text += f" and {len(names) - MOST_NAMES} more"
    return text


def move_former_labels(root: Path, known: Collection[str], about: About) -> None:
    """Move labels whose class no longer exists to the book of former labels, and others back.

    A former label is moved back to the book of the triage if its class exists again, unless its
    photo has a new label. The book of former labels also keeps labels that were moved back. It is
    saved first, so that no label is lost if the process is killed.

    Args:
        root: The folder of the triage.
        known: All allowed labels: the names of the classes, and words such as "(skip)".
        about: Which photos the guarantee is about.
    """
    book = LabelBook.load(root / BOOK)
    former_book = LabelBook.load(root / FORMER_BOOK)
    removed_entries, returning_entries = _entries_to_move(book, former_book, known)
    if not removed_entries and not returning_entries:
        return
    for entry in removed_entries:
        former_book.entries[entry.path] = entry
        del book.entries[entry.path]
    for entry in returning_entries:
        book.entries[entry.path] = entry
    # If the guarantee is about the folder, labels of the stream "given" do not count for it anyway.
    # They keep their stream, because some of them must not be fitted on.
    if about == "new" and any(entry.stream == "given" for entry in removed_entries):
        _change_given_to_fit(book)
        _change_given_to_fit(former_book)
    former_book.save(root / FORMER_BOOK)
    book.save(root / BOOK)
    _log_moved_labels(removed_entries, returning_entries)


def _entries_to_move(
    book: LabelBook, former_book: LabelBook, known: Collection[str]
) -> tuple[list[Entry], list[Entry]]:
    """Entries to move to the book of former labels, and entries to move back."""
    removed_entries = [entry for entry in book if entry.label not in {*known, None}]
    returning_entries = []
    for entry in former_book:
        if entry.label in known and not book.has_label(entry.path):
            returning_entries.append(entry)
    return removed_entries, returning_entries


def _change_given_to_fit(book: LabelBook) -> None:
    """Change the stream "given" to "fit", so that no label counts as picked at random.

    The labels of some classes were removed. So the other labels of the stream "given" are no random
    sample any more, and their error rate would be too low.
    """
    for path, entry in book.entries.items():
        if entry.stream == "given":
            book.entries[path] = replace(entry, stream="fit")


def _names_with_numbers(labels: Sequence[str]) -> str:
    """Text on the different labels and how often each occurs, the most frequent label first."""
    counts = Counter(labels).most_common()
    return _join_names([f"{label!r} ({n})" for label, n in counts])


def _log_moved_labels(removed_entries: Sequence[Entry], returning_entries: Sequence[Entry]) -> None:
    """Log how many labels were moved to the book of former labels, and how many back."""
    if removed_entries:
        logger.warning(
            "%s left out, because the class no longer exists: %s. They stay in %s and count again "
            "once the class is back",
            plural(len(removed_entries), "label"),
            _names_with_numbers([str(entry.label) for entry in removed_entries]),
            FORMER_BOOK,
        )
    if returning_entries:
        n_returning = plural(len(returning_entries), "label")
        logger.warning("%s of classes that are back count again", n_returning)


def without_former_labels(
    labels: Mapping[str, str], former_classes: Collection[str], source: Path
) -> dict[str, str]:
    """Leave out the labels whose class no longer exists, with a warning.

    Args:
        labels: Maps the name of a photo to its label in the file ``source``.
        former_classes: Names of classes that the triage no longer has.
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
        logger.warning(
            "%s: %s left out, because the class no longer exists: %s",
            source,
            plural(len(former_labels), "label"),
            _names_with_numbers(former_labels),
        )
    return remaining_labels


def former_class_names(root: Path, known: Collection[str]) -> set[str]:
    """Names of the classes that labels of a triage have, but that are not ``known`` any more."""
    return set(all_labels(root).labels.values()) - set(known)


def all_labels(root: Path) -> LabelBook:
    """The labels of a triage together with its former labels.

    A photo that has a former label and a new label gets the new label.
    """
    book = LabelBook.load(root / FORMER_BOOK)
    for entry in LabelBook.load(root / BOOK):
        if entry.label is not None or entry.path not in book.entries:
            book.entries[entry.path] = entry
    return book
