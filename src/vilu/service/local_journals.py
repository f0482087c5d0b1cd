"""A service's journals in this process, and the choice of the answering predictor."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from vilu.artifacts.disk import make_folder
from vilu.artifacts.documents import Document, read_document, write_document
from vilu.calibration.calibration import Calibration
from vilu.calibration.monitor.status import Status
from vilu.errors import DataError, UsageError
from vilu.predictors.persistence.description import fit_fingerprint
from vilu.service.journal import Journal
from vilu.service.journals import (
    FINGERPRINT_LENGTH,
    PREDICTOR_NAMES,
    ContradictionError,
    GuaranteeState,
    LabelCounts,
    ScoreColumns,
    ServiceState,
)

SERVING_FILE: Final = "serving.json"
"""Name of the file that notes which predictor answers (``AnsweringPredictor``)."""


class AnsweringPredictor(Document):
    """The content of ``serving.json``: the predictor that answers."""

    remedy = "Serve with a new --state"
    error_class = DataError

    kind: str = "serving"
    answers: str  # fingerprint of the predictor that answers


class LocalJournals:
    """The journals for a service's predictors. A predictor without a guarantee has no journal.

    Args:
        folder: Folder that must be kept between restarts. It holds ``serving.json``, and a folder
            for every journal.
        predictors: Maps each predictor name to the predictor's folder.

    Raises:
        UsageError: If two names lead to the same predictor, or if the predictor that answered
            before the last stop is not among ``predictors``.
        DataError: If a rule cannot be verified, or if a file in ``folder`` is damaged.
    """

    def __init__(self, folder: Path, predictors: Mapping[str, Path]) -> None:
        self.folder = make_folder(folder)
        self._lock = threading.Lock()
        self.fingerprints = _fingerprints(predictors)
        self._answering_name = self._read_answering_name()
        self._journals: dict[str, Journal] = {}
        with ExitStack() as on_failure:
            on_failure.callback(self.close_without_saving)
            self._open_journals(predictors)
            on_failure.pop_all()  # success: keep the journals open

    def _open_journals(self, predictors: Mapping[str, Path]) -> None:
        """Open the journals for all predictors with a guarantee."""
        for name, predictor in predictors.items():
            calibration = Calibration.find(predictor)
            if calibration is None or calibration.guarantee is None:
                continue
            # Every calibration has a new guarantee, so a new calibration begins a new journal.
            calibration_id = calibration.fingerprint[:FINGERPRINT_LENGTH]
            journal_name = f"{self.fingerprints[name]}-{calibration_id}"
            self._journals[name] = Journal(self.folder / journal_name, predictor)

    def _read_answering_name(self) -> str:
        """Return the name of the predictor that answered before the last stop.

        Without ``serving.json``, return the main predictor's name.
        """
        path = self.folder / SERVING_FILE
        if not path.is_file():
            return PREDICTOR_NAMES[0]
        wanted_fingerprint = read_document(path, AnsweringPredictor).answers
        for name, fingerprint in self.fingerprints.items():
            if fingerprint == wanted_fingerprint:
                return name
        served_fingerprints = ", ".join(self.fingerprints.values())
        raise UsageError(
            f"{path} says that the predictor {wanted_fingerprint} answers, but this service has "
            f"{served_fingerprints}. Start with {wanted_fingerprint} too, or "
            f"remove {path} so that the first predictor answers."
        )

    def record(self, ids: Sequence[str], scores: Mapping[str, ScoreColumns]) -> ServiceState:
        """Write rows with all predictors' answers, and return the service's state.

        The rows are on disk when this method returns. Answers are sent only afterwards.
        """
        for name, journal in self._journals.items():
            answers, uncertainty = scores[name]
            journal.record(ids, answers, uncertainty)
        return self.state()

    def state(self) -> ServiceState:
        """Return the service's present state."""
        guarantees: dict[str, GuaranteeState] = dict.fromkeys(self.fingerprints, "none")
        for name, journal in self._journals.items():
            guarantees[name] = journal.guarantee
        journals = self._journals.values()
        return ServiceState(
            self._answering_name,
            guarantees,
            has_lost_journal=any(journal.is_lost for journal in journals),
            is_writable=all(journal.is_writable for journal in journals),
        )

    def check_writable(self) -> ServiceState:
        """Try whether the journals can be written, and return the service's state."""
        for journal in self._journals.values():
            journal.check_writable()
        return self.state()

    def label(self, labels: Mapping[str, str]) -> dict[str, LabelCounts]:
        """Write labels, and count them for every predictor. See ``Journals.label``.

        Raises:
            ContradictionError: If a row already has another label. Then no label is written to any
                journal.
            DataError: As ``Journal.label``.
        """
        # Between the check and the write, no other request may label the same rows.
        with self._lock:
            for journal in self._journals.values():
                journal.require_known_labels(labels.values())
                for row_id, label in journal.labels_of(labels).items():
                    if label != labels[row_id]:
                        raise _contradiction(row_id, label, labels[row_id])
            return {name: journal.label(labels) for name, journal in self._journals.items()}

    def correct(self, labels_before: Mapping[str, str], labels_after: Mapping[str, str]) -> int:
        """Replace ``labels_before`` by ``labels_after``. Both map each row id to a label.

        A journal without a label for a row is left as it is: the row may have been answered before
        the journal's predictor was served. A journal with the new label is left as it is, too: an
        earlier correction may have been interrupted after the first journal.

        Returns:
            The number of rows whose label was replaced in any journal.

        Raises:
            ContradictionError: If a row's present label is in neither mapping, or if no row has the
                label in ``labels_before``. Then no label is replaced.
            DataError: If a label is neither a class nor "(outside)", or if no journal has a label
                for a row. Then no label is replaced.
        """
        with self._lock:
            for journal in self._journals.values():
                journal.require_known_labels([*labels_before.values(), *labels_after.values()])
            labels_now = {
                name: journal.labels_of(labels_after) for name, journal in self._journals.items()
            }
            _require_correctable(labels_now.values(), labels_before, labels_after)
            corrected_row_ids: set[str] = set()
            for name, journal in self._journals.items():
                corrections = _differing_labels(labels_now[name], labels_after)
                if corrections:
                    journal.correct(corrections)
                    corrected_row_ids.update(corrections)
        return len(corrected_row_ids)

    def statuses(self) -> dict[str, Status]:
        """Return every monitor's status, by the name of its predictor."""
        return {name: journal.status for name, journal in self._journals.items()}

    def switch(self, name: str) -> ServiceState:
        """Let the predictor ``name`` answer from now on, and return the service's state.

        Raises:
            UsageError: If there is no predictor with this name.
        """
        if name not in self.fingerprints:
            raise UsageError(
                f"there is no predictor {name!r:.40}. The predictors are "
                f"{' and '.join(self.fingerprints)}."
            )
        # Without the lock, two switches at once could leave one name here and another on disk.
        with self._lock:
            choice = AnsweringPredictor(answers=self.fingerprints[name])
            write_document(self.folder / SERVING_FILE, choice)
            self._answering_name = name
        return self.state()

    def close(self) -> None:
        """Save the monitors, and close the journals."""
        for journal in self._journals.values():
            journal.close()

    def close_without_saving(self) -> None:
        """Close the journals, but do not save the monitors. Used if the service cannot start."""
        for journal in self._journals.values():
            journal.close_without_saving()


def _fingerprints(predictors: Mapping[str, Path]) -> dict[str, str]:
    """Return each predictor's fingerprint, by name. Raise UsageError if two are equal."""
    fingerprints = {}
    for name, folder in predictors.items():
        fingerprints[name] = fit_fingerprint(folder)[:FINGERPRINT_LENGTH]
    if len(set(fingerprints.values())) < len(predictors):
        folders = " and ".join(map(str, predictors.values()))
        raise UsageError(f"{folders} are the same predictor. Give another predictor to --second.")
    return fingerprints


def _differing_labels(
    labels_now: Mapping[str, str], labels_after: Mapping[str, str]
) -> dict[str, str]:
    """Map each row id in ``labels_now`` to the label in ``labels_after`` if the two differ."""
    return {
        row_id: labels_after[row_id]
        for row_id, label in labels_now.items()
        if label != labels_after[row_id]
    }


def _require_correctable(
    labels_of_journals: Collection[Mapping[str, str]],
    labels_before: Mapping[str, str],
    labels_after: Mapping[str, str],
) -> None:
    """Raise an error if a row's label cannot be replaced, or if no row has the old label.

    A client may repeat a correction that was interrupted after the first journal. Rows that are
    only in the first journal have the new label already. So a row with the new label is no error,
    as long as some row still has the old label.

    ``labels_of_journals`` has each journal's present labels. All mappings are from row ids to
    labels.
    """
    has_old_label = False
    for row_id, label_after in labels_after.items():
        label_before = labels_before[row_id]
        labels_now = {labels[row_id] for labels in labels_of_journals if row_id in labels}
        if not labels_now:
            raise DataError(f"the row {row_id:.60} has no label that could be corrected.")
        other_labels = labels_now - {label_before, label_after}
        journals_disagree = len(labels_now) > 1
        if other_labels and journals_disagree:
            raise _interrupted_correction(row_id, labels_now)
        if other_labels:
            raise _contradiction(row_id, other_labels.pop(), label_before)
        has_old_label |= label_before in labels_now
    if not has_old_label:  # every row has the new label already, so the error names the first row
        row_id, label_after = next(iter(labels_after.items()))
        raise _contradiction(row_id, label_after, labels_before[row_id])


def _interrupted_correction(row_id: str, labels_now: Collection[str]) -> ContradictionError:
    """Return the error for a row whose labels differ between the journals."""
    labels = " and ".join(f"{label!r:.60}" for label in sorted(labels_now))
    return ContradictionError(
        f"the row {row_id:.60} has the labels {labels}, because an earlier correction was "
        "interrupted. No label of this request is written. POST a correction from one of these "
        "labels to the other to /v1/corrections first."
    )


def _contradiction(row_id: str, label_now: str, sent_label: str) -> ContradictionError:
    """Return the error for a label that differs from the row's present label."""
    return ContradictionError(
        f"the row {row_id:.60} has the label {label_now!r:.60}, and {sent_label!r:.60} was sent. "
        "No label of this request is written. To replace a wrong label, POST its present and its "
        "right value to /v1/corrections."
    )
