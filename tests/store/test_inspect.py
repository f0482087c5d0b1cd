"""``inspect``: its counts, and every kind of damage that it must find."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.builders.store_fakes import NAMES, FakeBackbone, dataset
from vilu.artifacts.disk import file_hash
from vilu.artifacts.documents import write_json
from vilu.errors import DataError, StorageError
from vilu.store.embed import embed
from vilu.store.inspect import inspect

BAD = {3: b"", 14: b"x", 15: b"y"}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    root = tmp_path_factory.mktemp("store") / "s"
    embed(dataset(23, bad=BAD), FakeBackbone(), root, names=NAMES, part_size=10, max_error_rate=1)
    return root


@pytest.fixture
def root(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "s"))


def vouch(root, name, part=0):
    """Make a part's receipt agree with a changed file, so that only the seal disagrees."""
    path = root / f"receipts/{part:05d}.json"
    receipt = json.loads(path.read_text())
    receipt["files"][name] = {
        "bytes": (root / name).stat().st_size,
        "sha256": file_hash(root / name),
    }
    write_json(path, receipt)


@pytest.mark.parametrize("deep", [False, True])
def test_a_sound_store(original, deep):
    report = inspect(original, deep=deep)
    assert (report.store, report.sealed, report.deep, report.problems) == ("s", True, deep, [])
    assert (report.parts, report.parts_done, report.n_in, report.n_ok, report.n_error) == (
        3,
        3,
        23,
        20,
        3,
    )
    assert report.errors == {"empty": 1, "unidentified": 2}
    files = [
        path
        for folder in ("img_emb", "metadata", "errors")
        for path in (original / folder).iterdir()
    ]
    assert report.bytes == sum(path.stat().st_size for path in files)
    plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert plain["run"]["space"]["backbone"] == "fake"
    assert plain["run"]["names"] == list(NAMES)
    assert plain["errors"] == {"empty": 1, "unidentified": 2}


def test_in_words(original, root):
    text = str(inspect(original))
    for words in (
        "s, complete",
        "23 of 23 in 3 of 3 parts",
        "20 x 16 float16",
        "3 (unidentified 2, empty 1)",
        "pets",
    ):
        assert words in text
    assert text.endswith("none; --deep reads every byte")
    (root / "manifest.json").unlink()
    (root / "receipts/00001.json").write_text("{}")
    text = str(inspect(root, deep=True))
    assert "not complete" in text
    assert text.rsplit("problems")[1].count("\n  - ") == 1


@pytest.mark.parametrize("deep", [False, True])
def test_a_store_in_the_making(root, deep):
    (root / "manifest.json").unlink()
    (root / "receipts/00001.json").unlink()
    report = inspect(root, deep=deep)
    assert (report.sealed, report.parts, report.parts_done, report.n_in, report.problems) == (
        False,
        3,
        2,
        13,
        [],
    )


def test_a_sealed_store_with_a_part_missing(root):
    (root / "receipts/00001.json").unlink()
    (problem,) = inspect(root).problems
    assert "receipts/00001.json is missing" in problem


@pytest.mark.parametrize(
    "name",
    [
        "img_emb/img_emb_00001.npy",
        "metadata/metadata_00000.parquet",
        "errors/errors_00001.parquet",
        "text_emb/classes.npy",
    ],
)
@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_every_tampered_byte_is_found(root, name, place):
    content = bytearray((root / name).read_bytes())
    content[round(place * (len(content) - 1))] ^= 1
    (root / name).write_bytes(content)
    assert any(name in problem for problem in inspect(root, deep=True).problems)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf, 3.0])
def test_rows_that_are_not_of_unit_norm(root, value):
    name = "img_emb/img_emb_00000.npy"
    rows = np.load(root / name)
    rows[4] = value
    np.save(root / name, rows)
    vouch(root, name)
    problems = inspect(root, deep=True).problems
    assert len(problems) == 1
    assert "1 rows from 0 to 8 that are not of unit norm" in problems[0]


def with_column(name, values):
    def change(table):
        index = table.schema.get_field_index(name)
        column = pa.array(
            [values.get(i, value) for i, value in enumerate(table[name].to_pylist())],
            table.schema.field(index).type,
        )
        return table.set_column(index, table.schema.field(index), column)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_column("position", {4: 3}), "does not hold every image from 0 to 9 once"),
        (with_column("position", {4: 6, 5: 5}), "not in the order"),
        (with_column("label", {4: 3}), "labels from 0 to 3 for 3 classes"),
        (with_column("key", {4: "img/0000.png"}), "keys more than once"),
    ],
)
def test_metadata_that_do_not_add_up(root, change, message):
    name = "metadata/metadata_00000.parquet"
    pq.write_table(change(pq.read_table(root / name)), root / name)
    vouch(root, name)
    problems = inspect(root, deep=True).problems
    assert len(problems) == 1
    assert message in problems[0]


def test_errors_of_other_kinds_than_counted(root):
    name = "errors/errors_00001.parquet"
    pq.write_table(with_column("kind", {0: "truncated"})(pq.read_table(root / name)), root / name)
    vouch(root, name, part=1)
    (problem,) = inspect(root, deep=True).problems
    assert "other kinds of errors" in problem


def test_what_is_no_store(tmp_path, root):
    with pytest.raises(DataError, match="no embedding store"):
        inspect(tmp_path)
    write_json(root / "run.json", {})
    with pytest.raises(StorageError, match=r"run\.json is damaged"):
        inspect(root)
