"""The journal of a predictor: every answered row is on disk before the answer is sent.

The monitor takes in every row once.
"""

from __future__ import annotations

import copy
import logging
import math
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from vilu.artifacts.disk import convert_os_errors, make_folder
from vilu.calibration.monitor.monitor import Monitor
from vilu.errors import OUTSIDE, OUTSIDE_NAME, UNKNOWN, DataError, StorageError, ViLUError
from vilu.outcomes.outcomes import Outcomes
from vilu.process import return_freed_memory
from vilu.service.journals import ContradictionError, GuaranteeState, LabelCounts
from vilu.service.rows import ROWS, AnsweredRow, AuditedRow, RowFile, set_aside

logger = logging.getLogger(__name__)

STATE = "monitor.parquet"  # name of the file with the state of the monitor
SAVE_EVERY: Final = 20_000
"""Number of rows between two saves of the state of the monitor.

After a kill, the next start reads at most about this many rows again.
"""


CODES_OF_TABLE: Final = {"1": 0, "0": 1}
"""Maps a label of an answer of a table to a code.

A label says whether the answer is right: "1" for yes, "0" for no. The code is the failure: 0 for a
right answer, 1 for a wrong answer.
"""


class Journal:
    """The rows answered by a calibrated predictor, in a file, and the monitor of the predictor.

    - A row is on disk before the answer is sent. A row in the file is never changed.
    - The monitor takes in rows and labels only from the file, in the order of arrival. So even if
      there is a crash, the monitor takes in every row and label once, and comes to the same
      verdict.
    - Equal pictures count once: the monitor takes in only the first row and the first label of a
      picture.
    - Damaged files are set aside with a warning when the journal is opened.

    Args:
        folder: Folder of the journal.
        predictor: Folder of the predictor.
        false_alarm: Probability of ever raising an alarm without cause.

    Raises:
        InfeasibleError: If the predictor has no guarantee.
        ProvenanceError: If another version of vilu wrote the journal, or if the saved state is of
            another monitor.
        StorageError: If the file cannot be written.
    """

    def __init__(self, folder: Path, predictor: Path, *, false_alarm: float = 0.05) -> None:
        self.folder = make_folder(folder)
        self._lock = threading.Lock()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="vilu-save")
        # the latest save; at first a call without effect
        self._saving: Future[None] = self._writer.submit(lambda: None)
        self._new_monitor = partial(Monitor.of_folder, predictor, false_alarm=false_alarm)
        self.monitor = self._load_monitor()
        self._rows = RowFile(folder, self.monitor.fingerprint)
        self._compare_sizes()
        self._last_seen = self.monitor.rows  # number of the last row taken in by the monitor
        self._last_saved = self.monitor.rows
        self.is_writable = True  # whether the last write succeeded
        self._take_in_all()
        self.status = self.monitor.status

    def _take_in_all(self) -> None:
        """Let the monitor take in all new rows and labels."""
        with warnings.catch_warnings():
            # Some of these rows and labels may be in the saved state of the monitor already, so the
            # warnings of the monitor about repeated rows are not needed.
            warnings.simplefilter("ignore")
            self._take_in_rows()
            self._take_in_labels(after=0)

    @property
    def guarantee(self) -> GuaranteeState:
        """State of the guarantee: "void" after an alarm of the monitor, else "holds"."""
        return "void" if self.status.alarm else "holds"

    def record(
        self, ids: Sequence[str], answers: Sequence[int], uncertainty: Sequence[float]
    ) -> None:
        """Write new rows to the file, and pass them on to the monitor.

        Rows without a score (uncertainty NaN) are left out.
        """
        scored_indices = [index for index, value in enumerate(uncertainty) if math.isfinite(value)]
        with self._writing():
            self._rows.add(
                [ids[index] for index in scored_indices],
                [answers[index] for index in scored_indices],
                [uncertainty[index] for index in scored_indices],
            )
            self._take_in_rows()
            self._update_status()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Hold the file for writing during the block; no other thread uses the file.

        Afterwards ``is_writable`` says whether the file could be written.
        """
        with self._lock:
            try:
                yield
            except StorageError:
                self.is_writable = False
                raise
            self.is_writable = True

    def check(self) -> None:
        """Try whether the file can be written, and note the result in ``is_writable``."""
        if self._lock.locked():  # a write is in progress, and will note the result
            return
        try:
            with self._writing():
                self._rows.require_writable()
        except StorageError as error:
            logger.warning("%s", error)

    def label(self, labels: Mapping[str, str]) -> LabelCounts:
        """Write the labels of rows; a row keeps the first label.

        Args:
            labels: Maps the id of a row to the name of a class, or to "(outside)".

        Raises:
            DataError: If a label is neither a class nor "(outside)".
        """
        codes = self._codes_of(labels)
        unknown: list[str] = []
        new_labels: dict[int, int] = {}
        with self._writing():
            for key, code in codes.items():
                number = self._rows.number(key)
                if number is None:
                    unknown.append(key)
                elif self._rows.label_of(number) is None:
                    new_labels[number] = code
            last_label_before = self._rows.ends.came
            self._rows.add_labels(new_labels)
            self._take_in_labels(after=last_label_before)
            self._update_status()
        return LabelCounts(len(new_labels), unknown)

    def require_same(self, labels: Mapping[str, str]) -> None:
        """Raise ContradictionError if a row has another label; a row without a label is allowed."""
        codes = self._codes_of(labels)
        names = {code: name for name, code in self._codes.items()}
        with self._lock:
            for key, code in codes.items():
                number = self._rows.number(key)
                present_code = None if number is None else self._rows.label_of(number)
                if present_code is None or present_code == code:
                    continue
                raise ContradictionError(
                    f"the row {key:.60} has the label {names[present_code]!r:.60}, and "
                    f"{labels[key]!r:.60} was sent. No label of this request is written. To "
                    "replace a wrong label, POST its present and its right value to "
                    "/v1/corrections."
                )

    def correct(self, labels: Mapping[str, str]) -> None:
        """Replace the labels of labelled rows; the file keeps the replaced labels, too.

        Then a new monitor takes in all rows and labels, and counts only the right labels.

        Raises:
            DataError: If a label is neither a class nor "(outside)", or if a row has no label.
        """
        codes = self._codes_of(labels)
        with self._writing():
            corrections: dict[int, int] = {}
            for key, code in codes.items():
                number = self._rows.number(key)
                if number is None or self._rows.label_of(number) is None:
                    raise DataError(f"the row {key:.60} has no label that could be corrected.")
                corrections[number] = code
            # The saved state of the monitor has counted the wrong labels, so the state is removed.
            # If the service crashes now, the next start reads all rows and labels again. A save in
            # progress must end first, because the save would write the file again.
            self._saving.result()
            with convert_os_errors(f"cannot remove {self.folder / STATE}"):
                (self.folder / STATE).unlink(missing_ok=True)
            self._rows.add_corrections(corrections)
            logger.warning("%d labels of %s were corrected.", len(corrections), self.folder)
            self.monitor = self._new_monitor()
            self._last_seen = 0
            self._take_in_all()
            self.status = self.monitor.status
            self._save_in_background()

    @property
    def _codes(self) -> dict[str, int]:
        """The code of every label allowed for clients."""
        calibration = self.monitor.calibration
        if calibration.class_names is None:
            return CODES_OF_TABLE
        codes = {name: index for index, name in enumerate(calibration.class_names)}
        return codes | {OUTSIDE_NAME: OUTSIDE}

    def _codes_of(self, labels: Mapping[str, str]) -> dict[str, int]:
        """Map the id of every row to the code of the label."""
        codes = self._codes
        unknown_labels = sorted(set(labels.values()) - codes.keys())
        if unknown_labels:
            first_labels = f"{', '.join(unknown_labels[:5])!r:.200}"
            fault = f"neither a class nor {OUTSIDE_NAME}"
            if codes is CODES_OF_TABLE:
                fault = "neither 1 (right) nor 0 (wrong)"
            raise DataError(f"{len(unknown_labels)} labels are {fault}: {first_labels}.")
        return {key: codes[label] for key, label in labels.items()}

    @property
    def is_lost(self) -> bool:
        """Whether the file of rows was removed or replaced; then no row can be written."""
        return self._rows.is_lost

    def close(self) -> None:
        """Save the monitor, and close the file of rows."""
        with self._lock:
            self._writer.shutdown()
            self.monitor.save(self.folder / STATE)
            self._rows.close()
            self._saving.result()

    def _update_status(self) -> None:
        """Update the status; save the monitor if the verdict has changed or a save is due."""
        verdict_before = self.status.verdict
        self.status = self.monitor.status
        n_unsaved = self.monitor.rows - self._last_saved
        is_due = n_unsaved >= SAVE_EVERY and self._saving.done()
        # A new verdict is saved at once. Otherwise a restart would first read all rows and then all
        # labels, and the alarm would be reported at the wrong row.
        has_new_verdict = self.status.verdict != verdict_before
        if is_due or has_new_verdict:
            self._save_in_background()

    def _save_in_background(self) -> None:
        """Save a copy of the monitor in another thread, so answers do not wait for the save."""
        self._last_saved = self.monitor.rows
        calibration = self.monitor.calibration
        # The copy shares the calibration, because a calibration never changes. deepcopy does not
        # copy objects in ``memo``.
        snapshot = copy.deepcopy(self.monitor, memo={id(calibration): calibration})
        previous_save = self._saving
        self._saving = self._writer.submit(self._save, snapshot)
        # result() raises an exception of the previous save. The exception is never a ViLUError,
        # because ``_save`` logs every ViLUError.
        previous_save.result()

    def _save(self, monitor: Monitor) -> None:
        """Write the state of the monitor; a failed save is logged, since the rows are on disk."""
        try:
            monitor.save(self.folder / STATE)
        except ViLUError as error:
            logger.warning(
                "%s Until the state of the monitor can be saved, a restart has to read more rows "
                "again.",
                error,
            )
        # While a state is written, it takes many times the memory of the rows.
        return_freed_memory()

    def _load_monitor(self) -> Monitor:
        """The monitor in the saved state; a new monitor if the state is missing or damaged.

        A damaged state is set aside.
        """
        path = self.folder / STATE
        monitor = self._new_monitor()
        if not path.exists():
            return monitor
        try:
            return monitor.resume(path)
        except DataError as error:
            (aside,) = set_aside(self.folder, (STATE,))
            logger.warning("%s It is set aside as %s, and all rows are read again.", error, aside)
        return self._new_monitor()  # the failed ``resume`` may have changed the first monitor

    def _compare_sizes(self) -> None:
        """Number new rows after all rows seen by the monitor; warn if rows are missing."""
        n_seen = self.monitor.rows
        n_stored = self._rows.ends.n
        self._rows.skip_numbers_to(n_seen)
        if n_seen > n_stored:
            logger.warning(
                "%s has seen %s rows, and %s beside it ends at row %s. The monitor goes on after "
                "the rows that it has seen. Missing rows can get no label.",
                self.folder / STATE,
                f"{n_seen:,}",
                ROWS,
                f"{n_stored:,}",
            )

    def _take_in_rows(self) -> None:
        """Let the monitor take in the new rows of the file."""
        rows = self._rows.rows_after(self._last_seen)
        while rows:
            self.monitor.update(self._outcomes(rows), in_order=True)
            self._last_seen = rows[-1].n
            rows = self._rows.rows_after(self._last_seen)
        # The last rows of the file may show pictures of earlier rows. ``rows_after`` leaves such
        # rows out, and the monitor need not ask again.
        self._last_seen = self._rows.ends.n

    def _take_in_labels(self, *, after: int) -> None:
        """Let the monitor take in the labels after number ``after``, in the order of arrival."""
        if self.monitor.error_audit is None:
            return
        rows = self._rows.labels_after(after)
        if rows:
            labels = [row.label for row in rows]
            self.monitor.audit(self._outcomes(rows, labels), in_order=True)

    def _outcomes(
        self, rows: Sequence[AnsweredRow | AuditedRow], labels: Sequence[int] | None = None
    ) -> Outcomes:
        """Outcomes of rows for the monitor; without ``labels`` the failures are ``UNKNOWN``."""
        calibration = self.monitor.calibration
        has_classes = calibration.class_names is not None
        answer = np.array([row.answer for row in rows], dtype=np.int64)
        unknown = np.full(len(rows), UNKNOWN, dtype=np.int64)
        target = unknown if labels is None else np.array(labels, dtype=np.int64)
        if labels is None:
            failure = unknown.copy()
        elif has_classes:
            failure = (answer != target).astype(np.int64)
        else:
            failure = target  # the code of a label of a table is the failure (``CODES_OF_TABLE``)
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
