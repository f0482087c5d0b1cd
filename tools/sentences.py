"""Sentence lengths of pages: median, share above 30 words, longest.

    python tools/sentences.py                  # every page, fails for a page outside a limit
    python tools/sentences.py docs/start.md    # with the too long sentences

A sentence ends with ``.``, ``?`` or ``!``, or where a paragraph or a list item ends. A colon or a
semicolon does not end a sentence. Code, tables, headings and HTML are left out. Bold headings
before paragraphs (``**Two sides.**``) and items in a link list (``[Title](page.md): what it is``)
are left out, too. A code span is one word, and a link counts as the words in the link text.
"""

from __future__ import annotations

import re
import statistics
import sys
from pathlib import Path
from typing import Final, NamedTuple

ROOT: Final = Path(__file__).resolve().parents[1]

MEDIAN_LIMITS: Final = (12, 18)
"""Least and largest median for a page, in words."""

LONG_SENTENCE: Final = 30
"""Words above which a sentence is long."""

MAX_SHARE_OF_LONG: Final = 0.03
"""Largest share of long sentences in a page."""

MAX_WORDS: Final = 40
"""Maximum length of a sentence, in words."""

BOLD_HEADING: Final = re.compile(r"^\*\*[^*]+(?:[.?!]\*\*\s*|\*\*$)")
"""Bold words at the beginning of a paragraph, as a heading."""

LISTED_LINK: Final = re.compile(r"\[[^\]]+\]\([^)]+\): (?:[^.]|\.(?=\S))*\.?")
"""An item in a link list."""

ABBREVIATIONS: Final = (
    "e.g.",
    "i.e.",
    "etc.",
    "al.",
    "cf.",
    "vs.",
    "approx.",
    "No.",
    "Fig.",
    "Eq.",
)


class Page(NamedTuple):
    """The sentences of a page."""

    path: Path
    sentences: list[str]

    @property
    def lengths(self) -> list[int]:
        """Word count for every sentence."""
        return [len(sentence.split()) for sentence in self.sentences]

    @property
    def faults(self) -> list[str]:
        """Limits that the page exceeds."""
        faults = []
        median = statistics.median(self.lengths)
        if not MEDIAN_LIMITS[0] <= median <= MEDIAN_LIMITS[1]:
            faults.append(f"median {median:g}, not {MEDIAN_LIMITS[0]} to {MEDIAN_LIMITS[1]}")
        share = sum(length > LONG_SENTENCE for length in self.lengths) / len(self.lengths)
        if share > MAX_SHARE_OF_LONG:
            faults.append(
                f"{share:.0%} above {LONG_SENTENCE} words, at most {MAX_SHARE_OF_LONG:.0%}"
            )
        if max(self.lengths) > MAX_WORDS:
            faults.append(f"longest {max(self.lengths)} words, at most {MAX_WORDS}")
        return faults


def read_page(path: Path) -> Page:
    """Read the sentences in a Markdown page."""
    sentences = []
    text = path.read_text(encoding="utf-8")
    for paragraph in _paragraphs(text):
        if LISTED_LINK.fullmatch(paragraph):
            continue
        body = BOLD_HEADING.sub("", paragraph)
        plain_text = _plain(body)
        sentences += _sentences(plain_text)
    return Page(path, sentences)


def _paragraphs(text: str) -> list[str]:
    """Return paragraphs and list items, each as one line."""
    text = re.sub(r"```.*?```", "\n\n", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    paragraphs = []
    current: list[str] = []
    for line in [*text.splitlines(), ""]:
        is_left_out = line.startswith(("|", "#", "    ", "<", "![", ">"))
        begins_item = re.match(r"\s*([-*]|\d+\.)\s", line) is not None
        if is_left_out or begins_item or not line.strip():
            if current:
                paragraph = " ".join(current)
                paragraphs.append(paragraph)
            current = []
        if not is_left_out and line.strip():
            line_of_text = re.sub(r"^\s*([-*]|\d+\.)\s+", "", line)
            current.append(line_of_text.strip())
    return paragraphs


def _plain(text: str) -> str:
    """Return the text without Markdown marks. A code span is one word."""
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"`[^`]*`", "Code", text)  # with a capital, as in a sentence that begins here
    return re.sub(r"[*_]{1,2}(\S[^*_]*)[*_]{1,2}", r"\1", text)


def _sentences(paragraph: str) -> list[str]:
    """Return a paragraph's sentences. None ends after an abbreviation or in a number."""
    for number, abbreviation in enumerate(ABBREVIATIONS):
        paragraph = paragraph.replace(abbreviation, f"\0{number}")
    parts = re.split(r"(?<=[.!?])[)\"”]?\s+(?=[\"“(]?[A-Z0-9\0])", paragraph)
    for number, abbreviation in enumerate(ABBREVIATIONS):
        parts = [part.replace(f"\0{number}", abbreviation) for part in parts]
    return [part for part in parts if len(part.split()) > 1]


def main(names: list[str]) -> int:
    """Print the pages, and return the exit code."""
    paths = [Path(name) for name in names]
    if not paths:
        paths = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    failed = []
    print(f"{'page':40} {'sentences':>9} {'median':>7} {'> 30':>6} {'longest':>8}")
    for path in paths:
        page = read_page(path)
        if not page.sentences:
            continue
        absolute_path = path.resolve()
        name = absolute_path.relative_to(ROOT).as_posix()
        lengths = page.lengths
        share = sum(length > LONG_SENTENCE for length in lengths) / len(lengths)
        mark = ""
        if page.faults:
            faults = "; ".join(page.faults)
            failed.append(f"{name}: {faults}")
            mark = " NO"
        median = statistics.median(lengths)
        print(f"{name:40} {len(lengths):9} {median:7g} {share:6.0%} {max(lengths):8}{mark}")
        if names:
            _print_long(page)
    for failure in failed:
        print(f"hard to read: {failure}")
    return 1 if failed else 0


def _print_long(page: Page) -> None:
    for sentence, length in zip(page.sentences, page.lengths, strict=True):
        if length > LONG_SENTENCE:
            print(f"  {length} words: {sentence}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
