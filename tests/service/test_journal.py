"""The journal on disk: damage and loss must be reported, a kill is neither, and nothing is
deleted.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from vilu.calibration.monitor.monitor import Monitor
from vilu.errors import ProvenanceError, StorageError
from vilu.service.journal import Journal
from vilu.service.local_journals import LocalJournals
from vilu.service.rows import RowFile

N = 60
"""The number of rows in the journal that is damaged."""


def fill(journal: Journal, first: int, last: int) -> None:
    """Record calibration rows in their order, with ten rows a request."""
    calibration = journal.monitor.calibration
    answers = np.asarray(calibration.prediction)
    for start in range(first, last, 10):
        rows = slice(start, min(start + 10, last))
        ids = [f"r{number}" for number in range(last)][rows]
        journal.record(ids, answers[rows].tolist(), calibration.uncertainty[rows].tolist())


def right_labels(journal: Journal, numbers: range) -> dict[str, str]:
    calibration = journal.monitor.calibration
    names = calibration.class_names or ()
    answers = np.asarray(calibration.prediction)
    return {f"r{number}": names[answers[number]] for number in numbers}


def sql(*statements: str) -> Callable[[Path], None]:
    """Return an edit that another program makes to the file of rows."""

    def edit(folder: Path) -> None:
        with closing(sqlite3.connect(folder / "rows.sqlite")) as table:
            for statement in statements:
                table.execute(statement)
            table.commit()

    return edit


def emptied(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(b"")


def removed(*names: str) -> Callable[[Path], None]:
    def remove(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return remove


def flipped(name: str, place: int) -> Callable[[Path], None]:
    def flip(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[place] ^= 4
        (folder / name).write_bytes(content)

    return flip


# The damage, the file that the message names, the rows that are left and the labels that are left.
DAMAGES: dict[str, tuple[Callable[[Path], None], str, int, int]] = {
    "a row edited": (
        sql("UPDATE rows SET answer = answer + 1 WHERE n = 41"),
        "rows.sqlite",
        40,
        20,
    ),
    "rows deleted": (sql("DELETE FROM rows WHERE n BETWEEN 40 AND 45"), "rows.sqlite", 39, 20),
    "the last rows deleted": (sql("DELETE FROM rows WHERE n > 50"), "rows.sqlite", 50, 20),
    "the first rows deleted": (sql("DELETE FROM rows WHERE n < 9"), "rows.sqlite", 0, 0),
    "two rows exchanged": (
        sql("UPDATE rows SET n = 99 WHERE n = 30", "UPDATE rows SET n = 30 WHERE n = 31"),
        "rows.sqlite",
        29,
        20,
    ),
    "the table of rows dropped": (sql("DROP TABLE rows"), "rows.sqlite", 0, 0),
    "the table of labels dropped": (sql("DROP TABLE labels"), "rows.sqlite", N, 0),
    "a label edited": (
        sql("UPDATE labels SET label = 1 - label WHERE came = 11"),
        "rows.sqlite",
        N,
        10,
    ),
    "labels deleted": (sql("DELETE FROM labels WHERE came > 15"), "rows.sqlite", N, 15),
    "no file of rows": (removed("rows.sqlite"), "rows.sqlite", 0, 0),
    "an empty file of rows": (emptied("rows.sqlite"), "rows.sqlite", 0, 0),
    "a damaged head": (flipped("rows.sqlite", 3), "rows.sqlite", 0, 0),
    "no ends": (removed("rows.ends"), "rows.ends", N, 20),
    "damaged ends": (flipped("rows.ends", 30), "rows.ends", N, 20),
    "a damaged state": (flipped("monitor.parquet", 300), "monitor.parquet", N, 20),
    "neither rows nor ends": (removed("rows.sqlite", "rows.ends"), "rows.sqlite", 0, 0),
}


@pytest.fixture
def whole(predictors: tuple[Path, Path], tmp_path: Path) -> Path:
    """Write a journal with ``N`` rows and 20 labels, close it and return its folder."""
    journal = Journal(tmp_path / "whole", predictors[0])
    fill(journal, 0, N)
    journal.label(right_labels(journal, range(20)))
    journal.close()
    return tmp_path / "whole"


@pytest.mark.usefixtures("left_open")
@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_told_and_what_follows_stays(
    whole: Path,
    predictors: tuple[Path, Path],
    caplog: pytest.LogCaptureFixture,
    name: str,
    saved: bool,
) -> None:
    """The journal must report the damage and keep the rows and labels that are still valid.

    If the state was saved, the monitor must know all rows. If the state is missing, the monitor
    must know the valid rows only.
    """
    damage, file, n_rows, n_labels = DAMAGES[name]
    damage(whole)
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    n_seen = n_rows if name == "a damaged state" else N
    if not saved:
        (whole / "monitor.parquet").unlink()
        n_seen = n_rows
    if not saved and name in {"a damaged state", "neither rows nor ends"}:
        pytest.skip("nothing is left that could tell")
    journal = Journal(whole, predictors[0])
    assert file in caplog.text
    assert journal.status.rows == n_seen
    assert len(journal._row_file.labels_after(0)) == n_labels
    there = {path.read_bytes() for path in whole.iterdir()}
    damaged = {key for key in before if key.startswith("rows")} - {"rows.sqlite-shm"}
    if name != "a damaged state":
        assert all(before[key] in there for key in damaged)  # the damaged files were set aside
    caplog.clear()
    fill(journal, N, N + 20)  # the journal still records
    journal.close()
    again = Journal(whole, predictors[0])
    assert again.status.rows == n_seen + 20
    assert caplog.text == ""


@pytest.mark.usefixtures("left_open")
def test_another_monitors_rows_do_not_fit(
    whole: Path, predictors: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    (whole / "monitor.parquet").unlink()
    journal = Journal(whole, predictors[1])
    assert "rows.sqlite is damaged or has lost rows" in caplog.text
    assert journal.status.rows == 0


def test_a_journal_of_another_version_is_refused(
    predictors: tuple[Path, Path], tmp_path: Path
) -> None:
    with closing(sqlite3.connect(tmp_path / "rows.sqlite")) as table:
        table.execute("CREATE TABLE rows (n INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE)")
    before = (tmp_path / "rows.sqlite").read_bytes()
    with pytest.raises(ProvenanceError, match=r"before vilu 0\.2\.0.*Serve with a new --state"):
        Journal(tmp_path, predictors[0])
    assert (tmp_path / "rows.sqlite").read_bytes() == before


def open_files_in(folder: Path) -> list[str]:
    return [file.path for file in psutil.Process().open_files() if folder.name in file.path]


def test_no_file_stays_open_if_one_of_two_journals_cannot_be_read(
    predictors: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main, second = predictors
    state = tmp_path / "state"
    folders = {"first": main, "second": second}
    with closing(LocalJournals(state, folders)):
        assert len(open_files_in(state)) >= 2

    take_in_rows = Journal._take_in_rows
    first_fingerprint = Monitor.of_folder(main).fingerprint

    def fail_for_the_second(journal: Journal) -> None:
        assert open_files_in(journal.folder)
        if journal.monitor.fingerprint != first_fingerprint:
            raise StorageError("cannot read the rows")
        take_in_rows(journal)

    monkeypatch.setattr(Journal, "_take_in_rows", fail_for_the_second)
    with pytest.raises(StorageError, match="cannot read the rows"):
        LocalJournals(state, folders)
    assert open_files_in(state) == []


def test_a_kill_between_two_writes_is_no_damage(
    predictors: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """If a kill falls between two writes, the journal must report no damage.

    The test copies the folder around every SQL statement and every write to another file, and opens
    each copy.
    """
    monkeypatch.setattr("vilu.service.journal.ROWS_BETWEEN_SAVES", 20)
    folder = tmp_path / "j"
    copies: list[Path] = []
    connect = sqlite3.connect
    write = os.pwrite

    def copy(*_: object) -> None:
        in_the_making = shutil.ignore_patterns("*.tmp")  # the saving thread writes these
        place = tmp_path / f"copy-{len(copies)}"
        copies.append(place)
        shutil.copytree(folder, place, ignore=in_the_making)

    def traced(*args: Any, **settings: Any) -> sqlite3.Connection:
        table = connect(*args, **settings)
        if "check_same_thread" in settings:
            table.set_trace_callback(copy)
        return table

    def copied(*args: Any) -> int:
        copy()
        done = write(*args)
        copy()
        return done

    monkeypatch.setattr(sqlite3, "connect", traced)
    monkeypatch.setattr(os, "pwrite", copied)
    journal = Journal(folder, predictors[0])
    fill(journal, 0, 30)
    journal.label(right_labels(journal, range(3)))
    journal.close()
    copy()
    monkeypatch.undo()
    assert len(copies) > 60
    seen: list[int] = []
    for number, place in enumerate(copies):
        if number % 2:
            (place / "rows.sqlite-shm").unlink(missing_ok=True)  # as after a reboot
        left = Journal(place, predictors[0])
        seen.append(left.status.rows)
        left.close()
    assert caplog.text == ""
    assert seen == sorted(seen)
    assert (seen[0], seen[-1]) == (0, 30)


@pytest.mark.usefixtures("left_open")
def test_rows_that_a_lost_log_of_sqlite_held_are_missed(
    predictors: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """If the write-ahead log is lost, the journal must report the missing rows.

    After a kill, rows may be in this log alone. Without the log, the database file looks whole.
    """
    journal = Journal(tmp_path / "j", predictors[0])
    fill(journal, 0, N)
    killed = shutil.copytree(tmp_path / "j", tmp_path / "killed")
    assert (killed / "rows.sqlite-wal").stat().st_size > 0
    (killed / "rows.sqlite-wal").unlink()
    again = Journal(killed, predictors[0])
    assert again.status.rows == 0
    assert "60 rows were noted, and 0 rows are intact" in caplog.text


@pytest.mark.usefixtures("left_open")
@pytest.mark.parametrize(
    "names", [("rows.sqlite",), ("rows.sqlite-wal",), ("rows.sqlite", "rows.sqlite-wal")]
)
def test_no_row_is_kept_where_the_file_is_gone(
    predictors: tuple[Path, Path], tmp_path: Path, names: tuple[str, ...]
) -> None:
    journal = Journal(tmp_path, predictors[0])
    fill(journal, 0, 10)
    assert not journal.is_lost
    for name in names:
        (tmp_path / name).unlink()
    assert journal.is_lost
    with pytest.raises(StorageError, match="was removed or replaced while it was in use"):
        fill(journal, 10, 20)
    assert journal.status.rows == 10


@pytest.mark.usefixtures("left_open")
def test_no_row_is_kept_where_the_file_goes_while_it_is_written(
    predictors: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path, predictors[0])
    number = RowFile.row_number

    def replaced(file: RowFile, key: str) -> int | None:
        shutil.copy(tmp_path / "rows.sqlite", tmp_path / "copy")
        (tmp_path / "copy").replace(tmp_path / "rows.sqlite")
        return number(file, key)

    monkeypatch.setattr(RowFile, "row_number", replaced)
    with pytest.raises(StorageError, match="was removed or replaced"):
        fill(journal, 0, 10)
    assert journal.status.rows == 0
