"""Test that words that Tesseract read become a table of answers."""

from __future__ import annotations

import math
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image, ImageDraw, ImageFont

from vilu.errors import DataError, StorageError
from vilu.tables.sources import Word, word_answers

HEADER = [
    "level",
    "page_num",
    "block_num",
    "par_num",
    "line_num",
    "word_num",
    "left",
    "top",
    "width",
    "height",
    "conf",
    "text",
]


def row(
    text: str, left: float, conf: float = 90.0, *, top: float = 10, line: int = 1, page: int = 1
) -> str:
    """Return a word with 40 times 12 pixels, as Tesseract writes it."""
    return "\t".join(map(str, [5, page, 1, 1, line, 1, left, top, 40, 12, conf, text]))


def written(folder: Path, *rows: str, name: str = "page") -> Path:
    path = folder / f"{name}.tsv"
    page = "1\t1\t0\t0\t0\t0\t0\t0\t700\t122\t-1\t"  # the page itself, which is no word
    path.write_text("\n".join(["\t".join(HEADER), page, *rows]) + "\n", encoding="utf-8")
    return path


def test_words_are_judged_in_their_places(tmp_path: Path) -> None:
    file = written(tmp_path, row("cat", 0), row("dog", 50), row("cat", 100))
    truth = {"page": [Word("cat", (0, 8, 41, 15)), Word("cat", (49, 8, 41, 15))]}
    words = word_answers([file], truth=truth)
    assert words.columns["answer"] == ["cat", "dog", "cat"]
    assert words.columns["correct"] == [1, 0, 0]  # the third word stands where no true word is
    assert words.missed_share == 0


def test_words_that_were_never_read_are_counted(tmp_path: Path) -> None:
    boxes = [(left, 8.0, 41.0, 15.0) for left in (0.0, 50.0, 100.0, 150.0)]
    truth = {"page": [Word("cat", box) for box in boxes]}
    words = word_answers([written(tmp_path, row("cat", 0))], truth=truth)
    assert (words.n_wanted, words.n_missed, words.missed_share) == (4, 3, 0.75)


def test_two_words_read_as_one_leave_one_unread(tmp_path: Path) -> None:
    merged = "\t".join(map(str, [5, 1, 1, 1, 1, 1, 0, 10, 90, 12, 50.0, "catdog"]))
    truth = {"page": [Word("cat", (0, 8, 41, 15)), Word("dog", (49, 8, 41, 15))]}
    words = word_answers([written(tmp_path, merged)], truth=truth)
    assert words.columns["correct"] == [0]
    assert words.n_missed == 1


def test_doubts_are_those_of_the_line(tmp_path: Path) -> None:
    rows = [row("a", 0, 90), row("b", 50, 60), row("c", 99, 20), row("d", 0, 0, line=2)]
    columns = word_answers([written(tmp_path, *rows)]).columns
    first, second, third = (math.log(share) for share in (0.1, 0.4, 0.8))
    assert columns["score_confidence"] == [90, 60, 20, 0]
    assert columns["doubt"] == pytest.approx([first, second, third, 0])
    assert columns["doubt_before"] == pytest.approx([first, first, second, 0])
    assert columns["doubt_after"] == pytest.approx([second, third, third, 0])
    total = first + second + third
    assert columns["doubt_line"] == pytest.approx([total / 3] * 3 + [0])
    assert columns["doubt_page"] == pytest.approx([total / 4] * 4)
    assert columns["correct"] == [None] * 4


def test_a_doubt_is_finite(tmp_path: Path) -> None:
    file = written(tmp_path, row("a", 0, 100), row("b", 50, -1))
    assert word_answers([file]).columns["doubt"] == pytest.approx([math.log(0.001), 0])


def test_simple_facts_of_a_word(tmp_path: Path) -> None:
    file = written(tmp_path, row("Cat,", 0), row("2026", 50))
    columns = word_answers([file], dictionary={"cat"}).columns
    assert columns["in_dictionary"] == [1, 0]
    assert columns["share_of_digits"] == [0, 1]
    assert columns["n_characters"] == [4, 4]
    assert columns["capital"] == [1, 0]
    assert columns["n_marks"] == [1, 0]
    assert columns["character_width"] == [10, 10]
    assert columns["height"] == [12, 12]


def test_pages_are_clusters_with_their_names(tmp_path: Path) -> None:
    files = [
        written(tmp_path, row("a", 0), row("b", 0, page=2), name="scan"),
        written(tmp_path, row("c", 0), name="letter"),
    ]
    columns = word_answers(files).columns
    assert columns["cluster"] == ["scan", "scan#2", "letter"]
    assert columns["id"] == ["scan/1", "scan#2/1", "letter/1"]


def test_a_page_without_words_counts_as_never_read(tmp_path: Path) -> None:
    files = [written(tmp_path, name="blank"), written(tmp_path, row("a", 0), name="other")]
    words = word_answers(files, truth={"blank": [Word("cat", (0, 8, 41, 15))]})
    assert words.missed_share == 1
    assert words.columns["correct"] == [None]


def test_quotes_are_characters(tmp_path: Path) -> None:
    file = written(tmp_path, row('"cat', 0), row("dog", 50))
    assert word_answers([file]).columns["answer"] == ['"cat', "dog"]


REFUSED = {
    "no header": ("cat dog", "lacks the columns level"),
    "cut off": ("\t".join(HEADER) + "\n5\t1\t1", "line 2 must have 12 cells"),
    "too long": ("\t".join(HEADER) + "\n" + row("a", 0) + "\tb", "line 2 must have 12 cells"),
    "no number": ("\t".join(HEADER) + "\n" + row("a", 0).replace("90.0", "high"), "conf must be"),
    "infinite": ("\t".join(HEADER) + "\n" + row("a", 0, float("inf")), "conf must be a number"),
    "negative": ("\t".join(HEADER) + "\n" + row("a", 0).replace("\t40\t", "\t-4\t"), "negative"),
    "no words": ("\t".join(HEADER) + "\n", "no word was read"),
    "long cell": ("x" * 200_000, "no TSV file"),
}


@pytest.mark.parametrize(("content", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_bad_files_are_refused(tmp_path: Path, content: str, reason: str) -> None:
    file = tmp_path / "page.tsv"
    file.write_text(content)
    with pytest.raises(DataError) as refusal:
        word_answers([file])
    assert reason in str(refusal.value)


def test_binary_and_missing_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "page.tsv"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="no TSV file"):
        word_answers([file])
    with pytest.raises(StorageError, match=r"none\.tsv"):
        word_answers([tmp_path / "none.tsv"])


def test_pages_of_one_name_and_foreign_truth_are_refused(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    file = written(tmp_path, row("a", 0))
    with pytest.raises(DataError, match="a name of its own"):
        word_answers([file, written(tmp_path / "more", row("a", 0))])
    with pytest.raises(DataError, match=r"true words is called 'letter'.*'page'"):
        word_answers([file], truth={"letter": []})


def test_tesseract_reads_a_page(tmp_path: Path) -> None:
    if shutil.which("tesseract") is None:
        pytest.skip("needs Tesseract: apt-get install tesseract-ocr")
    image = Image.new("L", (500, 100), 255)
    font = ImageFont.load_default(28)
    truth = []
    left = 20.0
    for text in ("Trust", "the", "second", "answer"):
        ImageDraw.Draw(image).text((left, 30), text, fill=0, font=font)
        truth.append(Word(text, (left, 30, font.getlength(text), 34)))
        left += font.getlength(text) + 12
    image.save(tmp_path / "page.png")
    command = ["tesseract", tmp_path / "page.png", tmp_path / "page", "tsv"]
    subprocess.run(command, check=True, capture_output=True)
    words = word_answers([tmp_path / "page.tsv"], truth={"page": truth})
    assert words.columns["answer"] == ["Trust", "the", "second", "answer"]
    assert words.columns["correct"] == [1, 1, 1, 1]
    assert words.n_missed == 0
