"""The file with answered rows and labels. Damage is found when the file is opened.

- Rows and labels are only added, never changed.
- Rows form a chain: a row's digest is computed from the row's content and the previous row's
  digest. So an edit or a deletion breaks the chain. Labels and corrections together form a second
  chain.
- A row id ends with a digest of the picture. Rows with equal pictures are kept, but only the
  picture's first row is given to the monitor.
- Both chains begin with a digest of the monitor's fingerprint. So rows from another monitor break
  the chain.
- A small second file notes the last row and the last label. So missing rows at the end are found,
  too.

The chains do not protect against a person who can write both files.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import sqlite3
import struct
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import quote

from vilu.artifacts.disk import convert_os_errors
from vilu.artifacts.documents import SCHEMA_KEY, SCHEMA_VERSION, require_schema
from vilu.errors import StorageError

logger = logging.getLogger(__name__)

ROWS_FILE = "rows.sqlite"
"""Name of the file with rows and labels."""

ENDS_FILE = "rows.ends"
"""Name of the file with the ends of both chains: the last row and the last label."""

WAL_FILE: Final = f"{ROWS_FILE}-wal"
"""Name of SQLite's write-ahead log, for rows not yet in the main file."""

MAX_ROWS_READ: Final = 50_000
"""Maximum number of rows in one read."""

LOCK_WAIT_SECONDS: Final = 5.0
"""Seconds to wait for a file locked by another process."""

PICTURE_OF_ID: Final = "substr({id}, instr({id}, '-') + 1)"
"""SQL expression for a row's picture: the part of the row id after the first hyphen.

An id without a hyphen is taken as a whole. ``{id}`` stands for the column with the row id.
"""

# In these tables, ``n`` is a row's number and ``came`` the number of a label or correction, both in
# order of arrival. Labels and corrections share one series of numbers.
CREATE_TABLES: Final = f"""
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS rows (
    n INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    time REAL NOT NULL,
    answer INTEGER NOT NULL,
    uncertainty REAL NOT NULL,
    digest BLOB NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS labels (
    came INTEGER PRIMARY KEY,
    n INTEGER NOT NULL UNIQUE,
    label INTEGER NOT NULL,
    digest BLOB NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS corrections (
    came INTEGER PRIMARY KEY,
    n INTEGER NOT NULL,
    label INTEGER NOT NULL,
    digest BLOB NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS pictures ON rows ({PICTURE_OF_ID.format(id="id")});
PRAGMA user_version = {SCHEMA_VERSION};
COMMIT
"""
"""SQL statements to create the tables. Existing tables are kept."""

NEWER_SCHEMA_NAMES: Final = frozenset({"corrections", "pictures"})
"""Names of newer tables and indices, absent from files by earlier versions."""

SELECT_ROWS_OF_NEW_PICTURES: Final = f"""
SELECT n, id, answer, uncertainty FROM rows
WHERE n > ? AND NOT EXISTS (
    SELECT 1 FROM rows AS earlier
    WHERE {PICTURE_OF_ID.format(id="earlier.id")} = {PICTURE_OF_ID.format(id="rows.id")}
    AND earlier.n < rows.n
) ORDER BY n LIMIT ?
"""  # noqa: S608 - only names of columns are put in
"""SQL for the rows above a row number, without rows whose picture came earlier.

The parameters are the row number, and the maximum number of rows.
"""

SELECT_LABELS_OF_NEW_PICTURES: Final = f"""
SELECT n, id, answer, uncertainty, coalesce(
    (SELECT label FROM corrections WHERE n = labels.n ORDER BY came DESC LIMIT 1), label
) FROM labels JOIN rows USING (n)
WHERE came > ? AND NOT EXISTS (
    SELECT 1 FROM rows AS twin JOIN labels AS earlier USING (n)
    WHERE {PICTURE_OF_ID.format(id="twin.id")} = {PICTURE_OF_ID.format(id="rows.id")}
    AND earlier.came < labels.came
) ORDER BY came
"""  # noqa: S608 - only names of columns are put in
"""SQL for the labels above a label number, without labels for a picture labelled earlier.

For a corrected label, the last correction is selected instead. The parameter is the label number.
"""

SELECT_LABEL_CHAIN: Final = """
SELECT came, n, label, digest, 'labels' FROM labels
UNION ALL SELECT came, n, label, digest, 'corrections' FROM corrections
ORDER BY came
"""
"""SQL for the chain of labels and corrections. The last column is the name of the table."""

DIGEST_BYTES: Final = 16
"""Length of a digest in bytes."""

ENDS_LINE_PATTERN: Final = re.compile(
    rb"(?P<row_number>\d{20}) (?P<row_digest>[0-9a-f]{32}) "
    rb"(?P<label_number>\d{20}) (?P<label_digest>[0-9a-f]{32})\n"
)
"""Pattern for the only line in ``ENDS_FILE``.

The line has the number and the digest of the last row, and then those of the last label. The groups
are the attributes of ``ChainEnds``. With shortened digests, a line looks like
"00000000000000000012 9f86d0... 00000000000000000003 4bf512...".
"""

# binary formats for the numbers in digests
ROW_FORMAT = struct.Struct("<qdqd")  # row number, time, answer, uncertainty
LABEL_FORMAT = struct.Struct("<qqq")  # label number, row number, label

HARMLESS_ERROR_CODES: Final = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_INTERRUPT,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_PROTOCOL,
    sqlite3.SQLITE_READONLY,
}
"""SQLite errors that do not mean that the content of the file is damaged."""


class AnsweredRow(NamedTuple):
    """A row's columns for the monitor."""

    row_number: int  # in the order of arrival
    id: str
    answer: int
    uncertainty: float


class AuditedRow(NamedTuple):
    """A labelled row's columns for the monitor, and the label."""

    row_number: int
    id: str
    answer: int
    uncertainty: float
    label: int


StoredRow = tuple[int, bytes, float, int, float, bytes]
"""Number, id, time, answer, uncertainty, digest."""

StoredLabel = tuple[int, int, int, bytes, str]
"""Label number, row number, label, digest, table name."""


@dataclass(frozen=True)
class ChainEnds:
    """The last row, and the last label or correction.

    Attributes:
        row_number: Number of the last row.
        row_digest: Digest of the last row.
        label_number: Number of the last label or correction.
        label_digest: Digest of the last label or correction.
    """

    row_number: int
    row_digest: bytes
    label_number: int
    label_digest: bytes

    def to_line(self) -> bytes:
        """Return the line for ``rows.ends``. All lines have one length, so a write replaces one."""
        row_end = f"{self.row_number:020d} {self.row_digest.hex()}"
        label_end = f"{self.label_number:020d} {self.label_digest.hex()}"
        return f"{row_end} {label_end}\n".encode()

    @classmethod
    def parse(cls, line: bytes) -> ChainEnds | None:
        """Parse a line from ``rows.ends``. Return None if the line is damaged."""
        match = ENDS_LINE_PATTERN.fullmatch(line)
        if match is None:
            return None
        row_digest_text = match["row_digest"].decode()
        label_digest_text = match["label_digest"].decode()
        return cls(
            row_number=int(match["row_number"]),
            row_digest=bytes.fromhex(row_digest_text),
            label_number=int(match["label_number"]),
            label_digest=bytes.fromhex(label_digest_text),
        )


class RowFile:
    """The open file with rows and labels, for use by a single thread at a time.

    The chains are checked when the file is opened. If a chain is broken, the file is set aside
    with a warning, and a new file gets the rows and labels before the break.

    Args:
        folder: Folder for the file. The file may be new.
        monitor: Fingerprint of the monitor for these rows.

    Raises:
        ProvenanceError: If another version of vilu wrote the file.
        StorageError: If the file system refuses.
    """

    def __init__(self, folder: Path, monitor: str) -> None:
        self.path = folder / ROWS_FILE
        self._ends_path = folder / ENDS_FILE
        monitor_bytes = monitor.encode()
        first_digest = hashlib.blake2b(monitor_bytes, digest_size=DIGEST_BYTES).digest()
        # the ends if the chains have no row and no label
        self._empty_ends = ChainEnds(
            row_number=0, row_digest=first_digest, label_number=0, label_digest=first_digest
        )
        self.ends = self._load_ends()
        # number of the last row ever answered. The file may have lost this row.
        self._last_row_number = self.ends.row_number
        # The ends file holds each chain's last link (``ChainEnds``). The ends file must exist
        # before the first row is written, because rows without an ends file count as damaged.
        with convert_os_errors(f"cannot write {self._ends_path}"):
            self._ends_file_descriptor = os.open(self._ends_path, os.O_RDWR | os.O_CREAT, 0o666)
        with ExitStack() as on_failure:
            on_failure.callback(os.close, self._ends_file_descriptor)
            self._write_ends()
            os.fsync(self._ends_file_descriptor)
            with self._convert_sqlite_errors():
                self._connection = self._connect()
            on_failure.pop_all()  # success: keep both files open
        paths = (self.path, folder / WAL_FILE)
        # file identities at this moment, to notice later if a file was replaced
        self._identities = {path: _file_identity(path) for path in paths}

    def _connect(self) -> sqlite3.Connection:
        """Open the file, with this version's tables. Close the file if that fails."""
        with ExitStack() as on_failure:
            connection = sqlite3.connect(
                self.path, timeout=LOCK_WAIT_SECONDS, check_same_thread=False, isolation_level=None
            )
            on_failure.callback(connection.close)
            connection.executescript("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;")
            connection.executescript(CREATE_TABLES)
            on_failure.pop_all()  # success: keep the file open
        return connection

    def skip_numbers_to(self, row_number: int) -> None:
        """Give new rows only numbers above ``row_number``, the number of rows seen by the monitor.

        The file may have lost some rows that the monitor has seen. Their numbers are not used
        again.
        """
        self._last_row_number = max(self._last_row_number, row_number)

    @property
    def is_lost(self) -> bool:
        """Whether the open file was removed or replaced. If so, no row can be kept."""
        return any(_file_identity(path) != identity for path, identity in self._identities.items())

    def add(self, ids: Sequence[str], answers: Sequence[int], uncertainty: Sequence[float]) -> None:
        """Write the rows whose ids are new. All rows are on disk when this method returns.

        Raises:
            StorageError: If the rows cannot be written, or the file was removed or replaced.
        """
        self._require_in_place()
        ends = self.ends
        last_row_number = self._last_row_number
        now = time.time()
        with self._convert_sqlite_errors(), self._write_transaction():
            for row_id, answer, row_uncertainty in zip(ids, answers, uncertainty, strict=True):
                is_stored = self.row_number(row_id) is not None
                if is_stored:
                    continue
                last_row_number += 1
                digest = _row_digest(
                    ends.row_digest, last_row_number, row_id.encode(), now, answer, row_uncertainty
                )
                row = (last_row_number, row_id, now, answer, row_uncertainty, digest)
                self._connection.execute("INSERT INTO rows VALUES (?, ?, ?, ?, ?, ?)", row)
                ends = replace(ends, row_number=last_row_number, row_digest=digest)
        self._set_ends(ends)

    def add_labels(self, labels: Mapping[int, int]) -> None:
        """Write the first label for each row in ``labels``, by row number.

        Raises:
            StorageError: As ``add``.
        """
        self._write_labels("labels", labels)

    def add_corrections(self, labels: Mapping[int, int]) -> None:
        """Write a new label for each row in ``labels``. Earlier labels stay in the file.

        Raises:
            StorageError: As ``add``.
        """
        self._write_labels("corrections", labels)

    def _write_labels(self, table_name: str, labels: Mapping[int, int]) -> None:
        """Write labels (row number -> label) to the table "labels" or "corrections"."""
        self._require_in_place()
        ends = self.ends
        with self._convert_sqlite_errors(), self._write_transaction():
            for row_number, label in labels.items():
                ends = _insert_label(self._connection, table_name, row_number, label, ends)
        self._set_ends(ends)

    def require_writable(self) -> None:
        """Write the version number again, as a test. Raise StorageError if the write fails."""
        self._require_in_place()
        with self._convert_sqlite_errors(), self._write_transaction():
            self._connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def row_number(self, row_id: str) -> int | None:
        """Return the number of the row with this id, or None if the file has no such row."""
        with self._convert_sqlite_errors():
            row = self._connection.execute("SELECT n FROM rows WHERE id = ?", (row_id,)).fetchone()
        return None if row is None else int(row[0])

    def label_of(self, row_number: int) -> int | None:
        """Return a row's label, or the last correction. Return None if the row has no label."""
        query = (
            "SELECT label FROM (SELECT came, label FROM labels WHERE n = :n "
            "UNION ALL SELECT came, label FROM corrections WHERE n = :n) ORDER BY came DESC LIMIT 1"
        )
        with self._convert_sqlite_errors():
            row = self._connection.execute(query, {"n": row_number}).fetchone()
        return None if row is None else int(row[0])

    def rows_after(self, row_number: int) -> list[AnsweredRow]:
        """Return the first ``MAX_ROWS_READ`` rows above this number.

        Rows with the picture of an earlier row are left out, and do not count towards the maximum.
        """
        with self._convert_sqlite_errors():
            records = self._connection.execute(
                SELECT_ROWS_OF_NEW_PICTURES, (row_number, MAX_ROWS_READ)
            )
            return [AnsweredRow(*row) for row in records]

    def labels_after(self, label_number: int) -> list[AuditedRow]:
        """Return the rows with labels numbered above ``label_number``, in label order.

        A corrected label is replaced by its last correction. If several rows with equal pictures
        have labels, only the row that was labelled first is returned.
        """
        with self._convert_sqlite_errors():
            records = self._connection.execute(SELECT_LABELS_OF_NEW_PICTURES, (label_number,))
            return [AuditedRow(*row) for row in records]

    def close(self) -> None:
        """Close both files."""
        with self._convert_sqlite_errors():
            self._connection.close()
        os.close(self._ends_file_descriptor)

    def _require_in_place(self) -> None:
        """Raise StorageError if the file was removed or replaced."""
        if self.is_lost:
            raise StorageError(
                f"{self.path} was removed or replaced while it was in use, so no row can be kept. "
                "Stop the service, restore the file, and start again."
            )

    def _set_ends(self, ends: ChainEnds) -> None:
        """Note the chains' new ends. The last row and label must be on disk already."""
        self._require_in_place()
        self.ends = ends
        self._last_row_number = max(self._last_row_number, ends.row_number)
        self._write_ends()

    def _write_ends(self) -> None:
        """Replace the line with the ends in a single call, so a kill cannot leave half a line.

        The line is not forced to the disk, so a power cut may lose it.
        """
        with convert_os_errors(f"cannot write {self._ends_path}"):
            line = self.ends.to_line()
            os.pwrite(self._ends_file_descriptor, line, 0)

    @contextmanager
    def _write_transaction(self) -> Iterator[None]:
        """Write the block's changes together at the end. After an exception, write nothing."""
        with self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            yield

    @contextmanager
    def _convert_sqlite_errors(self) -> Iterator[None]:
        """Convert an error from SQLite in the block into a ``StorageError``."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            advice = ""
            if _is_damage(error):
                advice = " The file is damaged. Start again: all rows before the damage are kept."
            raise StorageError(f"cannot use {self.path}: {error}.{advice}") from error

    def _load_ends(self) -> ChainEnds:
        """Return the chains' ends. Damaged files are set aside and repaired first."""
        noted_ends = self._read_noted_ends()
        if not self.path.exists():
            has_noted_nothing = noted_ends is None or noted_ends == self._empty_ends
            if has_noted_nothing:  # the journal is new
                return self._empty_ends
            return self._repair(noted_ends)
        self._require_version()
        self._add_missing_tables()
        ends, is_intact = self._walk_chains(noted_ends or self._empty_ends)
        if noted_ends is None and ends != self._empty_ends:
            is_intact = False  # there are rows, but the ends file is missing or damaged
        return ends if is_intact else self._repair(noted_ends)

    def _read_noted_ends(self) -> ChainEnds | None:
        """Return the ends from ``rows.ends``, or None if the file is missing or damaged."""
        with convert_os_errors(f"cannot read {self._ends_path}"):
            if not self._ends_path.exists():
                return None
            line = self._ends_path.read_bytes()
            return ChainEnds.parse(line)

    def _require_version(self) -> None:
        """Raise ProvenanceError for tables by another version of vilu. Damage is found later."""
        # the values if damage ends the block
        version = 0
        has_tables = False
        with self._stop_at_damage(), closing(_open_to_read(self.path)) as connection:
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            has_tables = bool(_schema_of(connection))
        if has_tables:
            require_schema(self.path, {SCHEMA_KEY: version}, "Serve with a new --state")

    def _add_missing_tables(self) -> None:
        """Add tables missing in files by earlier versions. Further faults are found later."""
        is_older_file = False  # if damage ends the block
        with self._stop_at_damage(), closing(_open_to_read(self.path)) as connection:
            is_older_file = _schema_of(connection) == _our_schema(excluded_names=NEWER_SCHEMA_NAMES)
        if is_older_file:
            with self._convert_sqlite_errors(), closing(sqlite3.connect(self.path)) as connection:
                connection.executescript(CREATE_TABLES)

    def _walk_chains(self, noted_ends: ChainEnds) -> tuple[ChainEnds, bool]:
        """Walk along each chain up to its first break.

        Returns:
            The last row and label before a break, and whether the file is whole. The file is whole
            if its tables are valid, if no chain is broken, and if the chains contain the row and
            the label in ``noted_ends``.
        """
        last_row = 0  # number of the last unbroken row, like ``last_label`` below
        row_digest = self._empty_ends.row_digest
        n_rows = 0
        last_label = 0
        label_digest = self._empty_ends.label_digest
        n_labels = 0
        # without a noted row (or label), there is no row (or label) to look for
        has_noted_row = noted_ends.row_number == 0
        has_noted_label = noted_ends.label_number == 0
        is_undamaged = False
        with self._stop_at_damage(), closing(_open_to_read(self.path)) as connection:
            if not _schema_of(connection):  # vilu was killed before the tables were created
                return self._empty_ends, noted_ends == self._empty_ends
            first_digest = self._empty_ends.row_digest  # both chains begin with this digest
            for last_row, *_, row_digest in _unbroken_rows(connection, first_digest):
                n_rows += 1
                if last_row == noted_ends.row_number:
                    has_noted_row = row_digest == noted_ends.row_digest
            for last_label, _, _, label_digest, _ in _unbroken_labels(connection, first_digest):
                n_labels += 1
                if last_label == noted_ends.label_number:
                    has_noted_label = label_digest == noted_ends.label_digest
            # if a chain is broken, its table has more rows (or labels) than this walk has counted
            is_undamaged = _has_valid_tables(connection) and _chain_lengths(connection) == (
                n_rows,
                n_labels,
            )
        ends = ChainEnds(
            row_number=last_row,
            row_digest=row_digest,
            label_number=last_label,
            label_digest=label_digest,
        )
        return ends, is_undamaged and has_noted_row and has_noted_label

    @contextmanager
    def _stop_at_damage(self) -> Iterator[None]:
        """End the block silently if the file is damaged. Other errors become a StorageError."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            if not _is_damage(error):
                raise StorageError(f"cannot use {self.path}: {error}.") from error

    def _repair(self, noted_ends: ChainEnds | None) -> ChainEnds:
        """Set the old files aside, and put a file with the unbroken chains in their place."""
        new_path = self.path.with_name(f"{ROWS_FILE}.new")
        with convert_os_errors(f"cannot write {new_path}"):
            new_path.unlink(missing_ok=True)
        ends, n_rows = self._copy_chains(new_path)
        names_aside = set_aside(
            self.path.parent, (WAL_FILE, f"{ROWS_FILE}-shm", ROWS_FILE, ENDS_FILE)
        )
        with convert_os_errors(f"cannot write {self.path}"):
            new_path.replace(self.path)
        noted_text = "an unknown number of" if noted_ends is None else f"{noted_ends.row_number:,}"
        logger.warning(
            "%s is damaged or has lost rows (of %s, %s and %s): %s rows were noted, and %s rows "
            "are intact. Those are kept, with %s labels. The old files are set aside as %s.",
            self.path,
            ROWS_FILE,
            WAL_FILE,
            ENDS_FILE,
            noted_text,
            f"{n_rows:,}",
            f"{ends.label_number:,}",
            ", ".join(names_aside),
        )
        return ends

    def _copy_chains(self, new_path: Path) -> tuple[ChainEnds, int]:
        """Copy the unbroken chains to a new file. Return the new ends and the number of rows."""
        ends = self._empty_ends
        n_rows = 0
        with (
            self._convert_sqlite_errors(),
            closing(sqlite3.connect(new_path, isolation_level=None)) as new_connection,
        ):
            new_connection.executescript(CREATE_TABLES)
            if not self.path.exists():
                return ends, n_rows
            new_connection.execute("BEGIN")
            with self._stop_at_damage(), closing(_open_to_read(self.path)) as connection:
                stored_rows = _unbroken_rows(connection, ends.row_digest)
                for row_number, row_id, *numbers, digest in stored_rows:
                    row = (row_number, row_id.decode(), *numbers, digest)
                    new_connection.execute("INSERT INTO rows VALUES (?, ?, ?, ?, ?, ?)", row)
                    ends = replace(ends, row_number=row_number, row_digest=digest)
                    n_rows += 1
            # a block of its own, because damage to the rows must not hide the labels
            with self._stop_at_damage(), closing(_open_to_read(self.path)) as connection:
                query = "SELECT 1 FROM rows WHERE n = ?"
                stored_labels = _unbroken_labels(connection, ends.label_digest)
                for _, row_number, label, _, table_name in stored_labels:
                    # a label is copied only if the row was copied
                    if new_connection.execute(query, (row_number,)).fetchone():
                        ends = _insert_label(new_connection, table_name, row_number, label, ends)
            new_connection.execute("COMMIT")
        return ends, n_rows


def set_aside(folder: Path, names: Iterable[str]) -> list[str]:
    """Rename files to unused names such as "rows.sqlite.aside-1", and return the new names.

    Missing files are left out. All new names have the same number.
    """
    old_names = [name for name in names if (folder / name).exists()]
    new_names: list[str] = []
    for number in count(1):
        new_names = [f"{name}.aside-{number}" for name in old_names]
        if not any((folder / name).exists() for name in new_names):
            break
    with convert_os_errors(f"cannot rename files in {folder}"):
        for old_name, new_name in zip(old_names, new_names, strict=True):
            (folder / old_name).rename(folder / new_name)
    return new_names


def _insert_label(
    connection: sqlite3.Connection, table_name: str, row_number: int, label: int, ends: ChainEnds
) -> ChainEnds:
    """Add a row's label to the table ``table_name`` and to the chain. Return the new ends."""
    label_number = ends.label_number + 1
    digest = _label_digest(ends.label_digest, label_number, row_number, label)
    statement = f"INSERT INTO {table_name} VALUES (?, ?, ?, ?)"  # noqa: S608 - a table of ours
    connection.execute(statement, (label_number, row_number, label, digest))
    return replace(ends, label_number=label_number, label_digest=digest)


def _row_digest(
    previous_digest: bytes,
    row_number: int,
    row_id: bytes,
    written_at: float,
    answer: int,
    uncertainty: float,
) -> bytes:
    """Compute a row's digest from the row's content and the previous row's digest."""
    content = (
        previous_digest + ROW_FORMAT.pack(row_number, written_at, answer, uncertainty) + row_id
    )
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()


def _label_digest(previous_digest: bytes, label_number: int, row_number: int, label: int) -> bytes:
    """Compute a label's digest from the label, its row, and the previous label's digest."""
    content = previous_digest + LABEL_FORMAT.pack(label_number, row_number, label)
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()


def _unbroken_rows(connection: sqlite3.Connection, previous_digest: bytes) -> Iterator[StoredRow]:
    """Yield the rows in order, until a digest does not fit the previous row."""
    query = "SELECT n, CAST(id AS BLOB), time, answer, uncertainty, digest FROM rows ORDER BY n"
    # A value with a wrong type raises one of these exceptions. Such a file is damaged.
    with suppress(struct.error, TypeError):
        for row in connection.execute(query):
            row_number, row_id, written_at, answer, uncertainty, digest = row
            if digest != _row_digest(
                previous_digest, row_number, row_id, written_at, answer, uncertainty
            ):
                return
            yield row
            previous_digest = digest


def _unbroken_labels(
    connection: sqlite3.Connection, previous_digest: bytes
) -> Iterator[StoredLabel]:
    """Yield the labels in order, until a digest does not fit the previous label."""
    with suppress(struct.error, TypeError):
        for stored_label in connection.execute(SELECT_LABEL_CHAIN):
            label_number, row_number, label, digest, _ = stored_label
            if digest != _label_digest(previous_digest, label_number, row_number, label):
                return
            yield stored_label
            previous_digest = digest


def _has_valid_tables(connection: sqlite3.Connection) -> bool:
    """Return whether the tables have our schema, and SQLite's integrity check finds no fault."""
    if _schema_of(connection) != _our_schema():
        return False
    (verdict,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
    return bool(verdict == "ok")


def _schema_of(connection: sqlite3.Connection, excluded_names: Set[str] = frozenset()) -> list[str]:
    """Return the SQL texts of tables, indices and triggers, in order of their names.

    Objects named in ``excluded_names`` are left out.
    """
    query = "SELECT name, coalesce(sql, name) FROM sqlite_schema ORDER BY name"
    return [text for name, text in connection.execute(query) if name not in excluded_names]


def _our_schema(excluded_names: Set[str] = frozenset()) -> list[str]:
    """Return the schema of a new file from this version, without ``excluded_names``."""
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        connection.executescript(CREATE_TABLES)
        return _schema_of(connection, excluded_names)


def _chain_lengths(connection: sqlite3.Connection) -> tuple[int, int]:
    """Return the number of rows, and the number of labels and corrections together."""
    query = (
        "SELECT (SELECT count(*) FROM rows), "
        "(SELECT count(*) FROM labels) + (SELECT count(*) FROM corrections)"
    )
    n_rows, n_labels = connection.execute(query).fetchone()
    return int(n_rows), int(n_labels)


def _open_to_read(path: Path) -> sqlite3.Connection:
    """Open the file read-only, so a damaged file is not changed."""
    uri = f"file:{quote(str(path.absolute()))}?mode=ro"
    return sqlite3.connect(uri, uri=True, timeout=LOCK_WAIT_SECONDS, isolation_level=None)


def _is_damage(error: sqlite3.DatabaseError) -> bool:
    """Return whether an error means damage to the file's content."""
    # an error of Python's module, without a code, counts as damage
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)
    primary_code = code & 0xFF  # the higher bits say more about the same kind of error
    return primary_code not in HARMLESS_ERROR_CODES


def _file_identity(path: Path) -> tuple[int, int] | None:
    """Return a file's device and inode, or None if there is no file."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino
