"""Carries a triage over to other settings: its labels stay, and results from them are removed.

- Labels and the random order stay. So does the share of the level that tests have used.
- Predictors are fitted anew. Their guarantee is removed, because it was about other settings.
- Photos are embedded again if the model or its texts have changed.
- A label whose class no longer exists is set aside in a book of its own. It is used again once the
  class is back.
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
from vilu.triage.labels import Entry, LabelBook, name_of
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

EMBEDDED_WITH: Final = (
    "classes",
    "backbone",
    "full_decode",
    "templates",
    "negatives",
)
"""Settings that the embeddings depend on."""

FIXED_SETTINGS: Final = ("seed", "about")
"""Settings that never change (``open_state``)."""

MOST_NAMES: Final = 5
"""Maximum number of classes that a message names."""

logger = logging.getLogger(__name__)


def carry_over(root: Path, state: TriageState, settings: TriageSettings) -> TriageState:
    """Carry a triage over to the settings of this run, and say what has changed.

    If the process is killed here, the next run repeats all of this, because the caller writes the
    returned state last.

    Args:
        root: The folder of the triage.
        state: State after the last run.
        settings: Settings of this run.

    Returns:
        The state for this run: ``state`` itself if no setting has changed.
    """
    sort_labels(root, settings.known_labels, settings.about)
    changed = changed_settings(state.settings, settings.recorded)
    if not changed:
        return state
    outdated = [PREDICTOR_FOLDER, CANDIDATE_FOLDER]
    if not changed.keys().isdisjoint(EMBEDDED_WITH):
        # A model that cannot be loaded fails here, before anything is removed.
        settings.embedding.backbone.load()
        outdated.append(FOLDER)
    logger.warning("%s", _change_in_words(changed, state, embeds_again=FOLDER in outdated))
    for name in outdated:
        if (root / name).is_dir():
            shutil.rmtree(root / name)
    return state.under(settings)


def changed_settings(
    before: Mapping[str, object], now: Mapping[str, object]
) -> dict[str, tuple[object, object]]:
    """Value before and now of every recorded setting that has changed, by its name."""
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
    """One line: what has changed, and what follows."""
    parts = []
    for name, (before, now) in changed.items():
        if isinstance(before, list) and isinstance(now, list):
            parts.append(f"{name} {_lists_in_words(before, now)}")
        else:
            parts.append(f"{name} {before!r}, now {now!r}")
    sentences = [
        f"settings have changed: {'; '.join(parts)}",
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
    """Text on the values that a list has lost, and those that are new in it."""
    removed_values = [repr(value) for value in before if value not in now]
    new_values = [repr(value) for value in now if value not in before]
    parts = []
    if removed_values:
        parts.append(f"without {_first_names(removed_values)}")
    if new_values:
        parts.append(f"with {_first_names(new_values)}")
    return " and ".join(parts) or "in another order"


def _first_names(names: Sequence[str]) -> str:
    """The first ``MOST_NAMES`` names as a text, and how many more there are."""
    text = ", ".join(names[:MOST_NAMES])
    if len(names) > MOST_NAMES:
        text += f" and {len(names) - MOST_NAMES} more"
    return text


def sort_labels(root: Path, known: Collection[str], about: About) -> None:
    """Set aside the labels whose class no longer exists, and take back those whose class is back.

    The book of former labels keeps every label that was ever set aside. It is saved first, so that
    no label is lost if the process is killed.

    Args:
        root: The folder of the triage.
        known: Names of the classes, and all words that a label may be besides.
        about: Which photos the guarantee is about.
    """
    book = LabelBook.load(root / BOOK)
    former = LabelBook.load(root / FORMER_BOOK)
    without_class = [entry for entry in book if entry.label not in {*known, None}]
    known_again = [entry for entry in former if entry.label in known]
    returning = [entry for entry in known_again if not book.has_label(entry.path)]
    if not without_class and not returning:
        return
    for entry in without_class:
        former.entries[entry.path] = entry
        del book.entries[entry.path]
    for entry in returning:
        book.entries[entry.path] = entry
    # With "folder", labels without a request never count, and some must not be fitted on either.
    if about == "new" and any(entry.stream == "given" for entry in without_class):
        _count_as_fit_labels(book)
        _count_as_fit_labels(former)
    former.save(root / FORMER_BOOK)
    book.save(root / BOOK)
    _report_sorted(without_class, returning)


def _count_as_fit_labels(book: LabelBook) -> None:
    """Change the stream "given" to "fit", so that labels count only by their random position.

    Now photos of some classes are missing among the "given" ones. So these are no longer picked at
    random, and their error rate would be too low.
    """
    for path, entry in book.entries.items():
        if entry.stream == "given":
            book.entries[path] = replace(entry, stream="fit")


def _names_with_numbers(labels: Sequence[str]) -> str:
    """The names among labels, the most frequent first, each with its number."""
    counts = Counter(labels).most_common()
    return _first_names([f"{label!r} ({n})" for label, n in counts])


def _report_sorted(without_class: Sequence[Entry], returning: Sequence[Entry]) -> None:
    """Log how many labels were set aside, and how many were taken back."""
    if without_class:
        logger.warning(
            "%s left out, because the class no longer exists: %s. They stay in %s and count again "
            "once the class is back",
            plural(len(without_class), "label"),
            _names_with_numbers([str(entry.label) for entry in without_class]),
            FORMER_BOOK,
        )
    if returning:
        logger.warning("%s of classes that are back count again", plural(len(returning), "label"))


def without_former(
    labels: Mapping[str, str], former: Collection[str], source: Path
) -> dict[str, str]:
    """Leave out the labels whose class no longer exists, with a warning.

    Args:
        labels: Labels from the file ``source``, by the name of the photo.
        former: Names of classes that the triage had once, and has no longer.
        source: The file, for the warning.
    """
    remaining_labels = {}
    left_out = []
    for name, label in labels.items():
        if name_of(label, former) is None:
            remaining_labels[name] = label
        else:
            left_out.append(label)
    if left_out:
        logger.warning(
            "%s: %s left out, because the class no longer exists: %s",
            source,
            plural(len(left_out), "label"),
            _names_with_numbers(left_out),
        )
    return remaining_labels


def former_names(root: Path, known: Collection[str]) -> set[str]:
    """Labels in the books of a triage that are none of the ``known`` names."""
    return set(all_labels(root).labels.values()) - set(known)


def all_labels(root: Path) -> LabelBook:
    """The book of a triage with the labels that were set aside.

    A photo that was labelled again has its new label.
    """
    book = LabelBook.load(root / FORMER_BOOK)
    for entry in LabelBook.load(root / BOOK):
        if entry.label is not None or entry.path not in book.entries:
            book.entries[entry.path] = entry
    return book
