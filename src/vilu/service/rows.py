"""The file of answered rows and their labels; damage is found when the file is opened.

- Rows and labels are only added, never changed.
- Rows form a chain: the digest of a row is computed from its content and the digest of the previous
  row. So an edit or a deletion breaks the chain. Labels form a second chain.
- The chains begin with a digest of the fingerprint of the monitor, so rows of another monitor do
  not fit.
- A small second file notes the last row and the last label, so that missing rows at the end are
  found too.

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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import quote

from vilu.artifacts.disk import or_refuse
from vilu.artifacts.documents import SCHEMA, SCHEMA_VERSION, require_schema
from vilu.errors import StorageError

logger = logging.getLogger(__name__)

ROWS = "rows.sqlite"
"""Name of the file of rows and labels."""

ENDS = "rows.ends"
"""Name of the file that notes the last row and the last label."""

WAL: Final = f"{ROWS}-wal"
"""Name of SQLite's write-ahead log: rows that are not in the main file yet."""

BLOCK: Final = 50_000
"""Maximum number of rows that are read at a time."""

PATIENCE: Final = 30.0
"""Seconds to wait for a file that another process has locked."""

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
PRAGMA user_version = {SCHEMA_VERSION};
COMMIT
"""
"""SQL that creates the tables.

``n`` is the number of a row, and ``came`` the number of a label, in the order of their arrival.
"""

DIGEST: Final = 16
"""Length of a digest in bytes."""

ENDS_LINE: Final = re.compile(
    rb"(?P<n>\d{20}) (?P<row>[0-9a-f]{32}) (?P<came>\d{20}) (?P<label>[0-9a-f]{32})\n"
)
"""Pattern of the only line of the file ``ENDS``; the groups are the attributes of ``Ends``."""

# binary formats of the numbers from which digests are computed
ROW_NUMBERS = struct.Struct("<qdqd")  # number of the row, time, answer, uncertainty
LABEL_NUMBERS = struct.Struct("<qqq")  # number of the label, number of its row, label

NO_DAMAGE: Final = {
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
    """The part of a row that the monitor takes in."""

    n: int  # number of the row, in the order of arrival
    id: str
    answer: int
    uncertainty: float


class AuditedRow(NamedTuple):
    """The part of a labelled row that the monitor takes in, with the label."""

    n: int
    id: str
    answer: int
    uncertainty: float
    label: int


StoredRow = tuple[int, bytes, float, int, float, bytes]
"""Number, id, time, answer, uncertainty, digest."""

StoredLabel = tuple[int, int, int, bytes]
"""Number of the label, number of its row, label, digest."""


@dataclass(frozen=True)
class Ends:
    """The ends of both chains.

    Attributes:
        n: Number of the last row.
        row: Digest of the last row.
        came: Number of the last label.
        label: Digest of the last label.
    """

    n: int
    row: bytes
    came: int
    label: bytes

    def line(self) -> bytes:
        """The line of ``rows.ends``; its length is constant, so that one write replaces it."""
        text = f"{self.n:020d} {self.row.hex()} {self.came:020d} {self.label.hex()}\n"
        return text.encode()

    @classmethod
    def parse(cls, line: bytes) -> Ends | None:
        """The ends that a line of ``rows.ends`` holds; None if the line is damaged."""
        match = ENDS_LINE.fullmatch(line)
        if match is None:
            return None
        row = bytes.fromhex(match["row"].decode())
        label = bytes.fromhex(match["label"].decode())
        return cls(n=int(match["n"]), row=row, came=int(match["came"]), label=label)


class RowFile:
    """The open file of rows and labels; only one thread may use it at a time.

    When the file is opened, its chains are checked. If a chain is broken, the file is set aside
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
        start = hashlib.blake2b(monitor.encode(), digest_size=DIGEST).digest()
        self._nothing = Ends(n=0, row=start, came=0, label=start)  # ends of empty chains
        self.ends = self._verified()
        # number of the last row that was ever answered; the file may have lost this row
        self._last = self.ends.n
        # The file of ends must exist before the first row, because a file of rows without it counts
        # as damaged.
        with or_refuse(f"write {self._ends_path}"):
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
        self._identities = {path: _identity(path) for path in paths}

    def number_above(self, n: int) -> None:
        """Give the next rows numbers above n, the number of rows that the monitor has seen.

        The file may have lost some of these rows. Their numbers are not used again.
        """
        self._last = max(self._last, n)

    @property
    def is_lost(self) -> bool:
        """Whether the file was removed or replaced while it was open; then no row can be kept."""
        return any(_identity(path) != before for path, before in self._identities.items())

    def add(self, ids: Sequence[str], answers: Sequence[int], uncertainty: Sequence[float]) -> None:
        """Write the rows whose ids are not in the file yet; they are on disk when this returns.

        Raises:
            StorageError: If the rows cannot be written, or the file was removed or replaced.
        """
        self._require_in_place()
        ends = self.ends
        last = self._last
        now = time.time()
        with self._sqlite_errors(), self._transaction():
            for key, answer, value in zip(ids, answers, uncertainty, strict=True):
                is_stored = self.number(key) is not None
                if is_stored:
                    continue
                last += 1
                digest = _row_digest(ends.row, last, key.encode(), now, answer, value)
                row = (last, key, now, answer, value, digest)
                self._table.execute("INSERT INTO rows VALUES (?, ?, ?, ?, ?, ?)", row)
                ends = replace(ends, n=last, row=digest)
        self._end_at(ends)

    def add_labels(self, labels: Mapping[int, int]) -> None:
        """Write labels, by the numbers of their rows, which must have no label yet.

        Raises:
            StorageError: As ``add``.
        """
        self._require_in_place()
        with self._sqlite_errors(), self._transaction():
            ends = _insert_labels(self._table, labels.items(), self.ends)
        self._end_at(ends)

    def number(self, key: str) -> int | None:
        """The number of the row with this id; None if there is none."""
        with self._sqlite_errors():
            row = self._table.execute("SELECT n FROM rows WHERE id = ?", (key,)).fetchone()
        return None if row is None else int(row[0])

    def has_label(self, n: int) -> bool:
        """Whether the row with this number has a label."""
        with self._sqlite_errors():
            row = self._table.execute("SELECT 1 FROM labels WHERE n = ?", (n,)).fetchone()
        return row is not None

    def rows_after(self, n: int) -> list[AnsweredRow]:
        """The first ``BLOCK`` rows whose number is above n."""
        query = "SELECT n, id, answer, uncertainty FROM rows WHERE n > ? ORDER BY n LIMIT ?"
        with self._sqlite_errors():
            return [AnsweredRow(*row) for row in self._table.execute(query, (n, BLOCK))]

    def labels_after(self, came: int) -> list[AuditedRow]:
        """Rows of the labels whose number is above ``came``, in the order of the labels."""
        query = (
            "SELECT n, id, answer, uncertainty, label FROM labels JOIN rows USING (n) "
            "WHERE came > ? ORDER BY came"
        )
        with self._sqlite_errors():
            return [AuditedRow(*row) for row in self._table.execute(query, (came,))]

    def close(self) -> None:
        """Close both files."""
        with self._sqlite_errors():
            self._table.close()
        os.close(self._ends_file)

    def _require_in_place(self) -> None:
        if self.is_lost:
            raise StorageError(
                f"{self.path} was removed or replaced while it was in use, so no row can be kept. "
                "Stop the service, restore the file, and start again."
            )

    def _end_at(self, ends: Ends) -> None:
        """Note the new ends of the chains; their rows and labels must be on disk already."""
        self._require_in_place()
        self.ends = ends
        self._last = max(self._last, ends.n)
        self._note_ends()

    def _note_ends(self) -> None:
        """Write the line of the ends in one call, which a kill cannot interrupt half-way.

        A power cut may lose the line.
        """
        with or_refuse(f"write {self._ends_path}"):
            os.pwrite(self._ends_file, self.ends.line(), 0)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._table:  # commits at the end; rolls back after an exception
            self._table.execute("BEGIN IMMEDIATE")
            yield

    @contextmanager
    def _sqlite_errors(self) -> Iterator[None]:
        """A block in which an error of SQLite becomes a ``StorageError``."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            advice = ""
            if _is_damage(error):
                advice = " It is damaged. Start again: all rows before the damage are kept."
            raise StorageError(f"cannot use {self.path}: {error}.{advice}") from error

    def _verified(self) -> Ends:
        """The ends of the chains; damaged files are set aside and repaired first."""
        noted = self._noted_ends()
        if not self.path.exists():
            is_new = noted is None or noted == self._nothing  # no row and no label was noted
            return self._nothing if is_new else self._repaired(noted)
        self._require_version()
        ends, is_whole = self._survey(noted or self._nothing)
        if noted is None and ends != self._nothing:
            is_whole = False  # there are rows, but the file of ends is missing or damaged
        return ends if is_whole else self._repaired(noted)

    def _noted_ends(self) -> Ends | None:
        """The ends in the file ``rows.ends``; None if it is missing or damaged."""
        with or_refuse(f"read {self._ends_path}"):
            if not self._ends_path.exists():
                return None
            return Ends.parse(self._ends_path.read_bytes())

    def _require_version(self) -> None:
        """Raise ProvenanceError for tables of another version of vilu; damage is found later."""
        version = 0
        has_tables = False
        with self._until_damage(), closing(_opened_to_read(self.path)) as table:
            (version,) = table.execute("PRAGMA user_version").fetchone()
            has_tables = bool(_schema_of(table))
        if has_tables:
            require_schema(self.path, {SCHEMA: version}, "Serve with a new --state")

    def _survey(self, noted: Ends) -> tuple[Ends, bool]:
        """Walk along the chains.

        Returns:
            The last row and label before a break, and whether the file is whole: no chain is
            broken, and both have the ends that were ``noted``.
        """
        last_row = 0
        row_digest = self._nothing.row
        n_rows = 0
        last_label = 0
        label_digest = self._nothing.label
        n_labels = 0
        # nothing has to be searched for if the noted chain is empty
        has_noted_row = noted.n == 0
        has_noted_label = noted.came == 0
        is_sound = False
        with self._until_damage(), closing(_opened_to_read(self.path)) as table:
            if not _schema_of(table):  # vilu was killed before it had created the tables
                return self._nothing, noted == self._nothing
            for last_row, *_, row_digest in _rows_that_follow(table, self._nothing.row):
                n_rows += 1
                if last_row == noted.n:
                    has_noted_row = row_digest == noted.row
            for last_label, *_, label_digest in _labels_that_follow(table, self._nothing.label):
                n_labels += 1
                if last_label == noted.came:
                    has_noted_label = label_digest == noted.label
            is_sound = _is_sound(table) and _sizes(table) == (n_rows, n_labels)
        ends = Ends(n=last_row, row=row_digest, came=last_label, label=label_digest)
        return ends, is_sound and has_noted_row and has_noted_label

    @contextmanager
    def _until_damage(self) -> Iterator[None]:
        """A block that ends silently at damage of the file. Other errors become StorageError."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            if not _is_damage(error):
                raise StorageError(f"cannot use {self.path}: {error}.") from error

    def _repaired(self, noted: Ends | None) -> Ends:
        """Set the old files aside, and replace them by a copy of the unbroken chains."""
        new = self.path.with_name(f"{ROWS}.new")
        with or_refuse(f"write {new}"):
            new.unlink(missing_ok=True)
        ends, n_rows = self._copied_to(new)
        aside = set_aside(self.path.parent, (WAL, f"{ROWS}-shm", ROWS, ENDS))
        with or_refuse(f"write {self.path}"):
            new.replace(self.path)
        expected = "an unknown number of" if noted is None else f"{noted.n:,}"
        logger.warning(
            "%s is damaged or has lost rows (of %s, %s and %s): %s rows were noted, and %s rows "
            "are intact. Those are kept, with %s labels. The old files are set aside as %s.",
            self.path,
            ROWS,
            WAL,
            ENDS,
            expected,
            f"{n_rows:,}",
            f"{ends.came:,}",
            ", ".join(aside),
        )
        return ends

    def _copied_to(self, new: Path) -> tuple[Ends, int]:
        """Copy the unbroken chains to a new file; returns its ends and its number of rows."""
        ends = self._nothing
        n_rows = 0
        with self._sqlite_errors(), closing(sqlite3.connect(new, isolation_level=None)) as target:
            target.executescript(TABLES)
            if not self.path.exists():
                return ends, n_rows
            target.execute("BEGIN")
            with self._until_damage(), closing(_opened_to_read(self.path)) as table:
                for n, key, *numbers, digest in _rows_that_follow(table, ends.row):
                    row = (n, key.decode(), *numbers, digest)
                    target.execute("INSERT INTO rows VALUES (?, ?, ?, ?, ?, ?)", row)
                    ends = replace(ends, n=n, row=digest)
                    n_rows += 1
            with self._until_damage(), closing(_opened_to_read(self.path)) as table:
                for _, n, label, _ in _labels_that_follow(table, ends.label):
                    # a label is copied only if its row was copied
                    if target.execute("SELECT 1 FROM rows WHERE n = ?", (n,)).fetchone():
                        ends = _insert_labels(target, [(n, label)], ends)
            target.execute("COMMIT")
        return ends, n_rows


def set_aside(folder: Path, names: Iterable[str]) -> list[str]:
    """Rename the files that exist, so that nothing is lost; returns their new names."""
    present = [name for name in names if (folder / name).exists()]
    renamed: list[str] = []
    for number in count(1):
        renamed = [f"{name}.aside-{number}" for name in present]
        if not any((folder / name).exists() for name in renamed):
            break
    with or_refuse(f"rename files in {folder}"):
        for name, aside in zip(present, renamed, strict=True):
            (folder / name).rename(folder / aside)
    return renamed


def _insert_labels(
    table: sqlite3.Connection, labels: Iterable[tuple[int, int]], ends: Ends
) -> Ends:
    """Add labels, as pairs of row number and label, to the chain; returns the new ends."""
    for n, label in labels:
        came = ends.came + 1
        digest = _label_digest(ends.label, came, n, label)
        table.execute("INSERT INTO labels VALUES (?, ?, ?, ?)", (came, n, label, digest))
        ends = replace(ends, came=came, label=digest)
    return ends


def _row_digest(
    before: bytes, n: int, key: bytes, when: float, answer: int, uncertainty: float
) -> bytes:
    content = before + ROW_NUMBERS.pack(n, when, answer, uncertainty) + key
    return hashlib.blake2b(content, digest_size=DIGEST).digest()


def _label_digest(before: bytes, came: int, n: int, label: int) -> bytes:
    content = before + LABEL_NUMBERS.pack(came, n, label)
    return hashlib.blake2b(content, digest_size=DIGEST).digest()


def _rows_that_follow(table: sqlite3.Connection, before: bytes) -> Iterator[StoredRow]:
    """The rows in order, up to the first whose digest does not fit the previous row."""
    query = "SELECT n, CAST(id AS BLOB), time, answer, uncertainty, digest FROM rows ORDER BY n"
    # A value of a wrong type, which shows that the file is damaged, raises one of these exceptions.
    with suppress(struct.error, TypeError):
        for row in table.execute(query):
            n, key, when, answer, uncertainty, digest = row
            if digest != _row_digest(before, n, key, when, answer, uncertainty):
                return
            yield row
            before = digest


def _labels_that_follow(table: sqlite3.Connection, before: bytes) -> Iterator[StoredLabel]:
    """The labels in order, up to the first whose digest does not fit the previous label."""
    with suppress(struct.error, TypeError):
        for label in table.execute("SELECT came, n, label, digest FROM labels ORDER BY came"):
            came, n, value, digest = label
            if digest != _label_digest(before, came, n, value):
                return
            yield label
            before = digest


def _is_sound(table: sqlite3.Connection) -> bool:
    """Whether the tables have our schema, and SQLite's integrity check finds no fault."""
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as ours:
        ours.executescript(TABLES)
        if _schema_of(table) != _schema_of(ours):
            return False
    (verdict,) = table.execute("PRAGMA integrity_check(1)").fetchone()
    return bool(verdict == "ok")


def _schema_of(table: sqlite3.Connection) -> list[str]:
    """The SQL text of all tables, indices and triggers, ordered by name."""
    query = "SELECT coalesce(sql, name) FROM sqlite_schema ORDER BY name"
    return [text for (text,) in table.execute(query)]


def _sizes(table: sqlite3.Connection) -> tuple[int, int]:
    """Numbers of rows and of labels."""
    query = "SELECT (SELECT count(*) FROM rows), (SELECT count(*) FROM labels)"
    n_rows, n_labels = table.execute(query).fetchone()
    return int(n_rows), int(n_labels)


def _opened_to_read(path: Path) -> sqlite3.Connection:
    """A read-only connection, so that a damaged file is not changed."""
    address = f"file:{quote(str(path.absolute()))}?mode=ro"
    return sqlite3.connect(address, uri=True, timeout=PATIENCE, isolation_level=None)


def _is_damage(error: sqlite3.DatabaseError) -> bool:
    """Whether an error means that the content of the file is damaged."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)
    kind = code & 0xFF  # the other bits are details of the kind
    return kind not in NO_DAMAGE


def _identity(path: Path) -> tuple[int, int] | None:
    """Device and inode of a file; None if there is no file."""
    try:
        facts = path.stat()
    except FileNotFoundError:
        return None
    return facts.st_dev, facts.st_ino
