"""A predictor's journal: every answered row is on disk before the answer is sent.

The monitor takes in every row once.
"""

from __future__ import annotations

import copy
import logging
import math
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import numpy as np

from vilu.artifacts.disk import convert_os_errors, make_folder
from vilu.calibration.monitor.monitor import Monitor
from vilu.errors import OUTSIDE, OUTSIDE_NAME, UNKNOWN, DataError, StorageError, ViLUError
from vilu.outcomes.outcomes import Outcomes
from vilu.process import return_freed_memory
from vilu.service.journals import GuaranteeState, LabelCounts
from vilu.service.rows import ROWS_FILE, AnsweredRow, AuditedRow, RowFile, set_aside

logger = logging.getLogger(__name__)

STATE_FILE = "monitor.parquet"  # name of the file with the monitor's state
ROWS_BETWEEN_SAVES: Final = 20_000
"""Number of rows between two saves of the monitor's state.

After a kill, the next start reads at most about this many rows again.
"""


CODE_OF_TABLE_LABEL: Final = {"1": 0, "0": 1}
"""Maps the label for a table's answer to a code.

A label says whether the answer is right: "1" for yes, "0" for no. The code is the failure: 0 for a
right answer, 1 for a wrong answer.
"""


class Journal:
    """The rows answered by a calibrated predictor, in a file, and the predictor's monitor.

    - A row is on disk before the answer is sent. A row in the file is never changed.
    - The monitor takes in rows and labels only from the file, in the order of arrival. So even
      after a crash, the monitor takes in every row and label once, and comes to the same verdict
      as without the crash.
    - Equal pictures count once: the monitor takes in only a picture's first row and first label.
    - Damaged files are set aside with a warning when the journal is opened.

    Args:
        folder: Folder for the journal.
        predictor: Folder of the predictor.
        false_alarm: Probability of ever raising an alarm without cause.

    Raises:
        InfeasibleError: If the predictor has no guarantee.
        ProvenanceError: If another version of vilu wrote the journal, or if the saved state is
            from another monitor.
        StorageError: If the file cannot be written.
    """

    def __init__(self, folder: Path, predictor: Path, *, false_alarm: float = 0.05) -> None:
        self.folder = make_folder(folder)
        self._lock = threading.Lock()
        # The predictor's folder may change while the service runs. So every new monitor is a copy
        # of this monitor, which has the calibration of the start.
        self._unused_monitor = Monitor.of_folder(predictor, false_alarm=false_alarm)
        self.monitor = self._load_monitor()
        self._row_file = RowFile(folder, self.monitor.fingerprint)
        self._save_thread = ThreadPoolExecutor(1, thread_name_prefix="vilu-save")
        # the latest save. At first it is a call without effect.
        self._latest_save: Future[None] = self._save_thread.submit(lambda: None)
        # Number of the last row offered to the monitor. After a restart the true number may be
        # higher, because ``monitor.rows`` counts equal pictures once. Then the monitor is offered
        # some rows again, and leaves them out.
        self._last_seen_row = self.monitor.rows
        self._n_rows_saved = self.monitor.rows
        self.is_writable = True  # whether the last write succeeded
        with ExitStack() as on_failure:
            on_failure.callback(self.close_without_saving)
            self._compare_row_counts()
            self._take_in_all()
            on_failure.pop_all()  # success: keep the row file open
        self.status = self.monitor.status

    def _take_in_all(self) -> None:
        """Let the monitor take in all rows and labels that it has not taken in yet."""
        with warnings.catch_warnings():
            # The monitor leaves out rows and labels that are in its saved state already. Its
            # warnings about such repeated rows would say nothing new.
            warnings.simplefilter("ignore")
            self._take_in_rows()
            self._take_in_labels(after=0)

    @property
    def guarantee(self) -> GuaranteeState:
        """The guarantee's state: "void" after an alarm from the monitor, else "holds"."""
        return "void" if self.status.alarm else "holds"

    def record(
        self, ids: Sequence[str], answers: Sequence[int], uncertainty: Sequence[float]
    ) -> None:
        """Write new rows to the file, and pass them on to the monitor.

        Rows without a score (uncertainty NaN) are left out.
        """
        scored_indices = [index for index, value in enumerate(uncertainty) if math.isfinite(value)]
        with self._hold_for_writing():
            self._row_file.add(
                [ids[index] for index in scored_indices],
                [answers[index] for index in scored_indices],
                [uncertainty[index] for index in scored_indices],
            )
            self._take_in_rows()
            self._update_status()

    @contextmanager
    def _hold_for_writing(self) -> Iterator[None]:
        """Hold the file for writing during the block, so that no other thread uses the file.

        Afterwards ``is_writable`` says whether the file could be written.
        """
        with self._lock:
            try:
                yield
            except StorageError:
                self.is_writable = False
                raise
            self.is_writable = True

    def check_writable(self) -> None:
        """Try whether the file can be written, and note the result in ``is_writable``."""
        if self._lock.locked():  # a write is in progress, and will note the result
            return
        try:
            with self._hold_for_writing():
                self._row_file.require_writable()
        except StorageError as error:
            logger.warning("%s", error)

    def label(self, labels: Mapping[str, str]) -> LabelCounts:
        """Write labels for rows. A row keeps the first label.

        Args:
            labels: Maps each row id to a class name, or to "(outside)".

        Raises:
            DataError: If a label is neither a class nor "(outside)".
        """
        codes = self._codes_of(labels)
        unknown_row_ids: list[str] = []
        new_labels: dict[int, int] = {}
        with self._hold_for_writing():
            for row_id, code in codes.items():
                row_number = self._row_file.row_number(row_id)
                if row_number is None:
                    unknown_row_ids.append(row_id)
                elif self._row_file.label_of(row_number) is None:
                    new_labels[row_number] = code
            last_label_before = self._row_file.ends.label_number
            self._row_file.add_labels(new_labels)
            self._take_in_labels(after=last_label_before)
            self._update_status()
        return LabelCounts(len(new_labels), unknown_row_ids)

    def labels_of(self, row_ids: Iterable[str]) -> dict[str, str]:
        """Return the present label for each row id that has a label. Leave out other row ids."""
        label_of_code = {code: label for label, code in self._code_of_label.items()}
        labels: dict[str, str] = {}
        with self._lock:
            for row_id in row_ids:
                row_number = self._row_file.row_number(row_id)
                code = None if row_number is None else self._row_file.label_of(row_number)
                if code is not None:
                    labels[row_id] = label_of_code[code]
        return labels

    def require_known_labels(self, labels: Iterable[str]) -> None:
        """Raise DataError if a label is neither a class nor "(outside)"."""
        known_labels = self._code_of_label
        unknown_labels = sorted(set(labels) - known_labels.keys())
        if not unknown_labels:
            return
        first_labels = ", ".join(unknown_labels[:5])
        fault = f"neither a class nor {OUTSIDE_NAME}"
        if known_labels is CODE_OF_TABLE_LABEL:
            fault = "neither 1 (right) nor 0 (wrong)"
        raise DataError(f"{len(unknown_labels)} labels are {fault}: {first_labels!r:.200}.")

    def correct(self, labels: Mapping[str, str]) -> None:
        """Replace the labels of labelled rows. The file keeps the replaced labels, too.

        Then a new monitor takes in all rows and labels, and counts only the right labels.

        Raises:
            DataError: If a label is neither a class nor "(outside)", or if a row has no label.
        """
        codes = self._codes_of(labels)
        with self._hold_for_writing():
            corrections: dict[int, int] = {}
            for row_id, code in codes.items():
                row_number = self._row_file.row_number(row_id)
                if row_number is None or self._row_file.label_of(row_number) is None:
                    raise DataError(f"the row {row_id:.60} has no label that could be corrected.")
                corrections[row_number] = code
            # The monitor's saved state has counted the wrong labels, so the state is removed. If
            # the service crashes now, the next start reads all rows and labels again. A save in
            # progress must end first, because the save would write the state file again.
            self._latest_save.result()
            with convert_os_errors(f"cannot remove {self.folder / STATE_FILE}"):
                (self.folder / STATE_FILE).unlink(missing_ok=True)
            self._row_file.add_corrections(corrections)
            logger.warning("%d labels of %s were corrected.", len(corrections), self.folder)
            self.monitor = _copy_of(self._unused_monitor)
            self._last_seen_row = 0
            self._take_in_all()
            self.status = self.monitor.status
            self._save_in_background()

    @property
    def _code_of_label(self) -> dict[str, int]:
        """Maps every label that clients may send to its code."""
        calibration = self.monitor.calibration
        if calibration.class_names is None:
            return CODE_OF_TABLE_LABEL
        codes = {name: index for index, name in enumerate(calibration.class_names)}
        return codes | {OUTSIDE_NAME: OUTSIDE}

    def _codes_of(self, labels: Mapping[str, str]) -> dict[str, int]:
        """Map each row id to the label's code."""
        self.require_known_labels(labels.values())
        codes = self._code_of_label
        return {row_id: codes[label] for row_id, label in labels.items()}

    @property
    def is_lost(self) -> bool:
        """Whether the row file was removed or replaced. If so, no row can be written."""
        return self._row_file.is_lost

    def close(self) -> None:
        """Save the monitor, and close the row file."""
        with self._lock:
            self._save_thread.shutdown()
            try:
                self.monitor.save(self.folder / STATE_FILE)
            finally:
                self._row_file.close()
            self._latest_save.result()

    def close_without_saving(self) -> None:
        """Close the row file. The next start reads the rows since the last save again."""
        with self._lock:
            self._save_thread.shutdown()
            self._row_file.close()

    def _update_status(self) -> None:
        """Update the status. Save the monitor if the verdict has changed or a save is due."""
        verdict_before = self.status.verdict
        self.status = self.monitor.status
        n_unsaved_rows = self.monitor.rows - self._n_rows_saved
        is_due = n_unsaved_rows >= ROWS_BETWEEN_SAVES and self._latest_save.done()
        # A new verdict is saved at once. Otherwise a restart would first read all rows and then all
        # labels, and the alarm would be reported at the wrong row.
        has_new_verdict = self.status.verdict != verdict_before
        if is_due or has_new_verdict:
            self._save_in_background()

    def _save_in_background(self) -> None:
        """Save a copy of the monitor in another thread, so that answers do not wait for it."""
        self._n_rows_saved = self.monitor.rows
        monitor_copy = _copy_of(self.monitor)
        previous_save = self._latest_save
        self._latest_save = self._save_thread.submit(self._save_monitor, monitor_copy)
        # result() raises an exception from the previous save. The exception is never a ViLUError,
        # because ``_save_monitor`` logs every ViLUError.
        previous_save.result()

    def _save_monitor(self, monitor: Monitor) -> None:
        """Write the monitor's state.

        A failed save is logged and not raised: the rows are on disk, so the next start can read
        them again.
        """
        try:
            monitor.save(self.folder / STATE_FILE)
        except ViLUError as error:
            logger.warning(
                "%s Until the state of the monitor can be saved, a restart has to read more rows "
                "again.",
                error,
            )
        # While a state is written, it takes many times the memory of the rows.
        return_freed_memory()

    def _load_monitor(self) -> Monitor:
        """Return the monitor in the saved state, or a new monitor.

        If the state is missing or damaged, the monitor is new. A damaged state is set aside.
        """
        path = self.folder / STATE_FILE
        monitor = _copy_of(self._unused_monitor)
        if not path.exists():
            return monitor
        try:
            return monitor.resume(path)
        except DataError as error:
            (new_name,) = set_aside(self.folder, (STATE_FILE,))
            logger.warning(
                "%s It is set aside as %s, and all rows are read again.", error, new_name
            )
        # the failed ``resume`` may have changed the first copy
        return _copy_of(self._unused_monitor)

    def _compare_row_counts(self) -> None:
        """Begin new row numbers after the rows seen by the monitor. Warn if rows are missing."""
        n_seen = self.monitor.rows
        n_stored = self._row_file.ends.row_number
        self._row_file.skip_numbers_to(n_seen)
        if n_seen > n_stored:
            logger.warning(
                "%s has seen %s rows, and %s beside it ends at row %s. The monitor goes on after "
                "the rows that it has seen. Missing rows can get no label.",
                self.folder / STATE_FILE,
                f"{n_seen:,}",
                ROWS_FILE,
                f"{n_stored:,}",
            )

    def _take_in_rows(self) -> None:
        """Let the monitor take in the file's new rows."""
        rows = self._row_file.rows_after(self._last_seen_row)
        while rows:
            self.monitor.update(self._outcomes(rows), in_order=True)
            self._last_seen_row = rows[-1].row_number
            rows = self._row_file.rows_after(self._last_seen_row)
        # The last rows in the file may repeat earlier pictures, and ``rows_after`` leaves such rows
        # out. Counting them as seen spares the next call from reading them again.
        self._last_seen_row = self._row_file.ends.row_number

    def _take_in_labels(self, *, after: int) -> None:
        """Let the monitor take in the labels with numbers above ``after``, in ascending order."""
        if self.monitor.error_audit is None:
            return
        rows = self._row_file.labels_after(after)
        if rows:
            labels = [row.label for row in rows]
            outcomes = self._outcomes(rows, labels)
            self.monitor.audit(outcomes, in_order=True)

    def _outcomes(
        self, rows: Sequence[AnsweredRow | AuditedRow], labels: Sequence[int] | None = None
    ) -> Outcomes:
        """Return rows as outcomes. Without ``labels``, all failures are ``UNKNOWN``."""
        calibration = self.monitor.calibration
        has_classes = calibration.class_names is not None
        answer = np.array([row.answer for row in rows], dtype=np.int64)
        unknown_labels = np.full(len(rows), UNKNOWN, dtype=np.int64)
        target = unknown_labels if labels is None else np.array(labels, dtype=np.int64)
        if labels is None:
            failure = unknown_labels.copy()
        elif has_classes:
            failure = (answer != target).astype(np.int64)
        else:
            failure = target  # a table's label is the failure (``CODE_OF_TABLE_LABEL``)
        return Outcomes(
            uncertainty=np.array([row.uncertainty for row in rows]),
            failure=failure,
            prediction=answer if has_classes else None,
            target=target if has_classes else None,
            ids=[row.id for row in rows],
            class_names=calibration.class_names,
            method=calibration.method,
            answer=calibration.answer,
        )


def _copy_of(monitor: Monitor) -> Monitor:
    """Copy a monitor. The copy shares the calibration, because a calibration never changes."""
    calibration = monitor.calibration
    # deepcopy does not copy objects in ``memo``
    return copy.deepcopy(monitor, memo={id(calibration): calibration})
