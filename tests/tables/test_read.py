"""Test which tables of answers are read, and which are refused with a clear message."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

import vilu
from vilu.errors import DataError, StorageError, UsageError


def written(folder: Path, text: str, encoding: str = "utf-8") -> Path:
    path = folder / "answers.csv"
    path.write_text(text, encoding=encoding)
    return path


def test_a_spreadsheets_csv_is_understood(tmp_path: Path) -> None:
    """A spreadsheet's CSV has a byte order mark, and empty columns on the right."""
    text = (
        "id,answer,score_p,uncertainty_h,correct,note,width,,\n"
        "7,cat,0.5,1e-3,1,mine,3,,\n"
        "8,,0.25,2,,yours,4,,\n"
    )
    table = vilu.open_table(written(tmp_path, text, "utf-8-sig"))
    assert table.ids == ("7", "8")
    assert table.answer == ("cat", "")
    assert table.correct.tolist() == [1, -1]
    assert table.failure.tolist() == [0, -1]
    assert {name: column.tolist() for name, column in table.numbers.items()} == {
        "score_p": [0.5, 0.25],
        "uncertainty_h": [1e-3, 2.0],
        "width": [3.0, 4.0],
    }
    assert table.roles["note"] == "not used"
    assert table.name == "answers"


def test_a_text_with_an_underscore_is_no_number(tmp_path: Path) -> None:
    text = "id,score_p,month\na,0.5,2024_01\nb,0.4,2024_02\n"
    table = vilu.open_table(written(tmp_path, text))
    assert list(table.numbers) == ["score_p"]
    assert table.unused == ("month",)
    with pytest.raises(DataError, match="Got '1_000' instead"):
        vilu.open_table(written(tmp_path, text.replace("0.5", "1_000")))


def test_decimals_of_a_database_are_numbers() -> None:
    prices = pa.array([Decimal("1.50"), Decimal("2.25")])
    table = vilu.open_table({"id": ["a", "b"], "score": [0.5, 0.4], "price": prices})
    assert table.numbers["price"].tolist() == [1.5, 2.25]


@pytest.mark.parametrize("separator", [";", "\t"])
def test_a_spreadsheet_may_write_semicolons_and_decimal_commas(
    tmp_path: Path, separator: str
) -> None:
    lines = [
        "id;answer;score_p;width;note;correct;;",
        "1,5;a,b;0,5;3;1,5 or so;1;;",
        "2;c;-1,25e-1;4,5;;;;",
    ]
    text = "\r\n".join(lines).replace(";", separator)
    table = vilu.open_table(written(tmp_path, text, "utf-8-sig"))
    assert table.ids == ("1,5", "2")
    assert table.answer == ("a,b", "c")
    assert table.numbers["score_p"].tolist() == [0.5, -0.125]
    assert table.numbers["width"].tolist() == [3, 4.5]
    assert table.correct.tolist() == [1, -1]
    assert table.unused == ("note",)
    with_points = (
        text.replace(";0,5", ";0.5")
        .replace("\t0,5", "\t0.5")
        .replace("-1,25e-1", "-0.125")
        .replace("4,5", "4.5")
    )
    assert vilu.open_table(written(tmp_path, with_points)).fingerprint == table.fingerprint


@pytest.mark.parametrize("separator", [";", "\t"])
def test_commas_that_may_stand_for_thousands_are_refused(tmp_path: Path, separator: str) -> None:
    text = "id;score_tokens;correct\na;1,234;1\nb;999;0\n".replace(";", separator)
    with pytest.raises(DataError, match="1,234"):
        vilu.open_table(written(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "id,score\n1,2\n2,3\n1,4\n",
            "'1' is the id of the rows 1 and 3. Number of ids that repeat: 1",
        ),
        ("id,score,score\n1,2,3\n", "Repeated: score"),
        ("id,score,correct\na,2,1\nb,2,yes\n", r"row 2 \(id 'b'\): correct must be 1"),
        ("id,score\na,1\nb,nan\n", r"row 2 \(id 'b'\): the number in score is missing"),
        ("id,score\na,\n", "the number in score is missing"),
        ("id,score\na,inf\n", "the number in score is inf"),
        ('id,score\na,"0,5"\n', "score must hold numbers, such as 0.95. Got '0,5'"),
        ("id;score\n1;0,5\n2;1.234,5\n", "score must hold numbers, such as 0.95. Got '0,5'"),
        ("id;note\n1;0,5 or so\n", "no number that says how sure"),
        ("id,Score\n1,2\n", "Write 'score' if it is meant"),
        ("id,score p\n1,2\n", "Write 'score_p' if it is meant"),
        ("id,score,corect\n1,2,1\n", "Did you mean 'correct'"),
        ("ids,score\n1,2\n", "Did you mean 'id'"),
        ("key,score\n1,2\n", "must have a column id"),
        ("id,who\n1,me\n", "no number that says how sure"),
        ("id,score\n", "has no row"),
        ("id,score\n,2\n", "row 1: id is empty. Fill it, or remove the row"),
        ("id,score,cluster\na,2,\n", r"row 1 \(id 'a'\): cluster is empty"),
        ("id,score\n1,2,3\n", "Expected 2 columns, got 3"),
        ("", "Empty CSV file"),
    ],
)
def test_a_wrong_table_is_refused_in_words(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        vilu.open_table(written(tmp_path, text))


def columns() -> dict[str, Any]:
    return {
        "id": ["a", "b"],
        "score_p": [0.5, 0.25],
        "correct": [True, None],
        "features": [[1.0, 2.0], [3.0, 4.0]],
    }


class Frame:
    """A data frame as polars has it: named columns and a stream for Arrow."""

    def __init__(self, table: pa.Table) -> None:
        self.columns = table.column_names
        self._table = table

    def __arrow_c_stream__(self, schema: object = None) -> object:
        return self._table.__arrow_c_stream__(schema)


def test_every_kind_of_source_gives_the_same_table(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    arrow = pa.table(columns())
    parquet = tmp_path / "answers.parquet"
    pyarrow.parquet.write_table(arrow, parquet)
    text = written(tmp_path, "id,score_p,correct\na,0.5,1\nb,0.25,\n")
    np.save(tmp_path / "answers.features.npy", np.array(columns()["features"]))
    parquet_alone = tmp_path / "alone" / "answers.parquet"
    parquet_alone.parent.mkdir()
    parquet.rename(parquet_alone)
    arrays = {**columns(), "features": np.array(columns()["features"])}
    sources = [columns(), arrays, arrow, Frame(arrow), pandas.DataFrame(columns())]
    tables = [vilu.open_table(source) for source in [*sources, parquet_alone, text]]
    assert {table.fingerprint for table in tables} == {tables[0].fingerprint}
    assert tables[0].features.tolist() == [[1, 2], [3, 4]]


def test_categories_are_texts() -> None:
    categories = pa.array(["x", "y"]).dictionary_encode()
    table = vilu.open_table(pa.table({"id": ["a", "b"], "score": [1, 2], "cluster": categories}))
    assert table.cluster == ("x", "y")


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    parquet = tmp_path / "answers.parquet"
    pyarrow.parquet.write_table(pa.table({"id": ["a"] * 100, "score": [1.0] * 100}), parquet)
    parquet.write_bytes(parquet.read_bytes()[:200])
    with pytest.raises(DataError, match="is not a readable parquet table"):
        vilu.open_table(parquet)
    path = tmp_path / "answers.csv"
    for content in (b"id,score\nM\xfcller,1\n", "id,score\n1,2\n".encode("utf-16")):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"is not in UTF-8\. Save it as CSV UTF-8"):
            vilu.open_table(path)
    path.write_text('id,score,"' + "x" * 200_000 + '"\n')
    with pytest.raises(DataError, match="is not a readable csv table: field larger"):
        vilu.open_table(path)


def test_features_are_checked(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"row 2 \(id 'b'\): a number in features"):
        vilu.open_table({**columns(), "features": [[1.0, 2.0], [3.0, np.nan]]})
    with pytest.raises(DataError, match="one vector per row, all of one length"):
        vilu.open_table({**columns(), "features": [[1.0, 2.0], [3.0]]})
    with pytest.raises(DataError, match=r"shape \(2, F\)"):
        vilu.open_table({**columns(), "features": np.ones((3, 2))})
    path = written(tmp_path, "id,score\n1,2\n")
    np.save(tmp_path / "answers.features.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(DataError, match="no readable"):
        vilu.open_table(path)


def test_other_wrong_sources_are_refused(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    with pytest.raises(UsageError, match="Got 3 instead"):
        vilu.open_table(3)
    with pytest.raises(StorageError, match="is no file"):
        vilu.open_table(tmp_path / "none.csv")
    path = tmp_path / "answers.txt"
    path.write_text("id,score\n1,2\n")
    with pytest.raises(UsageError, match=r"a table is a \.parquet or a \.csv file"):
        vilu.open_table(path)
    with pytest.raises(DataError, match="one length"):
        vilu.open_table({"id": [1, 2], "score": [1]})
    frame = pandas.DataFrame([[1, 2, 3]], columns=["id", "score", "score"])
    with pytest.raises(DataError, match="Repeated: score"):
        vilu.open_table(frame)


def test_some_rows_are_a_table_of_their_own() -> None:
    table = vilu.open_table({**columns(), "answer": ["x", "y"], "cluster": [1, 2]})
    second = table[np.array([False, True])]
    assert second.ids == ("b",)
    assert second.answer == ("y",)
    assert second.cluster == ("2",)
    assert second.numbers["score_p"].tolist() == [0.25]
    assert second.features.tolist() == [[3, 4]]
    assert second.fingerprint != table.fingerprint
    with pytest.raises(UsageError, match="has rows only"):
        table.take([0], classes=[0])


def test_time_to_read_grows_with_the_number_of_columns() -> None:
    def seconds(n_columns: int) -> float:
        content: dict[str, list[Any]] = {f"column{place}": [0.5] for place in range(n_columns)}
        begun = process_time()
        vilu.open_table({**content, "id": ["a"]})
        return process_time() - begun

    seconds(10)  # imports the modules that it needs
    few = min(seconds(2_000) for _ in range(3))  # the least, because others share the machine
    many = min(seconds(16_000) for _ in range(3))
    # 8 times as many columns, and 64 times if the time grew as their square
    assert many < 24 * few
