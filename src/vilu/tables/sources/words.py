"""Words recognised by Tesseract, from TSV files."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Final

from vilu.artifacts.disk import convert_os_errors
from vilu.errors import DataError
from vilu.tables.sources.boxes import Box, as_boxes, overlaps, require_box
from vilu.tables.sources.converted import Columns, Converted
from vilu.text import plural

WORD_LEVEL: Final = 5
"""The ``level`` of word rows. Rows of lower levels are pages, blocks, text lines, ..."""

MIN_OVERLAP = 0.1
"""A recognised word and a true word match only if the IoU of the boxes is at least this number.

The number is small because the box of a recognised word is only as high as the ink. A true box may
be as high as the whole line.
"""

PUNCTUATION = ".,;:!?\"'()[]"
"""Characters to remove from both ends of a word before a look-up."""

MAX_CONFIDENCE = 0.999
"""Confidences (from 0 to 1) are clipped to this maximum, so log(1 - confidence) is finite."""

LINE_COLUMNS = ("page_num", "block_num", "par_num", "line_num")
"""Columns that together identify the text line of a word."""

BOX_COLUMNS = ("left", "top", "width", "height")
"""Columns with a word's box, in pixels."""

REQUIRED_COLUMNS = ("level", *LINE_COLUMNS, *BOX_COLUMNS, "conf", "text")
"""Columns that every TSV file must have."""


@dataclass(frozen=True)
class Word:
    """A word with a box on a page.

    Attributes:
        text: The word.
        box: Left edge, top edge, width and height in pixels.
    """

    text: str
    box: Box


@dataclass(frozen=True)
class RecognisedWord(Word):
    """A word recognised by Tesseract.

    Attributes:
        confidence: Tesseract's confidence, from 0 to 100.
        line_key: Numbers of the page, block, paragraph and text line.
    """

    confidence: float
    line_key: tuple[int, ...]


Pages = dict[str, list[RecognisedWord]]
"""Page name -> words, in reading order."""


def word_answers(
    files: Sequence[str | os.PathLike[str]],
    *,
    truth: Mapping[str, Sequence[Word]] | None = None,
    dictionary: Collection[str] = (),
) -> Converted:
    r"""Read Tesseract's TSV files (``tesseract PAGE OUTPUT tsv``) as a table, one row per word.

    A recognised word is right if it equals the true word, letter by letter. Recognised words are
    matched with true words by their boxes. The pair with the largest overlap (intersection over
    union) is matched first, then the next pair. Words with an overlap below 0.1 are not matched. A
    recognised word without a match is wrong.

    The columns are ``id`` (page and word number), ``answer`` (the word), ``correct``,
    ``score_confidence`` (from 0 to 100), ``doubt`` (of the word), ``doubt_before`` and
    ``doubt_after`` (of the line neighbours), ``doubt_line``, ``doubt_page``, ``n_characters``,
    ``share_of_digits``, ``capital`` (1 for a leading capital), ``n_marks`` (characters except
    letters and digits), ``height`` and ``character_width`` (of the box, in pixels), ``n_words`` (on
    the page), ``in_dictionary`` (with ``dictionary``), and ``cluster`` (the page). A doubt is
    ln(1 - confidence / 100). The logarithm spreads out the many confidences close to 100.

    Args:
        files: One TSV file per picture. The name of a page is the file name without its
            suffix. If a file has several pages, the second page is called ``NAME#2``.
        truth: Page name -> true words. ``correct`` is empty on pages that ``truth`` lacks.
        dictionary: Words in small letters. Words are looked up without punctuation at the ends.

    Returns:
        The table. ``n_wanted`` is the number of true words on the pages that were read, and
        ``n_missed`` is the number of these true words without a match.

    Raises:
        DataError: If a file is no TSV by Tesseract, if two pages have the same name, if no word was
            read, or if ``truth`` does not contain any page.
        StorageError: If a file cannot be read.

    Examples:
        >>> import pathlib, tempfile
        >>> from vilu.tables.sources import Word, word_answers
        >>> columns = "level page_num block_num par_num line_num word_num left top width height"
        >>> rows = [f"{columns} conf text", "5 1 1 1 1 1 10 10 40 12 91.5 cat"]
        >>> truth = {"page": [Word("cat", (10, 8, 41, 15)), Word("dog", (60, 8, 40, 15))]}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder) / "page.tsv"
        ...     _ = file.write_text("\n".join(rows).replace(" ", "\t"))
        ...     words = word_answers([file], truth=truth)
        >>> words.columns["correct"], words.missed_share  # the dog was not read
        ([1], 0.5)
    """
    pages = _all_pages(files)
    true_words = truth or {}
    if true_words:
        _require_common_page(true_words, pages)
    columns: Columns = {}
    n_wanted = 0
    n_missed = 0
    for name, words in pages.items():
        correct: list[int | None] = [None] * len(words)
        if name in true_words:
            correct, n_unread = match_words(words, true_words[name])
            n_wanted += len(true_words[name])
            n_missed += n_unread
        if not words:
            continue
        for column, cells in _page_columns(name, words, correct, dictionary).items():
            columns.setdefault(column, []).extend(cells)
    return Converted(columns, n_wanted=n_wanted, n_missed=n_missed)


def _require_common_page(truth: Mapping[str, object], pages: Pages) -> None:
    """Raise DataError if no page with true words was read."""
    has_common_page = not truth.keys().isdisjoint(pages)
    if has_common_page:
        return
    raise DataError(
        f"none of the {plural(len(truth), 'page')} with true words was read. The first page with "
        f"true words is called {next(iter(truth))!r}, and the first page that was read is called "
        f"{next(iter(pages))!r}."
    )


def _all_pages(files: Sequence[str | os.PathLike[str]]) -> Pages:
    """Read the words on each page of all files. Raises DataError if there are no words."""
    pages: Pages = {}
    for file in files:
        pages_of_file = _read_pages(Path(file))
        for name, words in pages_of_file.items():
            if name in pages:
                raise DataError(f"{file}: every page must have a name of its own. Rename the file.")
            pages[name] = words
    if not any(pages.values()):
        raise DataError(f"no word was read in {plural(len(files), 'file')}: there are no answers.")
    return pages


def match_words(
    recognised_words: Sequence[Word], true_words: Sequence[Word]
) -> tuple[list[int | None], int]:
    """Match words by their boxes.

    Returns whether each recognised word is right (1 or 0), and how many true words have no match.
    """
    recognised_boxes = as_boxes([word.box for word in recognised_words])
    true_boxes = as_boxes([word.box for word in true_words])
    overlap = overlaps(recognised_boxes, true_boxes)
    correct: list[int | None] = [0] * len(recognised_words)
    n_unread = len(true_words)
    while overlap.size and overlap.max() >= MIN_OVERLAP:
        flat_index = int(overlap.argmax())  # the pair that overlaps most
        read_index, true_index = divmod(flat_index, overlap.shape[1])
        correct[read_index] = int(recognised_words[read_index].text == true_words[true_index].text)
        n_unread -= 1
        # neither word can be matched again
        overlap[read_index] = 0
        overlap[:, true_index] = 0
    return correct, n_unread


def _read_pages(file: Path) -> Pages:
    """Read the words on each page of a TSV file."""
    pages: Pages = {}
    for number, cells in _read_rows(file):
        location = f"{file} line {number}"
        numbers = _row_numbers(cells, location)
        name = file.stem  # page 1 is called like the file
        if numbers["page_num"] != 1:
            name = f"{file.stem}#{numbers['page_num']:.0f}"
        words = pages.setdefault(name, [])
        text = cells["text"].strip()
        if numbers["level"] == WORD_LEVEL and text:
            left, top, width, height = (numbers[edge] for edge in BOX_COLUMNS)
            line_key = tuple(int(numbers[column]) for column in LINE_COLUMNS)
            box = (left, top, width, height)
            word = RecognisedWord(text, box, numbers["conf"], line_key)
            words.append(word)
    return pages


def _read_rows(file: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the rows of a TSV file: the line number, and column -> cell."""
    with convert_os_errors(f"cannot read {file}"), file.open(encoding="utf-8", newline="") as lines:
        # a quote is an ordinary character in the text, and does not begin a quoted cell
        table = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        try:
            missing_columns = [
                name for name in REQUIRED_COLUMNS if name not in (table.fieldnames or ())
            ]
            if missing_columns:
                raise DataError(
                    f"{file} must be a TSV file of Tesseract. It lacks the columns "
                    f"{', '.join(missing_columns)}. Make it with: tesseract PAGE.png PAGE tsv"
                )
            for cells in table:
                # a missing cell is None, and the key None holds the cells beyond the header
                has_too_few_cells = None in cells.values()
                has_too_many_cells = None in cells
                if has_too_few_cells or has_too_many_cells:
                    raise DataError(
                        f"{file} line {table.line_num} must have {len(table.fieldnames or ())} "
                        "cells. The line is cut off or damaged. Read the page again."
                    )
                yield table.line_num, cells
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{file} is no TSV file in UTF-8: {error}. Read it again.") from error


def _row_numbers(cells: Mapping[str, str], location: str) -> dict[str, float]:
    """Return column -> number for a row. ``location`` names the row in errors."""
    numbers = {}
    for name in REQUIRED_COLUMNS:
        if name != "text":
            numbers[name] = parse_number(cells[name], name, location)
    require_box([numbers[edge] for edge in BOX_COLUMNS], location)
    return numbers


def parse_number(cell: str, column: str, location: str) -> float:
    """Parse the finite number in a cell. Raises DataError if the cell is no finite number.

    ``column`` and ``location`` name the column and the row in the message.
    """
    try:
        number = float(cell)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{location}: {column} must be a number. Got {cell!r:.80} instead.")
    return number


def _page_columns(
    page: str,
    words: Sequence[RecognisedWord],
    correct: list[int | None],
    dictionary: Collection[str],
) -> Columns:
    """Make the table columns for the words on a page with at least one word.

    ``correct`` is 1 or 0 for every word, and None on a page without true words. ``dictionary`` has
    words in small letters.
    """
    texts = [word.text for word in words]
    _, _, widths, heights = zip(*[word.box for word in words], strict=True)
    n_words = len(words)
    columns: Columns = {
        "id": [f"{page}/{number}" for number in range(1, n_words + 1)],
        "answer": texts,
        "correct": correct,
        "score_confidence": [word.confidence for word in words],
        **_doubt_columns(words),
        "n_characters": [len(text) for text in texts],
        "share_of_digits": [_count_characters(str.isdigit, text) / len(text) for text in texts],
        "capital": [int(text[0].isupper()) for text in texts],
        "n_marks": [len(text) - _count_characters(str.isalnum, text) for text in texts],
        "height": list(heights),
        "character_width": [width / len(text) for width, text in zip(widths, texts, strict=True)],
        "n_words": [n_words] * n_words,
        "cluster": [page] * n_words,
    }
    if dictionary:
        plain_texts = [text.strip(PUNCTUATION).casefold() for text in texts]
        columns["in_dictionary"] = [int(text in dictionary) for text in plain_texts]
    return columns


def _count_characters(is_of_kind: Callable[[str], bool], text: str) -> int:
    """Count the characters of a kind in a text."""
    return sum(is_of_kind(character) for character in text)


def _doubt_columns(words: Sequence[RecognisedWord]) -> Columns:
    """Make the doubt columns: of each word, the two neighbours, the line and the page.

    If a word has no neighbour on one side in the line, the word's doubt is used instead. The doubt
    of a line or a page is the mean doubt over its words.
    """
    doubts: Columns = {"doubt": [], "doubt_before": [], "doubt_after": [], "doubt_line": []}
    for _, words_of_line in groupby(words, key=lambda word: word.line_key):
        doubts_of_line = [_doubt(word.confidence) for word in words_of_line]
        doubts["doubt"] += doubts_of_line
        # the doubts in the line, shifted by one word in both directions
        doubts["doubt_before"] += [doubts_of_line[0], *doubts_of_line[:-1]]
        doubts["doubt_after"] += [*doubts_of_line[1:], doubts_of_line[-1]]
        doubts["doubt_line"] += [fmean(doubts_of_line)] * len(doubts_of_line)
    doubts["doubt_page"] = [fmean(doubts["doubt"])] * len(words)
    return doubts


def _doubt(confidence: float) -> float:
    """Compute ln(1 - confidence / 100), with the confidence clipped to the range 0 to 99.9."""
    share = min(max(confidence / 100, 0.0), MAX_CONFIDENCE)
    return math.log1p(-share)
