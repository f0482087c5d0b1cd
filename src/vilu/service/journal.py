"""Every row that was answered, on the disk before its answer is sent, and the monitor that takes in each row once."""

from __future__ import annotations

import copy
import logging
import math
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Final

import numpy as np

from vilu.artifacts.disk import make_folder
from vilu.calibration.monitor.monitor import Monitor
from vilu.calibration.shares import OUTSIDE_NAME
from vilu.errors import OUTSIDE, UNKNOWN, DataError, ViLUError
from vilu.outcomes.outcomes import Outcomes
from vilu.service.kept import PromiseState
from vilu.service.rows import ROWS, RowFile, set_aside

logger = logging.getLogger(__name__)

STATE = "monitor.parquet"
SAVE_EVERY: Final = 20_000
"""Rows after which the monitor's state is saved: about what a start reads again at most, after a kill."""


class Journal:
    """The rows that one calibrated predictor has answered, in a file, and what its monitor says of them.

    A row is written, and the disk has it, before anybody is told its answer; a row that is there
    already is left as it is. The monitor takes rows and labels in from the file alone, each in the
    order in which they came, so that after any death it has each of them once, and says the same of
    them. What is damaged is set aside when the journal is opened, with a warning.

    Raises:
        InfeasibleError: If nothing is promised of the predictor.
        ProvenanceError: If another version of vilu wrote the journal, or its state is of another monitor.
        StorageError: If the file cannot be written.
    """

    def __init__(self, folder: Path, predictor: Path, *, false_alarm: float = 0.05) -> None:
        self.folder = make_folder(folder)
        self._lock = threading.Lock()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="vilu-save")
        self._saving: Future[None] = self._writer.submit(lambda: None)
        self.monitor = self._resumed(lambda: Monitor.of_folder(predictor, false_alarm=false_alarm))
        self._rows = RowFile(folder, self.monitor.fingerprint)
        self._compare_sizes()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of rows and labels that the saved state has already
            self._last = self._saved = self.monitor.rows
            self._catch_up()
            self._audit(0)
        self.status = self.monitor.status

    @property
    def promise(self) -> PromiseState:
        """Whether what the rule promises can be relied on, as far as the rows that were answered show."""
        return "void" if self.status.alarm else "holds"

    def record(
        self, ids: Sequence[str], answers: Sequence[int], uncertainty: Sequence[float]
    ) -> None:
        """Write rows, and let the monitor see those that are new; one without a score (NaN) is none."""
        scored = [place for place, value in enumerate(uncertainty) if math.isfinite(value)]
        with self._lock:
            self._rows.add(
                [ids[place] for place in scored],
                [answers[place] for place in scored],
                [uncertainty[place] for place in scored],
            )
            self._catch_up()
            self._tell()

    def label(self, labels: Mapping[str, str]) -> tuple[int, list[str]]:
        """Note what rows really show, each once; how many were new, and the ids of which no row is known.

        Raises:
            DataError: If a label is no class and not "(outside)".
        """
        names = {
            name: place for place, name in enumerate(self.monitor.calibration.class_names or ())
        }
        names[OUTSIDE_NAME] = OUTSIDE
        if strange := sorted(set(labels.values()) - names.keys()):
            named = f"{', '.join(strange[:5])!r:.200}"
            raise DataError(f"{len(strange)} labels are no class and not {OUTSIDE_NAME}: {named}.")
        with self._lock:
            numbers = {key: self._rows.number(key) for key in labels}
            fresh: dict[int, int] = {}
            for key, number in numbers.items():
                if number is not None and not self._rows.has_label(number):
                    fresh[number] = names[labels[key]]
            before = self._rows.ends.came
            self._rows.add_labels(fresh)
            self._audit(before)
            self._tell()
        return len(fresh), [key for key, number in numbers.items() if number is None]

    @property
    def lost(self) -> bool:
        """Whether the file of rows was removed or replaced; no row can be kept then."""
        return self._rows.lost

    def close(self) -> None:
        """Save the monitor, and let go of the file."""
        with self._lock:
            self._writer.shutdown()
            self.monitor.save(self.folder / STATE)
            self._rows.close()
            self._saving.result()

    def _tell(self) -> None:
        """Say what the monitor says now, and have it saved now and then."""
        before = self.status.verdict
        self.status = self.monitor.status
        is_due = self.monitor.rows - self._saved >= SAVE_EVERY and self._saving.done()
        # labels that a start reads again would raise an alarm at the last row
        if not is_due and self.status.verdict == before:
            return
        self._saved = self.monitor.rows
        calibration = self.monitor.calibration
        # a copy takes a hundredth of the time to write it
        now = copy.deepcopy(self.monitor, {id(calibration): calibration})
        last = self._saving
        self._saving = self._writer.submit(self._save, now)
        last.result()  # a fault that is not the disk's is raised here, once, not lost

    def _save(self, monitor: Monitor) -> None:
        """Write a state while others answer, whom a full disk does not concern: their rows are in the file."""
        try:
            monitor.save(self.folder / STATE)
        except ViLUError as error:
            logger.warning(
                "%s Until the monitor's state can be saved, a start reads more rows again.", error
            )

    def _resumed(self, begin: Callable[[], Monitor]) -> Monitor:
        """A monitor that goes on from its saved state; a damaged state is set aside."""
        path = self.folder / STATE
        monitor = begin()
        if not path.exists():
            return monitor
        try:
            return monitor.resume(path)
        except DataError as error:
            (aside,) = set_aside(self.folder, (STATE,))
            logger.warning("%s It is set aside as %s, and every row is read again.", error, aside)
        return begin()

    def _compare_sizes(self) -> None:
        """Number rows on from what the monitor has seen; where it has seen more than there is, say so."""
        seen = self.monitor.rows
        stored = self._rows.ends.n
        self._rows.number_above(seen)
        if seen > stored:
            logger.warning(
                "%s has seen %s rows, and %s beside it ends at row %s. The monitor goes on from "
                "what it has seen; rows that are missing can get no label.",
                *(self.folder / STATE, f"{seen:,}", ROWS, f"{stored:,}"),
            )

    def _catch_up(self) -> None:
        """Let the monitor see the rows after the last one that it saw."""
        while rows := self._rows.rows_after(self._last):
            self.monitor.update(self._outcomes([(*row, None) for row in rows]), in_order=True)
            self._last = rows[-1][0]

    def _audit(self, came: int) -> None:
        """Let the monitor see the labels after one, in the order in which they came."""
        if self.monitor.audited is None:
            return
        rows = self._rows.labels_after(came)
        if rows:
            self.monitor.audit(self._outcomes(rows), in_order=True)

    def _outcomes(self, rows: Sequence[tuple[int, str, int, float, int | None]]) -> Outcomes:
        answers = np.array([row[2] for row in rows], dtype=np.int64)
        labels = np.array([UNKNOWN if row[4] is None else row[4] for row in rows], dtype=np.int64)
        calibration = self.monitor.calibration
        return Outcomes(
            np.array([row[3] for row in rows]),
            np.where(labels == UNKNOWN, UNKNOWN, answers != labels).astype(np.int64),
            prediction=answers,
            target=labels,
            ids=[row[1] for row in rows],
            class_names=calibration.class_names,
            method=calibration.method,
        )
