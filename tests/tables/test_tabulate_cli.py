"""Test ``vilu tabulate``, which turns files from other programs into a table of answers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import vilu
from tests.command import run
from tests.tables.test_completions import chat, response
from tests.tables.test_completions import written as completions
from tests.tables.test_detections import box
from tests.tables.test_detections import truth as annotated
from tests.tables.test_words import row
from tests.tables.test_words import written as page


def test_completions_with_truth(tmp_path: Path) -> None:
    completions(tmp_path, *(response(chat("cat", -0.5), row_id=name) for name in "abc"))
    (tmp_path / "truth.csv").write_text("id,truth\na,Cat\nb,dog\nc,\n")
    done = run(
        "tabulate", "completions", "run.jsonl", "--truth", "truth.csv", "-o", "t.csv", cwd=tmp_path
    )
    assert done.stdout == "t.csv\n"
    assert "3 answers, of which 2 are known as right or wrong" in done.stderr
    assert "next: vilu fit t.csv -o predictor" in done.stderr
    table = vilu.open_table(tmp_path / "t.csv")
    assert table.correct.tolist() == [1, 0, -1]
    assert table.answer == ("cat",) * 3
    assert table.numbers["score_least_logprob"].tolist() == [-0.5] * 3


def test_without_truth_it_says_what_to_fill_in(tmp_path: Path) -> None:
    completions(tmp_path, response(chat("=1+1", -0.5)))
    done = run("tabulate", "completions", "run.jsonl", "-o", "t.csv", cwd=tmp_path)
    assert "write 1 (right) or 0 (wrong) into the column correct" in done.stderr
    assert "'=1+1" in (tmp_path / "t.csv").read_text()  # no spreadsheet runs it as a formula
    assert vilu.open_table(tmp_path / "t.csv").answer == ("=1+1",)


def test_detections_name_what_was_missed(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps([box(0, 0, 9, 6, score=0.9)]))
    known = annotated(box(0, 0, 9, 9), box(50, 0, 9, 9))
    (tmp_path / "truth.json").write_text(json.dumps(known))
    command = ["tabulate", "detections", "results.json", "truth.json", "-o"]
    done = run(*command, "t.parquet", cwd=tmp_path)
    assert "1 of the 2 true words or objects have no row (50.0%), and no" in done.stderr
    table = vilu.open_table(tmp_path / "t.parquet")
    assert (table.correct.tolist(), table.group, table.cluster) == ([1], ("cat",), ("1",))
    run(*command, "strict.csv", "--min-iou", "0.7", cwd=tmp_path)
    assert vilu.open_table(tmp_path / "strict.csv").correct.tolist() == [0]


@pytest.mark.parametrize("labels", ["cat\ndog\n", "0\n1\n", "cat\n\n\n"])
def test_logits_with_labels_by_name_or_number(tmp_path: Path, labels: str) -> None:
    np.save(tmp_path / "logits.npy", np.array([[2.0, 0.0], [3.0, 0.0]], dtype=np.float32))
    (tmp_path / "labels.txt").write_text(labels)
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    options = ["--labels", "labels.txt", "--classes", "classes.txt", "-o", "t.csv"]
    if labels == "cat\n\n\n":
        refused = run("tabulate", "logits", "logits.npy", *options, code=3, cwd=tmp_path)
        assert "target must have one whole number per row (2)" in refused.stderr
        return
    run("tabulate", "logits", "logits.npy", *options, cwd=tmp_path)
    table = vilu.open_table(tmp_path / "t.csv")
    assert table.answer == ("cat", "cat")
    assert table.correct.tolist() == [1, 0]


def test_logits_are_never_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "logits.npy", np.array([[{}]]), allow_pickle=True)
    refused = run("tabulate", "logits", "logits.npy", "-o", "t.csv", code=3, cwd=tmp_path)
    assert "Python objects" in refused.stderr
    assert not (tmp_path / "t.csv").exists()


def test_words_of_pages(tmp_path: Path) -> None:
    page(tmp_path, row("Cat", 0), name="one")
    page(tmp_path, row("dgo", 0), name="two")
    (tmp_path / "truth.csv").write_text(
        "page,text,left,top,width,height\none,Cat,0,8,41,15\ntwo,dog,0,8,41,15\n"
        "two,owl,90,8,41,15\n"
    )
    (tmp_path / "known.txt").write_text("Cat\ndog\n")
    options = ["--truth", "truth.csv", "--dictionary", "known.txt", "-o", "t.csv"]
    done = run("tabulate", "words", "one.tsv", "two.tsv", *options, cwd=tmp_path)
    assert "1 of the 3 true words or objects have no row (33.3%)" in done.stderr
    table = vilu.open_table(tmp_path / "t.csv")
    assert table.correct.tolist() == [1, 0]
    assert table.numbers["in_dictionary"].tolist() == [1, 0]
    assert table.cluster == ("one", "two")


def test_a_second_run_does_nothing_and_edited_tables_stay(tmp_path: Path) -> None:
    completions(tmp_path, response(chat("cat", -0.5)))
    command = ["tabulate", "completions", "run.jsonl", "-o"]
    run(*command, "t.parquet", cwd=tmp_path)
    before = (tmp_path / "t.parquet").read_bytes()
    assert "nothing to do" in run(*command, "t.parquet", cwd=tmp_path).stderr
    assert (tmp_path / "t.parquet").read_bytes() == before
    run(*command, "t.csv", cwd=tmp_path)
    for options in ([], ["--overwrite"]):  # people write labels into it
        refused = run(*command, "t.csv", *options, code=2, cwd=tmp_path)
        assert "is left alone" in refused.stderr


def test_a_file_in_another_role_is_another_input(tmp_path: Path) -> None:
    np.save(tmp_path / "logits.npy", np.array([[2.0, 0.0], [3.0, 0.0]]))
    (tmp_path / "numbers.txt").write_text("0\n1\n")
    command = ["tabulate", "logits", "logits.npy", "-o", "t.parquet"]
    run(*command, "--classes", "numbers.txt", cwd=tmp_path)
    refused = run(*command, "--labels", "numbers.txt", code=2, cwd=tmp_path)
    assert "other inputs" in refused.stderr


def test_other_inputs_need_overwrite(tmp_path: Path) -> None:
    command = ["tabulate", "completions", "run.jsonl", "-o", "t.parquet"]
    completions(tmp_path, response(chat("cat", -0.5)))
    run(*command, cwd=tmp_path)
    completions(tmp_path, response(chat("dog", -0.5)))
    assert "other inputs" in run(*command, code=2, cwd=tmp_path).stderr
    run(*command, "--overwrite", cwd=tmp_path)
    assert vilu.open_table(tmp_path / "t.parquet").answer == ("dog",)


TRUTHS = {
    "no column": ("id,answer\na,cat\n", "must have the columns id, truth. It lacks truth"),
    "id twice": ("id,truth\na,cat\na,dog\n", "line 3: every id must occur once"),
    "no rows": ("id,truth\n", "must have at least one row"),
    "other ids": ("id,truth\nb,cat\n", "has the id of a row"),
    "no text": (b"id,truth\na,\xff\n", "no CSV file in UTF-8"),
}


@pytest.mark.parametrize(("content", "reason"), TRUTHS.values(), ids=TRUTHS.keys())
def test_bad_truths_are_refused(tmp_path: Path, content: str | bytes, reason: str) -> None:
    completions(tmp_path, response(chat("cat", -0.5)))
    encoded = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "truth.csv").write_bytes(encoded)
    command = ["tabulate", "completions", "run.jsonl", "--truth", "truth.csv", "-o", "t.csv"]
    assert reason in run(*command, code=3, cwd=tmp_path).stderr
    assert not (tmp_path / "t.csv").exists()


@pytest.mark.parametrize("cell", ["wide", "nan", "-1", "1e99"])
def test_bad_boxes_of_true_words_are_refused(tmp_path: Path, cell: str) -> None:
    page(tmp_path, row("Cat", 0))
    (tmp_path / "truth.csv").write_text(
        f"page,text,left,top,width,height\npage,Cat,0,8,{cell},15\n"
    )
    command = ["tabulate", "words", "page.tsv", "--truth", "truth.csv", "-o", "t.csv"]
    assert "truth.csv line 2: " in run(*command, code=3, cwd=tmp_path).stderr


@pytest.mark.parametrize("output", ["t.txt", "none/t.csv"])
def test_a_wrong_output_is_refused_before_the_work(tmp_path: Path, output: str) -> None:
    completions(tmp_path, "not a completion")
    run("tabulate", "completions", "run.jsonl", "-o", output, code=2, cwd=tmp_path)


def test_a_folder_is_refused_before_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "pages").mkdir()
    for command in ("completions", "words", "logits"):
        refused = run("tabulate", command, "pages", "-o", "t.csv", code=2, cwd=tmp_path)
        assert "pages must be a file" in refused.stderr
