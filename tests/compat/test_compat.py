"""Test that artefacts from 0.2.0 are read with equal numbers, and that older ones are refused in
words.

``python -m tests.compat.write`` makes the kept artefacts and their numbers.
"""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

import vilu
from tests.command import command_line
from tests.compat.artefacts import DATA, METHODS, NUMBERS, numbers, unpack
from vilu.artifacts.documents import SCHEMA_KEY, without_version, write_json
from vilu.artifacts.tables import read_table, write_table
from vilu.errors import ProvenanceError
from vilu.service.rows import RowFile
from vilu.triage.labels import LabelBook


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the artefacts, only to be read."""
    return unpack(tmp_path_factory.mktemp("compat"))


@pytest.fixture
def copied(kept: Path, tmp_path: Path) -> Path:
    """Return a copy of the artefacts, which a test may change."""
    return Path(shutil.copytree(kept, tmp_path / "copy"))


def require_near(found: object, expected: object, where: str) -> None:
    """Require equal JSON. Numbers with a fraction may differ by rounding."""
    if isinstance(expected, dict):
        assert isinstance(found, dict), where
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            require_near(found[key], value, f"{where}/{key}")
    elif isinstance(expected, list):
        assert isinstance(found, list | tuple), where
        assert len(found) == len(expected), where
        for number, value in enumerate(expected):
            require_near(found[number], value, f"{where}/{number}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-5), where
    else:
        assert found == expected, where


def test_every_artefact_gives_its_numbers(kept: Path) -> None:
    expected = json.loads(NUMBERS.read_text(encoding="utf-8"))
    require_near(numbers(kept), expected, "")


KIND = re.compile(r"""(?:"kind": |\bkind: Literal\[.*\] = |\bKIND: Final = )"([a-z ]+)\"""")
"""Pattern for the kind in source code that writes a document or a table."""

MADE_AGAIN = {"photos"}
"""Kinds that no user keeps: the list of photos beside a triage's embeddings."""


def kind_of(path: Path) -> object:
    """Return the kind that a document or a table states."""
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8")).get("kind")
    return read_table(path, ())[1].get("kind")


def test_an_artefact_of_every_kind_is_kept(kept: Path) -> None:
    source = Path(vilu.__file__).parents[1]
    stated = {kind for path in source.rglob("*.py") for kind in KIND.findall(path.read_text())}
    assert len(stated) > 15
    files = [path for path in kept.rglob("*") if path.suffix in {".json", ".parquet"}]
    kinds = {kind_of(path) for path in files}
    assert stated - kinds == MADE_AGAIN


def test_every_artefact_is_whole(kept: Path) -> None:
    for path in sorted(kept.iterdir()):
        if path.suffix == ".csv" or path.name in {"predictors", "served"}:
            continue
        done = command_line("inspect", path, "--deep")
        assert done.returncode == 0, done.stderr


def test_a_kept_predictor_is_saved_as_it_was(kept: Path, tmp_path: Path) -> None:
    for name in METHODS:
        before = kept / "predictors" / name
        now = tmp_path / name
        vilu.load(before).save(now)
        weights = "weights.safetensors"
        assert (now / weights).read_bytes() == (before / weights).read_bytes(), name
        assert description_of(now) == description_of(before), name


def description_of(folder: Path) -> dict[str, object]:
    """Return a predictor's document, without vilu's version and without the digest over it."""
    document = json.loads((folder / "predictor.json").read_text(encoding="utf-8"))
    return without_version(document, "fingerprint")


def lower(path: Path) -> None:
    """Give an artefact the schema number that older artefacts have."""
    if path.suffix == ".json":
        seal = "fingerprint" if path.name == "predictor.json" else "digest"
        write_json(path, {**json.loads(path.read_text()), SCHEMA_KEY: 1}, digest_key=seal)
        return
    table, metadata = read_table(path, ())
    columns = {name: table[name] for name in table.column_names}
    write_table(path, columns, {**metadata, SCHEMA_KEY: 1})


LOWERED: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("new/run.json", ("inspect", "new"), "`vilu embed`"),
    ("new/manifest.json", ("score", "calibrated", "new", "-o", "x.csv"), "`vilu embed`"),
    ("new/classes.json", ("score", "calibrated", "new", "-o", "x.csv"), "`vilu embed`"),
    ("new/receipts/00000.json", ("score", "calibrated", "new", "-o", "x.csv"), "`vilu embed`"),
    ("calibrated/predictor.json", ("score", "calibrated", "new", "-o", "x.csv"), "`vilu fit`"),
    ("calibrated/risk.json", ("score", "calibrated", "new", "-o", "x.csv"), "`vilu calibrate`"),
    (
        "calibrated/looks.json",
        ("calibrate", "calibrated", "calibration", "--max-risk", "0.5", "--overwrite"),
        "`vilu calibrate`",
    ),
    ("scores.parquet", ("evaluate", "scores.parquet"), "`vilu score`"),
    ("scores/run.json", ("evaluate", "scores"), "`vilu score`"),
    ("scores/manifest.json", ("evaluate", "scores"), "`vilu score`"),
    ("results.json", ("inspect", "results.json"), ""),
    ("results.parquet", ("inspect", "results.parquet"), "`vilu evaluate`"),
    ("why.json", ("inspect", "why.json"), ""),
    ("monitored.json", ("inspect", "monitored.json"), ""),
    (
        "state.parquet",
        ("monitor", "calibrated", "scores.parquet", "--state", "state.parquet"),
        "Begin a new monitor",
    ),
    ("triage/triage.json", ("review", "triage", "-o", "tasks.json"), "`vilu triage`"),
    ("study/studies/study/study.json", ("render", "study", "--document", "x.md"), ""),
)
"""A file, the command that reads it, and the named way to make it again."""


@pytest.mark.parametrize(("file", "command", "again"), LOWERED, ids=[case[0] for case in LOWERED])
def test_what_was_made_before_is_refused(
    copied: Path, file: str, command: tuple[str, ...], again: str
) -> None:
    lower(copied / file)
    done = command_line(*command, cwd=copied)
    assert done.returncode == ProvenanceError.exit_code, done.stderr
    assert f"{file} was made before vilu 0.2.0 (schema 1)." in done.stderr
    assert again in done.stderr


def test_a_cell_that_was_made_before_is_refused(copied: Path) -> None:
    cell = next((copied / "study" / "cells").rglob("*.json"))
    lower(cell)
    done = command_line("render", "study", "--document", "x.md", cwd=copied)
    assert done.returncode == ProvenanceError.exit_code, done.stderr
    assert f"{cell.name} was made before vilu 0.2.0 (schema 1)" in done.stderr


def test_a_journal_that_was_made_before_is_refused(tmp_path: Path) -> None:
    RowFile(tmp_path, "monitor").close()
    with closing(sqlite3.connect(tmp_path / "rows.sqlite")) as table:
        table.execute("PRAGMA user_version = 1")
    with pytest.raises(ProvenanceError, match=r"before vilu 0\.2\.0 \(schema 1\)\. Serve with"):
        RowFile(tmp_path, "monitor")


def test_a_book_of_labels_stays_readable() -> None:
    """Books of labels from before 0.2.0 must stay readable.

    One book is from the first code that wrote books. The other is from the last code before 0.2.0,
    which noted pictures.
    """
    for name, picture in (("first", ""), ("last", "0101010101010101")):
        book = LabelBook.load(DATA / f"labels-0.1.0-{name}.parquet")
        assert book.labels == {"a.jpg": "dress", "b.jpg": "hat"}
        assert [entry.path for entry in book.waiting_entries()] == ["caf\\xe9.jpg", "c.jpg"]
        assert [entry.stream for entry in book] == [
            "fit",
            "fit",
            "calibration",
            "calibration",
            "given",
        ]
        assert book.entries["a.jpg"].picture == picture
        assert book.entries["b.jpg"].probability == 0.25


def test_a_book_that_is_saved_again_has_the_number_of_today(tmp_path: Path) -> None:
    book = LabelBook.load(DATA / "labels-0.1.0-first.parquet")
    book.save(tmp_path / "labels.parquet")
    assert LabelBook.load(tmp_path / "labels.parquet").labels == book.labels
    assert read_table(tmp_path / "labels.parquet", ())[1] == {"kind": "labels"}


def test_what_is_kept_stays_small() -> None:
    sizes = {path.name: path.stat().st_size for path in DATA.iterdir()}
    assert sum(sizes.values()) < 400_000, sizes
