from __future__ import annotations

import csv
import json
import math
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vilu.errors import OUTSIDE, DataError
from vilu.outcomes.outcomes import Outcomes

FIELDS = tuple(field.name for field in fields(Outcomes))


def full() -> Outcomes:
    return Outcomes(
        uncertainty=[0.1 + 0.2, math.nan, 1e-300, 0.5],
        failure=[0, 1, -1, 1],
        prediction=[0, -1, 1, 1],
        target=[0, 1, -1, 0],
        ids=["cat/1.png", '=HYPERLINK("x")', "naïve 猫, 2.png", "line\nbreak"],
        class_names=["-cat", "dog, wild"],
        method="mcm",
        dataset="pets",
        split="test",
        seed=3,
        reason=[None, "nonfinite", None, None],
        provenance={
            "predictor": "ab12",
            "n_candidates": 2,
            "nested": {"pool_size": None, "prompts": ["a {}"]},
        },
        is_probability=True,
    )


def assert_equal(a: Outcomes, b: Outcomes, fields: tuple[str, ...] = FIELDS) -> None:
    for name in fields:
        x, y = getattr(a, name), getattr(b, name)
        if isinstance(x, np.ndarray):
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y, err_msg=name)
        else:
            assert x == y, name


def test_uncertainty_and_failure_are_enough() -> None:
    outcomes = Outcomes(np.float32([0.25, 0.5]), [True, False])
    assert outcomes.uncertainty.dtype == np.float64
    assert outcomes.failure.dtype == np.int64
    assert outcomes.failure.tolist() == [1, 0]
    assert len(outcomes) == 2
    assert outcomes.ids is None
    assert not outcomes.is_probability


def test_rows_to_evaluate_have_both_a_score_and_a_label() -> None:
    assert full().evaluable.tolist() == [True, False, False, True]


def test_repr_does_not_spell_out_the_rows() -> None:
    assert "png" not in repr(full())
    assert "method='mcm'" in repr(full())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"uncertainty": [1.0]}, r"failure must have one entry per uncertainty \(1\). Got 4"),
        ({"uncertainty": [[0.1]] * 4}, r"shape \(4, 1\)"),
        ({"uncertainty": ["a"] * 4}, "real numbers"),
        (
            {"uncertainty": [0.1, math.nan, 0.3, math.nan]},
            r"Got 1 rows with neither, the first is row 3",
        ),
        ({"uncertainty": [0.1, math.inf, 0.3, 0.1]}, "Got 1 infinite"),
        ({"uncertainty": [0.1, 0.2, 0.3, 1.5]}, r"in \[0, 1\]. Got 0.1 to 1.5"),
        ({"reason": None}, "the first is row 1"),
        ({"reason": [None, "", None, None]}, "the first is row 1"),
        ({"reason": [None, 5, None, None]}, "reason must hold texts. Got 5 in row 1"),
        ({"ids": {"a", "b", "c", "d"}}, "ids must be a list of texts. Got set"),
        ({"class_names": {"cat": 0, "dog": 1}}, "class_names must be a list of texts. Got dict"),
        ({"reason": "nonfinite"}, "reason must be a list of texts. Got str"),
        ({"decision": ["accept", "review", "accept", "maybe"]}, "Got 'maybe' instead"),
        (
            {"failure": [0, 1, -2, 1]},
            r"failure must hold whole numbers from -1 \(unknown\) to 1. Got -2 in row 2",
        ),
        ({"failure": [0, 1, 0.5, 1]}, "Got 0.5 in row 2"),
        ({"failure": [0, 1, math.nan, 1]}, "Got nan in row 2"),
        (
            {"prediction": [0, 1, 2, 0]},
            "prediction must hold whole numbers from -1 .* to 1. Got 2 in row 2",
        ),
        ({"target": [0, 1, -3, 0]}, "target .* Got -3 in row 2"),
        ({"target": [0, 1]}, "target must have one entry per uncertainty"),
        ({"ids": ["a"]}, "ids must have one entry per uncertainty"),
        ({"ids": [1, 2, 3, 4]}, "ids must hold texts. Got 1 in row 0"),
        ({"ids": "abcd"}, "list of texts"),
        ({"class_names": 5}, "class_names must be a list of texts. Got int"),
        ({"method": 5}, "method must be .*. Got 5"),
        ({"seed": "0"}, "seed must be .*int.*. Got '0'"),
        ({"provenance": []}, r"provenance must be .*. Got \[\]"),
        ({"provenance": {"a": object()}}, "plain JSON"),
        ({"provenance": {"a": math.nan}}, "plain JSON"),
        ({"is_probability": 1}, "is_probability must be .*. Got 1"),
        ({"picture": [1, 2, 3]}, r"picture must have one entry per uncertainty \(4\). Got 3"),
        ({"picture": [0.0, 1, 2, 3]}, "picture must hold whole numbers.* Got dtype float64"),
        ({"picture": ["a", "b", "c", "d"]}, "picture must hold real numbers"),
        ({"picture": [0, 1, 2, -2]}, "picture must be from 0 to .* Got -2 to 2 instead"),
        ({"picture": np.uint64([0, 1, 2, 2**63])}, f"Got 0 to {2**63} instead"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, object], message: str) -> None:
    fields = {name: getattr(full(), name) for name in FIELDS}
    with pytest.raises(DataError, match=message):
        Outcomes(**{**fields, **change})


def test_parquet_gives_back_exactly_what_was_saved(tmp_path: Path) -> None:
    full().save(tmp_path / "a.parquet")
    assert_equal(Outcomes.load(tmp_path / "a.parquet"), full())


@pytest.mark.parametrize(
    "outcomes",
    [
        Outcomes([], []),
        Outcomes([0.1], [-1]),
        Outcomes([0.1, 0.2], [0, 1], prediction=[-1, -1], target=[-1, -1], reason=[None, None]),
        Outcomes([math.nan], [-1], reason=["k<2"], ids=[""]),
        Outcomes([-5.0, 7.0], [0, 1], prediction=[10**6, 0]),
    ],
)
def test_parquet_tells_absent_from_unknown(tmp_path: Path, outcomes: Outcomes) -> None:
    outcomes.save(tmp_path / "a.parquet")
    assert_equal(Outcomes.load(tmp_path / "a.parquet"), outcomes)


def test_parquet_columns_are_typed_and_null_where_unknown(tmp_path: Path) -> None:
    full().save(tmp_path / "a.parquet")
    table = pq.read_table(tmp_path / "a.parquet")
    assert {
        name: str(kind) for name, kind in zip(table.column_names, table.schema.types, strict=True)
    } == {
        "row_id": "int64",
        "key": "string",
        "pred": "int32",
        "pred_name": "string",
        "label": "int32",
        "label_name": "string",
        "uncertainty": "double",
        "failure": "int8",
        "reason": "string",
        "score_name": "string",
        "answer": "string",
    }
    rows = table.to_pylist()
    assert rows[1] == {
        "row_id": 1,
        "key": '=HYPERLINK("x")',
        "pred": None,
        "pred_name": None,
        "label": 1,
        "label_name": "dog, wild",
        "uncertainty": None,
        "failure": 1,
        "reason": "nonfinite",
        "score_name": "mcm",
        "answer": "zero_shot",
    }
    assert rows[2]["failure"] is None
    assert rows[2]["label"] is None
    assert json.loads(table.schema.metadata[b"vilu"])["provenance"] == full().provenance


def test_csv_is_plain_and_spreadsheets_run_nothing_in_it(tmp_path: Path) -> None:
    full().save(tmp_path / "a.csv")
    raw = (tmp_path / "a.csv").read_bytes()
    assert b"\r" not in raw
    header = (
        b"row_id,key,pred,pred_name,label,label_name,uncertainty,failure,reason,score_name,answer"
    )
    assert raw.splitlines()[0] == header
    rows = list(csv.DictReader(raw.decode("utf-8").splitlines(keepends=True)))
    assert rows[0]["uncertainty"] == "0.30000000000000004"
    assert rows[1]["key"] == '\'=HYPERLINK("x")'
    assert rows[1]["uncertainty"] == rows[1]["pred"] == rows[2]["failure"] == ""
    assert rows[0]["pred_name"] == "'-cat"
    assert rows[2]["key"] == "naïve 猫, 2.png"
    assert rows[3]["key"] == "line\nbreak"


def test_csv_keeps_what_its_columns_hold(tmp_path: Path) -> None:
    full().save(tmp_path / "a.csv")
    loaded = Outcomes.load(tmp_path / "a.csv")
    assert_equal(
        loaded,
        full(),
        ("uncertainty", "failure", "prediction", "target", "ids", "reason", "method"),
    )
    assert loaded.class_names is None
    assert loaded.provenance == {}


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=6) | st.sampled_from(
    [
        "=1",
        "'=1",
        "''+1",
        "-",
        "@x",
        "\t=",
        "\r",
        '"',
        ",",
        "NaN",
        "null",
        "1",
        " 1",
        "",
        "true",
        "2020-01-01",
    ]
)


@given(st.lists(texts, min_size=1, max_size=5), st.floats(allow_nan=False, allow_infinity=False))
def test_text_and_numbers_survive_both_formats(
    tmp_path_factory: pytest.TempPathFactory, ids, value: float
) -> None:
    folder = tmp_path_factory.mktemp("outcomes")
    outcomes = Outcomes([value] * len(ids), [0] * len(ids), ids=ids)
    for name in ("a.parquet", "a.csv"):
        outcomes.save(folder / name)
        loaded = Outcomes.load(folder / name)
        np.testing.assert_array_equal(loaded.uncertainty, outcomes.uncertainty)
        assert loaded.ids == outcomes.ids


def test_a_csv_of_several_megabytes_may_have_line_breaks_in_its_text(tmp_path: Path) -> None:
    # The reader cuts a file into blocks of one megabyte. A cut inside a text must not end the row.
    n = 7000
    ids = ["\n".join(f"{row} {line}" for line in range(50)) for row in range(n)]
    Outcomes(np.arange(n), np.zeros(n), ids=ids).save(tmp_path / "a.csv")
    assert (tmp_path / "a.csv").stat().st_size > 2 * 2**20
    assert Outcomes.load(tmp_path / "a.csv").ids == tuple(ids)


@pytest.mark.parametrize(
    "content",
    [
        b"uncertainty,failure\n0.5,1\n-1e3,0\n,0\n".replace(b",0\n,0", b",0\n7,"),
        b"\xef\xbb\xbfuncertainty,failure\r\n0.5,1\r\n-1000,0\r\n7.0,\r\n",
        b"other,failure,uncertainty\nx,1,.5\ny,0,-1000\nz,-1,7\n",
        b"uncertainty,failure,other\n0.5,1.0,a\n-1000,0.0,b\n7,,c\n",
        b"uncertainty,failure\n0.5,True\n-1000,False\n7,\n",
        b'"uncertainty","failure"\n0.5,1\n-1000,0\n7,""\n'.replace(b'""', b""),
    ],
)
def test_csv_of_other_programs(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    loaded = Outcomes.load(tmp_path / "a.csv")
    assert loaded.uncertainty.tolist() == [0.5, -1000, 7]
    assert loaded.failure.tolist() == [1, 0, -1]
    assert loaded.ids is None
    assert loaded.method is None


def test_parquet_of_other_programs(tmp_path: Path) -> None:
    table = pa.table(
        {
            "failure": pa.array([True, None]),
            "uncertainty": pa.array([1, 2], pa.int32()),
            "key": pa.array(["a", "b"]).dictionary_encode(),
            "extra": [[1], [2]],
        }
    )
    pq.write_table(table, tmp_path / "a.PARQUET")
    loaded = Outcomes.load(tmp_path / "a.PARQUET")
    assert loaded.uncertainty.tolist() == [1, 2]
    assert loaded.failure.tolist() == [1, -1]
    assert loaded.ids == ("a", "b")


def ood_rows() -> Outcomes:
    """Return five rows: right, wrong, outside the classes, outside without a score, and unknown."""
    return Outcomes(
        [0.1, 0.5, 0.9, math.nan, 0.3],
        [0, 1, 1, -1, -1],
        prediction=[0, 1, 1, -1, 0],
        target=[0, 0, OUTSIDE, OUTSIDE, -1],
        reason=[None, None, None, "nonfinite", None],
        class_names=["cat", "dog"],
    )


def test_the_number_of_none_of_the_classes_stays_at_the_boundary() -> None:
    assert ood_rows().target.tolist() == [0, 0, -1, -1, -1]
    assert ood_rows().outside.tolist() == [False, False, True, True, False]
    assert ood_rows().take([2, 4]).outside.tolist() == [True, False]
    assert replace(ood_rows(), method="mcm").outside.tolist() == [False, False, True, True, False]


def test_outside_needs_no_targets() -> None:
    outcomes = Outcomes([0.1, 0.9], [0, 1], outside=[False, True])
    assert outcomes.target.tolist() == [-1, -1]
    assert not Outcomes([0.1, 0.9], [0, 1]).outside.any()
    assert Outcomes([0.1, 0.9], [0, 1]).target is None


@pytest.mark.parametrize("name", ["a.parquet", "a.csv"])
def test_a_file_says_none_of_the_classes_in_its_label(tmp_path: Path, name: str) -> None:
    ood_rows().save(tmp_path / name)
    fields = (
        FIELDS
        if name.endswith("parquet")
        else ("uncertainty", "failure", "prediction", "target", "outside")
    )
    assert_equal(Outcomes.load(tmp_path / name), ood_rows(), fields)
    outside = Outcomes([0.1, 0.9], [0, 1], outside=[False, True])
    outside.save(tmp_path / name)
    assert_equal(Outcomes.load(tmp_path / name), outside)


def test_what_the_label_of_none_of_the_classes_looks_like(tmp_path: Path) -> None:
    ood_rows().save(tmp_path / "a.csv")
    rows = list(csv.DictReader((tmp_path / "a.csv").read_text().splitlines()))
    assert [row["label"] for row in rows] == ["0", "0", "-2", "-2", ""]
    assert [row["label_name"] for row in rows] == ["cat", "cat", "", "", ""]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"failure": [0, 0], "target": [0, -2]},
            "failure must be 1 where the target is -2. Got 0 in row 1",
        ),
        ({"failure": [0, -1], "target": [0, -2]}, "Got -1 in row 1"),
        (
            {"target": [0, 1], "outside": [False, True]},
            "row 1 cannot be of none of the classes .* and of class 1",
        ),
        ({"outside": [True]}, r"one Boolean per row \(2\). Got bool \(1,\)"),
        ({"outside": [0, 1]}, r"one Boolean per row \(2\). Got int64 \(2,\)"),
        (
            {"target": [0, -3]},
            r"from -2 \(none of the classes\), -1 \(unknown\) to inf. Got -3 in row 1",
        ),
    ],
)
def test_what_cannot_be_outside_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Outcomes(**{"uncertainty": [0.1, 0.9], "failure": [0, 1], **fields})


def test_rows_are_taken_by_places_or_a_mask_and_nothing_else() -> None:
    assert len(full().take([])) == 0
    assert full().take(range(2)).ids == full().take([True, True, False, False]).ids
    for rows in ([4], [1, -1], [True, False], [0.0, 1.0], {0, 1}):
        with pytest.raises(
            DataError, match="rows must be a list of indices from 0 to 3, or 4 Booleans"
        ):
            full().take(rows)


LARGE = 2**63 - 1  # float64 cannot tell this number from the number before it


def pictured() -> Outcomes:
    return replace(full(), picture=[LARGE, LARGE - 1, -1, LARGE])


@pytest.mark.parametrize("name", ["a.parquet", "a.csv"])
def test_pictures_of_rows_are_kept_to_the_last_bit(tmp_path: Path, name: str) -> None:
    pictured().save(tmp_path / name)
    picture = Outcomes.load(tmp_path / name).picture
    assert picture is not None
    assert picture.dtype == np.int64
    assert picture.tolist() == [LARGE, LARGE - 1, -1, LARGE]
    full().save(tmp_path / name)
    assert Outcomes.load(tmp_path / name).picture is None


def test_pictures_are_taken_with_their_rows() -> None:
    taken = pictured().take([3, 1])
    assert taken.picture is not None
    assert taken.picture.tolist() == [LARGE, LARGE - 1]
