"""The file of answered rows and labels; damage is found when the file is opened.

- Rows and labels are only added, never changed.
- Rows form a chain: the digest of a row is computed from the content of the row and the digest of
  the previous row. So an edit or a deletion breaks the chain. Labels and corrections form a second
  chain.
- The id of a row ends with the id of the picture. Rows of equal pictures are kept, but only the
  first row of a picture is given to the monitor.
- The chains begin with a digest of the fingerprint of the monitor, so rows of another monitor do
  not fit.
- A small second file notes the last row and the last label. So missing rows at the end are found
  too.

This does not protect against a person who can write both files.
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
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import quote

from vilu.artifacts.disk import convert_os_errors
from vilu.artifacts.documents import SCHEMA, SCHEMA_VERSION, require_schema
from vilu.errors import StorageError

logger = logging.getLogger(__name__)

ROWS = "rows.sqlite"
"""Name of the file of rows and labels."""

ENDS = "rows.ends"
"""Name of the file with the ends of both chains: the last row and the last label."""

WAL: Final = f"{ROWS}-wal"
"""Name of SQLite's write-ahead log, for rows not yet in the main file."""

MAX_ROWS_READ: Final = 50_000
"""Maximum number of rows in one read."""

PATIENCE: Final = 5.0
"""Seconds to wait for a file locked by another process."""

PICTURE: Final = "substr({id}, instr({id}, '-') + 1)"
"""SQL expression for the picture of a row: the end of the id, or the whole id without a hyphen."""

TABLES: Final = f"""
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
CREATE INDEX IF NOT EXISTS pictures ON rows ({PICTURE.format(id="id")});
PRAGMA user_version = {SCHEMA_VERSION};
COMMIT
"""
"""SQL statements to create the tables.

``n`` is the number of a row, in order of arrival. ``came`` is the number of a label or correction,
in order of arrival.
"""

LATER_NAMES: Final = frozenset({"corrections", "pictures"})
"""Names of newer tables and indices, absent from files of earlier versions."""

ROWS_OF_NEW_PICTURES: Final = f"""
SELECT n, id, answer, uncertainty FROM rows
WHERE n > ? AND NOT EXISTS (
    SELECT 1 FROM rows AS earlier
    WHERE {PICTURE.format(id="earlier.id")} = {PICTURE.format(id="rows.id")} AND earlier.n < rows.n
) ORDER BY n LIMIT ?
"""  # noqa: S608 - only names of columns are put in
"""SQL for the rows with a number above ``?``, without rows of a picture seen in an earlier row."""

LABELS_OF_NEW_PICTURES: Final = f"""
SELECT n, id, answer, uncertainty, coalesce(
    (SELECT label FROM corrections WHERE n = labels.n ORDER BY came DESC LIMIT 1), label
) FROM labels JOIN rows USING (n)
WHERE came > ? AND NOT EXISTS (
    SELECT 1 FROM rows AS twin JOIN labels AS earlier USING (n)
    WHERE {PICTURE.format(id="twin.id")} = {PICTURE.format(id="rows.id")}
    AND earlier.came < labels.came
) ORDER BY came
"""  # noqa: S608 - only names of columns are put in
"""SQL for the labels with a number above ``?``, without labels of a picture labelled earlier.

For a corrected label, the last correction is selected instead.
"""

LABEL_CHAIN: Final = """
SELECT came, n, label, digest, 'labels' FROM labels
UNION ALL SELECT came, n, label, digest, 'corrections' FROM corrections
ORDER BY came
"""
"""SQL for the chain of labels and corrections; the last column is the name of the table."""

DIGEST_BYTES: Final = 16
"""Length of a digest in bytes."""

ENDS_LINE: Final = re.compile(
    rb"(?P<n>\d{20}) (?P<row_digest>[0-9a-f]{32}) "
    rb"(?P<came>\d{20}) (?P<label_digest>[0-9a-f]{32})\n"
)
"""Pattern of the only line of the file ``ENDS``; the groups are the attributes of ``Ends``."""

# binary formats of the numbers in digests
ROW_NUMBERS = struct.Struct("<qdqd")  # number of the row, time, answer, uncertainty
LABEL_NUMBERS = struct.Struct("<qqq")  # number of the label, number of the row, label

HARMLESS_ERRORS: Final = {
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
"""SQLite errors without damage to the content of the file."""


class AnsweredRow(NamedTuple):
    """The columns of a row for the monitor."""

    n: int  # number of the row, in the order of arrival
    id: str
    answer: int
    uncertainty: float


class AuditedRow(NamedTuple):
    """The columns of a labelled row for the monitor, and the label."""

    n: int
    id: str
    answer: int
    uncertainty: float
    label: int


StoredRow = tuple[int, bytes, float, int, float, bytes]
"""Number, id, time, answer, uncertainty, digest."""

StoredLabel = tuple[int, int, int, bytes, str]
"""Number of the label, number of the row, label, digest, table."""


@dataclass(frozen=True)
class Ends:
    """The ends of both chains.

    Attributes:
        n: Number of the last row.
        row_digest: Digest of the last row.
        came: Number of the last label or correction.
        label_digest: Digest of the last label or correction.
    """

    n: int
    row_digest: bytes
    came: int
    label_digest: bytes

    def line(self) -> bytes:
        """The line of ``rows.ends``. Its length is constant, so a single write replaces it."""
        row_end = f"{self.n:020d} {self.row_digest.hex()}"
        label_end = f"{self.came:020d} {self.label_digest.hex()}"
        return f"{row_end} {label_end}\n".encode()

    @classmethod
    def parse(cls, line: bytes) -> Ends | None:
        """Parse a line of ``rows.ends``; None if the line is damaged."""
        match = ENDS_LINE.fullmatch(line)
        if match is None:
            return None
        return cls(
            n=int(match["n"]),
            row_digest=bytes.fromhex(match["row_digest"].decode()),
            came=int(match["came"]),
            label_digest=bytes.fromhex(match["label_digest"].decode()),
        )


class RowFile:
    """The open file of rows and labels, for use by a single thread at a time.

    The chains are checked when the file is opened. If a chain is broken, the file is set aside
    with a warning, and a new file gets the rows and labels before the break.

    Args:
        folder: Folder of the file; the file may be new.
        monitor: Fingerprint of the monitor of these rows.

    Raises:
        ProvenanceError: If another version of vilu wrote the file.
        StorageError: If the file system refuses.
    """

    def __init__(self, folder: Path, monitor: str) -> None:
        self.path = folder / ROWS
        self._ends_path = folder / ENDS
        first_digest = hashlib.blake2b(monitor.encode(), digest_size=DIGEST_BYTES).digest()
        # the ends of chains without a row and without a label
        self._empty_ends = Ends(n=0, row_digest=first_digest, came=0, label_digest=first_digest)
        self.ends = self._checked_ends()
        # number of the last row ever answered; the file may have lost this row
        self._last_number = self.ends.n
        # The file of ends must exist before the first row is written, because rows without a file
        # of ends count as damaged.
        with convert_os_errors(f"cannot write {self._ends_path}"):
            self._ends_file = os.open(self._ends_path, os.O_RDWR | os.O_CREAT, 0o666)
        self._note_ends()
        os.fsync(self._ends_file)
        with self._sqlite_errors():
            self._table = sqlite3.connect(
                self.path, timeout=PATIENCE, check_same_thread=False, isolation_level=None
            )
            self._table.executescript("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;")
            self._table.executescript(TABLES)
        paths = (self.path, folder / WAL)
        # identities of the files at this moment, to notice later if a file was replaced
        self._identities = {path: _identity(path) for path in paths}

    def skip_numbers_to(self, n: int) -> None:
        """Give new rows only numbers above n, the number of rows seen by the monitor.

        The file may have lost some of the rows up to n. Numbers of lost rows are not used again.
        """
        self._last_number = max(self._last_number, n)

    @property
    def is_lost(self) -> bool:
        """Whether the open file was removed or replaced; then no row can be kept."""
        return any(_identity(path) != identity for path, identity in self._identities.items())

    def add(self, ids: Sequence[str], answers: Sequence[int], uncertainty: Sequence[float]) -> None:
        """Write the rows with new ids; all rows are on disk when this method returns.

        Raises:
            StorageError: If the rows cannot be written, or the file was removed or replaced.
        """
        self._require_in_place()
        ends = self.ends
        last_number = self._last_number
        now = time.time()
        with self._sqlite_errors(), self._transaction():
            for key, answer, value in zip(ids, answers, uncertainty, strict=True):
                is_stored = self.number(key) is not None
                if is_stored:
                    continue
                last_number += 1
                digest = _row_digest(ends.row_digest, last_number, key.encode(), now, answer, value)
                row = (last_number, key, now, answer, value, digest)
                self._table.execute("INSERT INTO rows VALUES (?, ?, ?, ?, ?, ?)", row)
                ends = replace(ends, n=last_number, row_digest=digest)
        self._set_ends(ends)

    def add_labels(self, labels: Mapping[int, int]) -> None:
        """Write the first label of each of these rows; ``labels`` maps row number to label.

        Raises:
            StorageError: As ``add``.
        """
        self._write_labels("labels", labels)

    def add_corrections(self, labels: Mapping[int, int]) -> None:
        """Write a new label for each of these rows; earlier labels stay in the file.

        Raises:
            StorageError: As ``add``.
        """
        self._write_labels("corrections", labels)

    def _write_labels(self, table: str, labels: Mapping[int, int]) -> None:
        """Write labels (row number -> label) to the table "labels" or "corrections"."""
        self._require_in_place()
        ends = self.ends
        with self._sqlite_errors(), self._transaction():
            for n, label in labels.items():
                ends = _insert_label(self._table, table, n, label, ends)
        self._set_ends(ends)

    def require_writable(self) -> None:
        """Write the version number again, as a test; StorageError if the write fails."""
        self._require_in_place()
        with self._sqlite_errors(), self._transaction():
            self._table.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def number(self, key: str) -> int | None:
        """The number of the row with this id; None if the file has no such row."""
        with self._sqlite_errors():
            row = self._table.execute("SELECT n FROM rows WHERE id = ?", (key,)).fetchone()
        return None if row is None else int(row[0])

    def label_of(self, n: int) -> int | None:
        """The label of the row with this number, or the last correction; None without a label."""
        query = (
            "SELECT label FROM (SELECT came, label FROM labels WHERE n = :n "
            "UNION ALL SELECT came, label FROM corrections WHERE n = :n) ORDER BY came DESC LIMIT 1"
        )
        with self._sqlite_errors():
            row = self._table.execute(query, {"n": n}).fetchone()
        return None if row is None else int(row[0])

    def rows_after(self, n: int) -> list[AnsweredRow]:
        """The first ``MAX_ROWS_READ`` rows above number n, without pictures of earlier rows."""
        with self._sqlite_errors():
            records = self._table.execute(ROWS_OF_NEW_PICTURES, (n, MAX_ROWS_READ))
            return [AnsweredRow(*row) for row in records]

    def labels_after(self, came: int) -> list[AuditedRow]:
        """The rows with labels numbered above ``came``, in the order of the labels.

        A row with a corrected label has the last correction. If rows of equal pictures have labels,
        only the row with the first label is returned.
        """
        with self._sqlite_errors():
            records = self._table.execute(LABELS_OF_NEW_PICTURES, (came,))
            return [AuditedRow(*row) for row in records]

    def close(self) -> None:
        """Close both files."""
        with self._sqlite_errors():
            self._table.close()
        os.close(self._ends_file)

    def _require_in_place(self) -> None:
        """Raise StorageError if the file was removed or replaced."""
        if self.is_lost:
            raise StorageError(
                f"{self.path} was removed or replaced while it was in use, so no row can be kept. "
                "Stop the service, restore the file, and start again."
            )

    def _set_ends(self, ends: Ends) -> None:
        """Note the new ends of the chains. The last row and label must be on disk already."""
        self._require_in_place()
        self.ends = ends
        self._last_number = max(self._last_number, ends.n)
        self._note_ends()

    def _note_ends(self) -> None:
        """Write the line of the ends in a single call, so a kill cannot leave half of a line.

        A power cut may lose the line.
        """
        with convert_os_errors(f"cannot write {self._ends_path}"):
            os.pwrite(self._ends_file, self.ends.line(), 0)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Write all changes of the block together at the end; after an exception, write nothing."""
        with self._table:
            self._table.execute("BEGIN IMMEDIATE")
            yield

    @contextmanager
    def _sqlite_errors(self) -> Iterator[None]:
        """Convert an error of SQLite in the block into a ``StorageError``."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            advice = ""
            if _is_damage(error):
                advice = " The file is damaged. Start again: all rows before the damage are kept."
            raise StorageError(f"cannot use {self.path}: {error}.{advice}") from error

    def _checked_ends(self) -> Ends:
        """The ends of the chains; damaged files are set aside and repaired first."""
        noted_ends = self._noted_ends()
        if not self.path.exists():
            has_noted_nothing = noted_ends is None or noted_ends == self._empty_ends
            if has_noted_nothing:  # the journal is new
                return self._empty_ends
            return self._repair(noted_ends)
        self._require_version()
        self._add_missing_tables()
        ends, is_whole = self._survey(noted_ends or self._empty_ends)
        if noted_ends is None and ends != self._empty_ends:
            is_whole = False  # there are rows, but the file of ends is missing or damaged
        return ends if is_whole else self._repair(noted_ends)

    def _noted_ends(self) -> Ends | None:
        """The ends in the file ``rows.ends``; None if the file is missing or damaged."""
        with convert_os_errors(f"cannot read {self._ends_path}"):
            if not self._ends_path.exists():
                return None
            return Ends.parse(self._ends_path.read_bytes())

    def _require_version(self) -> None:
        """Raise ProvenanceError for tables of another version of vilu; damage is found later."""
        version = 0
        has_tables = False
        with self._until_damage(), closing(_open_to_read(self.path)) as table:
            (version,) = table.execute("PRAGMA user_version").fetchone()
            has_tables = bool(_schema_of(table))
        if has_tables:
            require_schema(self.path, {SCHEMA: version}, "Serve with a new --state")

    def _add_missing_tables(self) -> None:
        """Add the tables missing in files of earlier versions; further faults are found later."""
        is_earlier = False
        with self._until_damage(), closing(_open_to_read(self.path)) as table:
            is_earlier = _schema_of(table) == _our_schema(without=LATER_NAMES)
        if is_earlier:
            with self._sqlite_errors(), closing(sqlite3.connect(self.path)) as table:
                table.executescript(TABLES)

    def _survey(self, noted: Ends) -> tuple[Ends, bool]:
        """Walk along the chains, up to the first break of each.

        Returns:
            The last row and label before a break, and whether the file is whole: no chain is
            broken, and the chains contain the row and the label in ``noted``.
        """
        last_row = 0
        row_digest = self._empty_ends.row_digest
        n_rows = 0
        last_label = 0
        label_digest = self._empty_ends.label_digest
        n_labels = 0
        # without a noted row (or label), there is no row (or label) to look for
        has_noted_row = noted.n == 0
        has_noted_label = noted.came == 0
        is_sound = False
        with self._until_damage(), closing(_open_to_read(self.path)) as table:
            if not _schema_of(table):  # vilu was killed before the tables were created
                return self._empty_ends, noted == self._empty_ends
            first_digest = self._empty_ends.row_digest  # both chains begin with this digest
            for last_row, *_, row_digest in _rows_that_follow(table, first_digest):
                n_rows += 1
                if last_row == noted.n:
                    has_noted_row = row_digest == noted.row_digest
            for last_label, _, _, label_digest, _ in _labels_that_follow(table, first_digest):
                n_labels += 1
                if last_label == noted.came:
                    has_noted_label = label_digest == noted.label_digest
            # if a chain is broken, the table has more rows (or labels) than the walk has counted
            is_sound = _is_sound(table) and _chain_lengths(table) == (n_rows, n_labels)
        ends = Ends(n=last_row, row_digest=row_digest, came=last_label, label_digest=label_digest)
        return ends, is_sound and has_noted_row and has_noted_label

    @contextmanager
    def _until_damage(self) -> Iterator[None]:
        """End the block silently at damage of the file; any other error becomes StorageError."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            if not _is_damage(error):
                raise StorageError(f"cannot use {self.path}: {error}.") from error

    def _repair(self, noted: Ends | None) -> Ends:
        """Set the old files aside, and write a copy of the unbroken chains in their place."""
        new_path = self.path.with_name(f"{ROWS}.new")
        with convert_os_errors(f"cannot write {new_path}"):
            new_path.unlink(missing_ok=True)
        ends, n_rows = self._copy_chains(new_path)
        names_aside = set_aside(self.path.parent, (WAL, f"{ROWS}-shm", ROWS, ENDS))
        with convert_os_errors(f"cannot write {self.path}"):
            new_path.replace(self.path)
        noted_text = "an unknown number of" if noted is None else f"{noted.n:,}"
        logger.warning(
            "%s is damaged or has lost rows (of %s, %s and %s): %s rows were noted, and %s rows "
            "are intact. Those are kept, with %s labels. The old files are set aside as %s.",
            self.path,
            ROWS,
            WAL,
            ENDS,
            noted_text,
            f"{n_rows:,}",
            f"{ends.came:,}",
            ", ".join(names_aside),
        )
        return ends

    def _copy_chains(self, new_path: Path) -> tuple[Ends, int]:
        """Copy the unbroken chains to a new file; return the new ends and the number of rows."""
        ends = self._empty_ends
        n_rows = 0
        with (
            self._sqlite_errors(),
            closing(sqlite3.connect(new_path, isolation_level=None)) as new_table,
        ):
            new_table.executescript(TABLES)
            if not self.path.exists():
                return ends, n_rows
            new_table.execute("BEGIN")
            with self._until_damage(), closing(_open_to_read(self.path)) as table:
                for n, key, *numbers, digest in _rows_that_follow(table, ends.row_digest):
                    row = (n, key.decode(), *numbers, digest)
                    new_table.execute("INSERT INTO rows VALUES (?, ?, ?, ?, ?, ?)", row)
                    ends = replace(ends, n=n, row_digest=digest)
                    n_rows += 1
            with self._until_damage(), closing(_open_to_read(self.path)) as table:
                for _, n, label, _, table_name in _labels_that_follow(table, ends.label_digest):
                    # a label is copied only if the row was copied
                    if new_table.execute("SELECT 1 FROM rows WHERE n = ?", (n,)).fetchone():
                        ends = _insert_label(new_table, table_name, n, label, ends)
            new_table.execute("COMMIT")
        return ends, n_rows


def set_aside(folder: Path, names: Iterable[str]) -> list[str]:
    """Rename the existing files to free names; return the new names."""
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
    connection: sqlite3.Connection, table: str, n: int, label: int, ends: Ends
) -> Ends:
    """Add the label of row n to the table with this name and to the chain; returns the new ends."""
    came = ends.came + 1
    digest = _label_digest(ends.label_digest, came, n, label)
    statement = f"INSERT INTO {table} VALUES (?, ?, ?, ?)"  # noqa: S608 - a table of ours
    connection.execute(statement, (came, n, label, digest))
    return replace(ends, came=came, label_digest=digest)


def _row_digest(
    previous_digest: bytes, n: int, key: bytes, when: float, answer: int, uncertainty: float
) -> bytes:
    """Digest of the content of a row and the digest of the previous row of the chain."""
    content = previous_digest + ROW_NUMBERS.pack(n, when, answer, uncertainty) + key
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()


def _label_digest(previous_digest: bytes, came: int, n: int, label: int) -> bytes:
    """Digest of the label of row n and the digest of the previous label of the chain."""
    content = previous_digest + LABEL_NUMBERS.pack(came, n, label)
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()


def _rows_that_follow(table: sqlite3.Connection, previous_digest: bytes) -> Iterator[StoredRow]:
    """The rows in order, until a digest does not fit the previous row."""
    query = "SELECT n, CAST(id AS BLOB), time, answer, uncertainty, digest FROM rows ORDER BY n"
    # A value of a wrong type raises one of these exceptions. Such a file is damaged.
    with suppress(struct.error, TypeError):
        for row in table.execute(query):
            n, key, when, answer, uncertainty, digest = row
            if digest != _row_digest(previous_digest, n, key, when, answer, uncertainty):
                return
            yield row
            previous_digest = digest


def _labels_that_follow(table: sqlite3.Connection, previous_digest: bytes) -> Iterator[StoredLabel]:
    """The labels in order, until a digest does not fit the previous label."""
    with suppress(struct.error, TypeError):
        for label in table.execute(LABEL_CHAIN):
            came, n, value, digest, _ = label
            if digest != _label_digest(previous_digest, came, n, value):
                return
            yield label
            previous_digest = digest


def _is_sound(table: sqlite3.Connection) -> bool:
    """Whether the tables have our schema, and SQLite's integrity check finds no fault."""
    if _schema_of(table) != _our_schema():
        return False
    (verdict,) = table.execute("PRAGMA integrity_check(1)").fetchone()
    return bool(verdict == "ok")


def _schema_of(table: sqlite3.Connection, without: Set[str] = frozenset()) -> list[str]:
    """The SQL text of all tables, indices and triggers not in ``without``, ordered by name."""
    query = "SELECT name, coalesce(sql, name) FROM sqlite_schema ORDER BY name"
    return [text for name, text in table.execute(query) if name not in without]


def _our_schema(without: Set[str] = frozenset()) -> list[str]:
    """The schema of a new file, without the names in ``without``."""
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as table:
        table.executescript(TABLES)
        return _schema_of(table, without)


def _chain_lengths(table: sqlite3.Connection) -> tuple[int, int]:
    """Number of rows, and number of labels and corrections together."""
    query = (
        "SELECT (SELECT count(*) FROM rows), "
        "(SELECT count(*) FROM labels) + (SELECT count(*) FROM corrections)"
    )
    n_rows, n_labels = table.execute(query).fetchone()
    return int(n_rows), int(n_labels)


def _open_to_read(path: Path) -> sqlite3.Connection:
    """Open the file read-only, so a damaged file is not changed."""
    address = f"file:{quote(str(path.absolute()))}?mode=ro"
    return sqlite3.connect(address, uri=True, timeout=PATIENCE, isolation_level=None)


def _is_damage(error: sqlite3.DatabaseError) -> bool:
    """Whether an error means damage to the content of the file."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)
    primary_code = code & 0xFF  # the higher bits say more about the same kind of error
    return primary_code not in HARMLESS_ERRORS


def _identity(path: Path) -> tuple[int, int] | None:
    """Device and inode of a file; None if there is no file."""
    try:
        facts = path.stat()
    except FileNotFoundError:
        return None
    return facts.st_dev, facts.st_ino
