"""Every row that was answered, on the disk before its answer is sent, and the monitor that takes in each row once."""

from __future__ import annotations

import copy
import hashlib
import logging
import math
import sqlite3
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Literal

import numpy as np

from vilu.decision.monitor import Monitor
from vilu.decision.shares import OUTSIDE_NAME
from vilu.errors import OUTSIDE, UNKNOWN, DataError, StorageError, ViLUError
from vilu.files.disk import make_folder
from vilu.outcomes.outcomes import Outcomes

logger = logging.getLogger(__name__)

ROWS, STATE = "rows.sqlite", "monitor.parquet"
BLOCK: Final = 50_000
"""Rows that are read and taken in together."""

SAVE_EVERY: Final = 20_000
"""Rows after which the monitor's state is saved: about what a start reads again at most, after a kill."""

PATIENCE: Final = 30.0
"""Seconds that another process may hold the file."""

PromiseState = Literal["holds", "void", "none"]
"""Of a promise: no alarm so far, an alarm was raised, or nothing was promised."""

SCHEMA: Final = """
PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;
CREATE TABLE IF NOT EXISTS rows (
    n INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    time REAL NOT NULL,
    answer INTEGER NOT NULL,
    uncertainty REAL NOT NULL,
    label INTEGER
) STRICT;
CREATE TABLE IF NOT EXISTS labels (came INTEGER PRIMARY KEY, n INTEGER NOT NULL UNIQUE) STRICT
"""  # the second: the order in which labels came, by the number of their row; evidence rests on it


def row_id(request: str, place: int, content: bytes) -> str:
    """What a row is known by: the same request sent again, with the same image, is the same row."""
    return hashlib.blake2b(f"{request}\n{place}\n".encode() + content, digest_size=16).hexdigest()


class Journal:
    """The rows that one calibrated predictor has answered, in a file, and what its monitor says of them.

    A row is written, and the disk has it, before anybody is told its answer; a row that is there
    already is left as it is. The monitor takes rows and labels in from the file alone, each in the
    order in which they came, so that after any death it has each of them once, and says the same of
    them.

    Raises:
        InfeasibleError: If nothing is promised of the predictor.
        DataError: If the file is damaged.
        StorageError: If the file cannot be written.
    """

    def __init__(self, folder: Path, predictor: Path, *, false_alarm: float = 0.05) -> None:
        self.folder = make_folder(folder)
        self.monitor = Monitor.of_folder(predictor, false_alarm=false_alarm)
        self._lock, self._writer = (
            threading.Lock(),
            ThreadPoolExecutor(1, thread_name_prefix="vilu-save"),
        )
        self._saving: Future[None] = self._writer.submit(lambda: None)
        with self._judged():
            self._rows = sqlite3.connect(
                folder / ROWS, timeout=PATIENCE, check_same_thread=False, isolation_level=None
            )
            self._rows.executescript(SCHEMA)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of rows and labels that the saved state has already
            if (folder / STATE).exists():
                self.monitor.resume(folder / STATE)
            with self._lock, self._judged():
                self._last, self._saved = self._nth(self.monitor.rows), self.monitor.rows
                self._catch_up()
                self._audit("label IS NOT NULL", ())
        self.status = self.monitor.status

    @property
    def promise(self) -> PromiseState:
        """Whether what the rule promises can be relied on, as far as the rows that were answered show."""
        return "void" if self.status.alarm else "holds"

    def record(
        self, ids: Sequence[str], answers: Sequence[int], uncertainty: Sequence[float]
    ) -> None:
        """Write rows, and let the monitor see those that are new; one without a score (NaN) is none."""
        now = time.time()
        columns = zip(ids, answers, uncertainty, strict=True)
        rows = [(key, answer, u, now) for key, answer, u in columns if math.isfinite(u)]
        with self._lock, self._judged():
            one = "INSERT OR IGNORE INTO rows (id, answer, uncertainty, time) VALUES (?, ?, ?, ?)"
            with self._transaction():
                self._rows.executemany(one, rows)
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
        with self._lock, self._judged():
            one = "SELECT label FROM rows WHERE id = ?"
            found = {key: self._rows.execute(one, (key,)).fetchone() for key in labels}
            fresh = [key for key, row in found.items() if row == (None,)]
            (before,) = self._rows.execute("SELECT COALESCE(MAX(came), 0) FROM labels").fetchone()
            with self._transaction():
                told = [(names[labels[key]], key) for key in fresh]
                self._rows.executemany("UPDATE rows SET label = ? WHERE id = ?", told)
                self._rows.executemany(
                    "INSERT INTO labels (n) SELECT n FROM rows WHERE id = ?", zip(fresh)
                )
            self._audit("came > ?", (before,))
            self._tell()
        return len(fresh), [key for key, row in found.items() if row is None]

    def close(self) -> None:
        """Save the monitor, and let go of the file."""
        with self._lock, self._judged():
            self._writer.shutdown()
            self.monitor.save(self.folder / STATE)
            self._rows.close()
            self._saving.result()

    def _tell(self) -> None:
        """Say what the monitor says now, and have it saved now and then."""
        before, self.status = self.status.verdict, self.monitor.status
        due = self.monitor.rows - self._saved >= SAVE_EVERY and self._saving.done()
        if (
            due or self.status.verdict != before
        ):  # labels that a start reads again would raise an alarm at the last row
            self._saved, calibration = self.monitor.rows, self.monitor.calibration
            now = copy.deepcopy(
                self.monitor, {id(calibration): calibration}
            )  # a hundredth of the time to write it
            last, self._saving = self._saving, self._writer.submit(self._save, now)
            last.result()  # a fault that is not the disk's is raised here, once, not lost

    def _save(self, monitor: Monitor) -> None:
        """Write a state while others answer, whom a full disk does not concern: their rows are in the file."""
        try:
            monitor.save(self.folder / STATE)
        except ViLUError as error:
            logger.warning(
                "%s Until the monitor's state can be saved, a start reads more rows again.", error
            )

    def _nth(self, n: int) -> int:
        """Number of the n-th row in the order of arrival."""
        found = (
            self._rows.execute(
                "SELECT n FROM rows ORDER BY n LIMIT 1 OFFSET ?", (n - 1,)
            ).fetchone()
            if n
            else (0,)
        )
        if found is None:
            raise DataError(
                f"{self.folder / STATE} has seen {n} rows, more than {ROWS} beside it holds. Restore both."
            )
        return int(found[0])

    def _catch_up(self) -> None:
        """Let the monitor see the rows after the last one that it saw."""
        while rows := self._rows.execute(
            "SELECT n, id, answer, uncertainty, NULL FROM rows WHERE n > ? ORDER BY n LIMIT ?",
            (self._last, BLOCK),
        ).fetchall():
            self.monitor.update(self._outcomes(rows), in_order=True)
            self._last = int(rows[-1][0])

    def _audit(self, which: str, values: tuple[int, ...]) -> None:
        """Let the monitor see labels, in the order in which they came (first those of older code, which kept none)."""
        if self.monitor.audited is None:
            return
        rows = self._rows.execute(
            "SELECT n, id, answer, uncertainty, label "  # noqa: S608 - ours
            f"FROM rows LEFT JOIN labels USING (n) WHERE {which} ORDER BY came, n",
            values,
        ).fetchall()
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

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._rows:  # commits, or rolls back what an exception ends
            self._rows.execute("BEGIN IMMEDIATE")
            yield

    @contextmanager
    def _judged(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            raise StorageError(f"cannot use {self.folder / ROWS}: {error}.") from error
        except sqlite3.DatabaseError as error:
            advice = "Restore it, or serve with a new --state."
            raise DataError(f"{self.folder / ROWS} is damaged ({error}). {advice}") from error
