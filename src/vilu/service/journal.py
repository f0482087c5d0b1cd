"""The rows that a predictor has answered, on the disk before their answers are sent.

The monitor takes in each row once.
"""

from __future__ import annotations

import copy
import logging
import math
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from vilu.artifacts.disk import make_folder
from vilu.calibration.monitor.monitor import Monitor
from vilu.calibration.shares import OUTSIDE_NAME
from vilu.errors import OUTSIDE, UNKNOWN, DataError, ViLUError
from vilu.outcomes.outcomes import Outcomes
from vilu.service.journals import GuaranteeState
from vilu.service.rows import ROWS, AnsweredRow, AuditedRow, RowFile, set_aside

logger = logging.getLogger(__name__)

STATE = "monitor.parquet"
SAVE_EVERY: Final = 20_000
"""Rows after which the monitor's state is saved. After a kill a start reads about so many again."""


class Journal:
    """The file of the rows that one calibrated predictor has answered, and its monitor.

    A row is written, and the disk has it, before anybody gets its answer; a row that is there
    already is left as it is. The monitor takes in rows and labels from the file alone, each in the
    order in which they came. So after any death it has each of them once, and comes to the same
    verdict. Damaged files are set aside when the journal is opened, with a warning.

    Raises:
        InfeasibleError: If nothing is guaranteed of the predictor.
        ProvenanceError: If another version of vilu wrote the journal, or its state is of another
            monitor.
        StorageError: If the file cannot be written.
    """

    def __init__(self, folder: Path, predictor: Path, *, false_alarm: float = 0.05) -> None:
        self.folder = make_folder(folder)
        self._lock = threading.Lock()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="vilu-save")
        self._saving: Future[None] = self._writer.submit(lambda: None)
        new_monitor = partial(Monitor.of_folder, predictor, false_alarm=false_alarm)
        self.monitor = self._resumed(new_monitor)
        self._rows = RowFile(folder, self.monitor.fingerprint)
        self._compare_sizes()
        self._last_seen = self.monitor.rows  # number of the last row that the monitor took in
        self._last_saved = self.monitor.rows
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of rows and labels that the saved state has already
            self._take_in_rows()
            self._take_in_labels(after=0)
        self.status = self.monitor.status

    @property
    def guarantee(self) -> GuaranteeState:
        """Whether the rows that were answered still bear out what the rule guarantees."""
        return "void" if self.status.alarm else "holds"

    def record(
        self, ids: Sequence[str], answers: Sequence[int], uncertainty: Sequence[float]
    ) -> None:
        """Write rows that are new, and let the monitor take them in.

        A row without a score (uncertainty NaN) is left out.
        """
        scored = [place for place, value in enumerate(uncertainty) if math.isfinite(value)]
        with self._lock:
            self._rows.add(
                [ids[place] for place in scored],
                [answers[place] for place in scored],
                [uncertainty[place] for place in scored],
            )
            self._take_in_rows()
            self._update_status()

    def label(self, labels: Mapping[str, str]) -> tuple[int, list[str]]:
        """Note what rows really show, each once.

        Args:
            labels: The names of classes, or "(outside)", by the ids of rows.

        Returns:
            How many labels were new, and the ids of which no row is known.

        Raises:
            DataError: If a label is no class and not "(outside)".
        """
        codes = self._codes_of(labels)
        unknown: list[str] = []
        new_labels: dict[int, int] = {}
        with self._lock:
            for key, code in codes.items():
                number = self._rows.number(key)
                if number is None:
                    unknown.append(key)
                elif not self._rows.has_label(number):
                    new_labels[number] = code
            before = self._rows.ends.came
            self._rows.add_labels(new_labels)
            self._take_in_labels(after=before)
            self._update_status()
        return len(new_labels), unknown

    def _codes_of(self, labels: Mapping[str, str]) -> dict[str, int]:
        """The places of the labels among the classes; ``OUTSIDE`` for none of them."""
        class_names = self.monitor.calibration.class_names or ()
        codes = {name: place for place, name in enumerate(class_names)}
        codes[OUTSIDE_NAME] = OUTSIDE
        strange = sorted(set(labels.values()) - codes.keys())
        if strange:
            shown = f"{', '.join(strange[:5])!r:.200}"
            raise DataError(f"{len(strange)} labels are no class and not {OUTSIDE_NAME}: {shown}.")
        return {key: codes[label] for key, label in labels.items()}

    @property
    def is_lost(self) -> bool:
        """Whether the file of rows was removed or replaced; no row can be written then."""
        return self._rows.is_lost

    def close(self) -> None:
        """Save the monitor, and close the file."""
        with self._lock:
            self._writer.shutdown()
            self.monitor.save(self.folder / STATE)
            self._rows.close()
            self._saving.result()

    def _update_status(self) -> None:
        """Ask the monitor for its status; save its state when the verdict changes, or it is due."""
        verdict_before = self.status.verdict
        self.status = self.monitor.status
        n_unsaved = self.monitor.rows - self._last_saved
        is_due = n_unsaved >= SAVE_EVERY and self._saving.done()
        # an alarm is saved with the row that raised it: a start that read the labels again after
        # all rows would say that the last row raised it
        has_new_verdict = self.status.verdict != verdict_before
        if is_due or has_new_verdict:
            self._save_beside()

    def _save_beside(self) -> None:
        """Have a thread save a copy of the monitor, while rows are answered."""
        self._last_saved = self.monitor.rows
        calibration = self.monitor.calibration
        # the calibration never changes: the copy shares it. To copy takes a hundredth of the time
        # to write
        snapshot = copy.deepcopy(self.monitor, {id(calibration): calibration})
        before = self._saving
        self._saving = self._writer.submit(self._save, snapshot)
        before.result()  # a fault that is not the disk's is raised here, once, not lost

    def _save(self, monitor: Monitor) -> None:
        """Write a state; where the disk is full, answers go on: their rows are in the file."""
        try:
            monitor.save(self.folder / STATE)
        except ViLUError as error:
            logger.warning(
                "%s Until the monitor's state can be saved, a start reads more rows again.", error
            )

    def _resumed(self, new_monitor: Callable[[], Monitor]) -> Monitor:
        """A monitor that goes on from its saved state; a damaged state is set aside."""
        path = self.folder / STATE
        monitor = new_monitor()
        if not path.exists():
            return monitor
        try:
            return monitor.resume(path)
        except DataError as error:
            (aside,) = set_aside(self.folder, (STATE,))
            logger.warning("%s It is set aside as %s, and every row is read again.", error, aside)
        return new_monitor()  # the first one may have taken in half of the state

    def _compare_sizes(self) -> None:
        """Number rows on from what the monitor has seen; warn where the file has fewer."""
        n_seen = self.monitor.rows
        n_stored = self._rows.ends.n
        self._rows.number_above(n_seen)
        if n_seen > n_stored:
            logger.warning(
                "%s has seen %s rows, and %s beside it ends at row %s. The monitor goes on from "
                "what it has seen; rows that are missing can get no label.",
                self.folder / STATE,
                f"{n_seen:,}",
                ROWS,
                f"{n_stored:,}",
            )

    def _take_in_rows(self) -> None:
        """Let the monitor take in the rows after the last one that it saw."""
        rows = self._rows.rows_after(self._last_seen)
        while rows:
            self.monitor.update(self._outcomes(rows), in_order=True)
            self._last_seen = rows[-1].n
            rows = self._rows.rows_after(self._last_seen)

    def _take_in_labels(self, *, after: int) -> None:
        """Let the monitor take in the labels after one, in the order in which they came."""
        if self.monitor.audited is None:
            return
        rows = self._rows.labels_after(after)
        if rows:
            labels = [row.label for row in rows]
            self.monitor.audit(self._outcomes(rows, labels), in_order=True)

    def _outcomes(
        self, rows: Sequence[AnsweredRow | AuditedRow], labels: Sequence[int] | None = None
    ) -> Outcomes:
        """Rows as the monitor takes them in; without labels nothing is known of their failures."""
        n = len(rows)
        answer = np.array([row.answer for row in rows], dtype=np.int64)
        label = np.full(n, UNKNOWN, dtype=np.int64)
        failure = np.full(n, UNKNOWN, dtype=np.int64)
        if labels is not None:
            label = np.array(labels, dtype=np.int64)
            failure = (answer != label).astype(np.int64)
        calibration = self.monitor.calibration
        return Outcomes(
            np.array([row.uncertainty for row in rows]),
            failure,
            prediction=answer,
            target=label,
            ids=[row.id for row in rows],
            class_names=calibration.class_names,
            method=calibration.method,
        )
