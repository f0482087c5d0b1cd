from __future__ import annotations

import csv
import json
import math
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from vilu.artifacts.documents import parse_json, write_json
from vilu.errors import DataError, ProvenanceError, StorageError, UsageError
from vilu.outcomes.results import COLUMNS, RARE_COLUMNS, ResultRow, ResultTable

ROW = ResultRow(
    method="vilu",
    dataset="pets",
    split="test",
    seed=0,
    metric="auroc",
    value=0.9,
    ci_low=0.85,
    ci_high=0.95,
    n=100,
    n_failures=40,
    accuracy=0.6,
    n_unlabelled=0,
    n_unusable=0,
    convention="ties count half",
    interval="95 % stratified bootstrap, 1000 resamples",
)
UNDEFINED = replace(
    ROW, value=None, ci_low=None, ci_high=None, interval=None, why="none of 100 answers is wrong"
)


def table() -> ResultTable:
    return ResultTable(
        (
            ROW,
            replace(ROW, metric="fpr95", value=1 / 3, convention="positive=correct"),
            replace(ROW, seed=1, value=0.8),
            replace(ROW, seed=1, metric="fpr95", value=2 / 3, convention="positive=correct"),
            replace(
                ROW, method="mcm", seed=None, value=0.7, ci_low=None, ci_high=None, interval=None
            ),
            replace(UNDEFINED, dataset="dtd", method="=mcm", seed=None),
        )
    )


def test_value_of_the_one_row_that_fits() -> None:
    assert table().value("fpr95", method="vilu", seed=1) == 2 / 3
    assert table().value("auroc", method="mcm") == 0.7
    assert table().value("auroc", dataset="dtd") is None
    assert table().value("auroc", seed=None, dataset="pets") == 0.7


def test_value_of_several_rows_or_none_is_refused() -> None:
    with pytest.raises(
        UsageError, match=r"one row must fit metric='auroc' .* 2 of 6 do; narrow by"
    ):
        table().value("auroc", method="vilu")
    with pytest.raises(UsageError, match="0 of 6 do"):
        table().value("ece")
    with pytest.raises(UsageError, match=r"no field 'methods'\. There are: method, dataset"):
        table().value("auroc", methods="vilu")


def test_filter_and_join() -> None:
    seeds = [table().filter(method="vilu", seed=seed) for seed in (0, 1)]
    assert [len(part) for part in seeds] == [2, 2]
    assert (seeds[0] + seeds[1]).rows == table().rows[:4]
    assert list(table().filter()) == list(table().rows)
    assert [row["value"] for row in seeds[0].to_dicts()] == [0.9, 1 / 3]


@pytest.mark.parametrize("suffix", ["json", "parquet", "csv"])
@pytest.mark.parametrize("rows", [table(), ResultTable()])
def test_saved_and_loaded_is_the_same(tmp_path: Path, suffix: str, rows: ResultTable) -> None:
    path = tmp_path / f"metrics.{suffix}"
    rows.save(path)
    assert ResultTable.load(path) == rows
    assert list(tmp_path.iterdir()) == [path]


def test_json_says_null_and_why(tmp_path: Path) -> None:
    table().save(tmp_path / "metrics.json")
    content = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert content["kind"] == "results"
    last = content["rows"][-1]
    assert last["value"] is None
    assert last["why"] == "none of 100 answers is wrong"
    assert tuple(last) == tuple(name for name in COLUMNS if name not in RARE_COLUMNS)


def test_csv_and_parquet_say_null(tmp_path: Path) -> None:
    table().save(tmp_path / "a.csv")
    table().save(tmp_path / "a.parquet")
    with (tmp_path / "a.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == tuple(name for name in COLUMNS if name not in RARE_COLUMNS)
    assert rows[-1]["value"] == ""
    assert rows[-1]["method"] == "'=mcm"
    assert rows[1]["value"] == repr(1 / 3)
    assert pq.read_table(tmp_path / "a.parquet").column("value").null_count == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "it is not JSON of ours"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[1]", "holds no object, but list"),
        ('{"rows": 5}', "list 'rows'"),
        ('{"rows": [5]}', "every entry of 'rows' .* must be an object"),
        ('{"rows": [{}]}', "'metric' is missing in row 0"),
        ('{"rows": [{"metric": 5}]}', "not a table of results"),
        (
            '{"rows": [{"metric": "auroc", "value": "high"}]}',
            "not a table of results",
        ),
        (
            '{"rows": [{"metric": "auroc", "n": 1e400}]}',
            "1e400 is no finite number",
        ),
        (
            f'{{"rows": [{{"metric": "auroc", "n": {10**30}}}]}}',
            "not a table of results",
        ),
    ],
)
def test_hostile_json(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.json").write_text(content, encoding="utf-8")
    with suppress(ValueError, RecursionError):
        write_json(tmp_path / "a.json", parse_json(content.encode()))
    with pytest.raises(DataError, match=message):
        ResultTable.load(tmp_path / "a.json")


@pytest.mark.parametrize("number", ["NaN", "Infinity"])
def test_a_number_that_json_does_not_know_is_refused(tmp_path: Path, number: str) -> None:
    table().save(tmp_path / "a.json")
    text = (tmp_path / "a.json").read_text(encoding="utf-8").replace("0.9,", f"{number},", 1)
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=f"{number} is no finite number"):
        ResultTable.load(tmp_path / "a.json")


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("uncertainty,failure\n0.5,1\n", encoding="utf-8")
    with pytest.raises(DataError, match="not a table of results: 'metric' is missing in row 0"):
        ResultTable.load(tmp_path / "a.csv")
    with pytest.raises(StorageError, match=r"none\.json does not exist"):
        ResultTable.load(tmp_path / "none.json")
    with pytest.raises(UsageError, match=r"'a\.txt'"):
        table().save(tmp_path / "a.txt")
    (tmp_path / "b.json").write_text('{"schema_version": 9, "rows": []}', encoding="utf-8")
    with pytest.raises(ProvenanceError, match="schema version 9"):
        ResultTable.load(tmp_path / "b.json")


def test_text_table() -> None:
    text = str(table())
    lines = text.splitlines()
    assert lines[0] == "pets test: 100 answers, 40 wrong, accuracy 60.0 %"
    assert lines[1].split() == ["method", "AUROC", "FPR95"]
    assert lines[2].split() == [
        "vilu",
        "(seed",
        "0)",
        "90.0",
        "[85.0,",
        "95.0]",
        "33.3",
        "[85.0,",
        "95.0]",
    ]
    assert lines[4].split() == ["mcm", "70.0"]
    columns = [line.index("[85.0") for line in lines[2:4]]
    assert columns[0] == columns[1]
    assert "dtd test: 100 answers" in text
    assert "=mcm    undefined" in text
    assert "in percent; in brackets: 95 % stratified bootstrap, 1000 resamples" in lines
    assert "FPR95: positive=correct" in lines
    assert "undefined on dtd test: none of 100 answers is wrong" in lines


def test_markdown_table() -> None:
    lines = table().filter(dataset="pets", seed=0).to_markdown().splitlines()
    assert lines[0] == "**pets test: 100 answers, 40 wrong, accuracy 60.0 %**"
    assert lines[2:5] == [
        "| method | AUROC | FPR95 |",
        "|---|---|---|",
        "| vilu | 90.0 [85.0, 95.0] | 33.3 [85.0, 95.0] |",
    ]
    assert lines[-1] == "- FPR95: positive=correct"


def test_names_from_files_cannot_break_the_layout() -> None:
    odd = ResultTable((replace(ROW, method="a|b\n\x1b[31mc", dataset="d\r\ne"),))
    assert "\x1b" not in str(odd)
    assert str(odd).splitlines()[0].startswith(r"d\r\ne test:")
    assert r"| a\|b\\n\\x1b[31mc |" in odd.to_markdown()


def test_markdown_has_no_tag_and_no_emphasis_from_names() -> None:
    note = "<b>no</b> *wrong* answer"
    odd = ResultTable(
        (
            replace(ROW, method="<i>a_b_c", dataset="<img src=x onerror=alert(1)>"),
            replace(UNDEFINED, why=note),
        )
    )
    text = odd.to_markdown()
    assert "<" not in text
    assert r"**&lt;img src=x onerror=alert(1)> test: " in text
    assert r"| &lt;i>a\_b\_c |" in text
    assert r"&lt;b>no&lt;/b> \*wrong\* answer" in text


def test_columns_can_be_chosen() -> None:
    assert table().filter(dataset="pets").table(["fpr95"]).splitlines()[1].split() == [
        "method",
        "FPR95",
    ]
    with pytest.raises(UsageError, match="Did you mean 'fpr95'"):
        table().table(["fpr90"])


def test_rows_of_one_name_do_not_hide_each_other() -> None:
    twice = ResultTable((ROW, replace(ROW, value=0.5)))
    assert [line.split()[1] for line in str(twice).splitlines()[2:4]] == ["90.0", "50.0"]


def test_metrics_of_another_version_are_shown_by_name() -> None:
    assert "sharpness" in str(ResultTable((replace(ROW, metric="sharpness"),)))


def test_title_counts_what_was_left_out() -> None:
    rows = ResultTable(
        (replace(ROW, n_unlabelled=3, n_unusable=2), replace(ROW, method="b", n=90, n_unusable=12))
    )
    assert str(rows).splitlines()[0] == (
        "pets test: 100/90 answers, 40 wrong, accuracy 60.0 %, 3/0 unlabelled left out, "
        "2/12 without a score left out"
    )


def test_an_empty_table_says_so() -> None:
    assert str(ResultTable()) == "no results"
    assert ResultTable().to_markdown() == "- no results"


def test_mean_over_seeds() -> None:
    mean = table().mean_over_seeds()
    row = mean.filter(method="vilu", metric="auroc").rows[0]
    assert row.value == pytest.approx(0.85)
    sd = math.sqrt(2 * 0.05**2)  # the deviation between 0.9 and 0.8, with n - 1
    assert (row.ci_low, row.ci_high) == pytest.approx((0.85 - sd, 0.85 + sd))
    assert row.interval == "mean of 2 seeds, one standard deviation"
    assert row.seed is None
    assert row.n == 100
    assert (
        mean.filter(method="mcm").rows == table().filter(method="mcm").rows
    )  # one seed stays as it is
    assert "in brackets: mean of 2 seeds, one standard deviation" in str(mean)


def test_a_row_that_is_there_twice_is_one_seed() -> None:
    assert (table() + table()).mean_over_seeds() == table().mean_over_seeds()
    without = ResultTable(
        tuple(replace(row, ci_low=None, ci_high=None, interval=None) for row in table())
    )
    assert (table() + without).mean_over_seeds() == table().mean_over_seeds()


def test_a_mean_is_undefined_where_one_seed_is() -> None:
    row = ResultTable((ROW, replace(UNDEFINED, seed=4))).mean_over_seeds().rows[0]
    assert row.value is None
    assert row.ci_low is row.interval is None
    assert row.why == "seed 4 of 2 seeds: none of 100 answers is wrong"
