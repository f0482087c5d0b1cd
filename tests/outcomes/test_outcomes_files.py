"""Test that outcome files from other programs, or damaged ones, give a clear message and error."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vilu.artifacts.tables import table_digest
from vilu.errors import DataError, ProvenanceError, StorageError, UsageError
from vilu.outcomes.outcomes import Outcomes

HOSTILE = {
    "empty file": (b"", "not a readable csv"),
    "binary": (b"\x00\x01\x02\xff" * 50, "a.csv"),
    "not utf-8": (b"uncertainty,failure,key\n0.5,1,\xff\xfe\n", "not a readable csv"),
    "header not utf-8": (b"\x80\r", "names of its columns are not"),
    "older decision": (
        b"uncertainty,failure,decision\n0.5,1,abstain\n",
        "accept or review .* Got 'abstain' .* `vilu score`",
    ),
    "ragged": (b"uncertainty,failure\n0.5,1,2\n", "Expected 2 columns, got 3"),
    "open quote": (b'uncertainty,failure\n"0.5,1\n', "not a readable csv"),
    "wrong header": (
        b"score,correct\n0.5,1\n",
        "Missing: uncertainty, failure; it has score, correct",
    ),
    "half header": (b"uncertainty,correct\n0.5,1\n", "Missing: failure"),
    "semicolons": (b"uncertainty;failure\n0.5;1\n", "it has uncertainty;failure"),
    "repeated": (
        b"uncertainty,failure,failure\n0.5,1,1\n",
        "line 1: distinct columns are needed. Repeated: failure",
    ),
    "text score": (b"uncertainty,failure\nhigh,1\n", "column 'uncertainty' .* must hold float64"),
    "date score": (b"uncertainty,failure\n2020-01-01,1\n", "column 'uncertainty'"),
    "comma decimals": (b'uncertainty,failure\n"0,5",1\n', "column 'uncertainty'"),
    "half failure": (b"uncertainty,failure\n0.5,0.5\n", "column 'failure'"),
    "failure 2": (b"uncertainty,failure\n0.5,2\n", "Got 2 in row 0"),
    "no score": (
        b"uncertainty,failure\n,1\n0.2,1\n",
        "Got 1 rows with neither, the first is row 0",
    ),
    "nan score": (b"uncertainty,failure\nnan,1\n", "row 0"),
    "infinite score": (b"uncertainty,failure\ninf,1\n", "infinite"),
    "huge class": (b"uncertainty,failure,pred\n0.5,1,99999999999999999999\n", "column 'pred'"),
    "fraction class": (b"uncertainty,failure,pred\n0.5,1,1.5\n", "column 'pred'"),
    "missing key": (
        b"uncertainty,failure,key\n0.5,1,a\n0.5,1,\n",
        "ids must hold texts. Got None in row 1",
    ),
}


@pytest.mark.parametrize(("content", "message"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_csv(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        Outcomes.load(tmp_path / "a.csv")


@given(st.binary(max_size=80))
def test_any_bytes_are_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    folder = tmp_path_factory.mktemp("hostile")
    for name in ("a.csv", "a.parquet"):
        (folder / name).write_bytes(
            content if name.endswith("csv") else b"PAR1" + content + b"PAR1"
        )
        with pytest.raises(DataError):
            Outcomes.load(folder / name)


def parquet(path: Path, metadata: bytes) -> None:
    """Write a table with these metadata. If the metadata are an object, add its digest."""
    table = pa.table({"uncertainty": [0.1], "failure": [1], "key": ["a"]})
    if metadata.startswith(b'{"'):
        content = json.loads(metadata)
        content["digest"] = table_digest(table, content)
        metadata = json.dumps(content).encode()
    pq.write_table(table.replace_schema_metadata({b"vilu": metadata}), path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (b"\xff\xfe", "metadata are not JSON of ours"),
        (b"{", "metadata are not JSON of ours"),
        (b"[1]", "holds no object, but list"),
        (b'{"schema_version": 2, "class_names": 5}', "class_names must be a list"),
        (b'{"schema_version": 2, "class_names": [5]}', "Got 5 in row 0"),
        (b'{"schema_version": 2, "provenance": "x"}', "provenance must be"),
        (b'{"schema_version": 2, "seed": 1.5}', "seed must be"),
        (b'{"schema_version": 2, "is_probability": "yes"}', "is_probability must be"),
    ],
)
def test_hostile_parquet_metadata(tmp_path: Path, metadata: bytes, message: str) -> None:
    parquet(tmp_path / "a.parquet", metadata)
    with pytest.raises(DataError, match=message):
        Outcomes.load(tmp_path / "a.parquet")


def test_metadata_that_does_not_say_which_columns_are_present(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", b'{"schema_version": 2, "present": 7, "unheard": 1}')
    assert Outcomes.load(tmp_path / "a.parquet").ids == ("a",)


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", b'{"schema_version": 3}')
    with pytest.raises(ProvenanceError, match="schema version 3, this vilu reads 2"):
        Outcomes.load(tmp_path / "a.parquet")


def test_a_parquet_file_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    Outcomes([0.1, 0.2], [0, 1]).save(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="not a readable parquet table"):
        Outcomes.load(path)


def test_folders_and_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"none\.csv does not exist"):
        Outcomes.load(tmp_path / "none.csv")
    with pytest.raises(UsageError, match=r"cannot write .*none"):
        Outcomes([0.1], [0]).save(tmp_path / "none" / "a.csv")


def test_other_suffixes_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\.parquet or \.csv file. Got 'a.xlsx'"):
        Outcomes([0.1], [0]).save(tmp_path / "a.xlsx")
    with pytest.raises(UsageError, match="Got 'a'"):
        Outcomes.load(tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_ids_that_are_not_unicode_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    outcomes = Outcomes([0.1], [0], ids=["bad\udcff"])
    for name in ("a.csv", "a.parquet"):
        with pytest.raises(DataError, match="valid Unicode"):
            outcomes.save(tmp_path / name)
    assert not list(tmp_path.iterdir())
