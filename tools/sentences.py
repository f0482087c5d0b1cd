"""Length of the sentences of pages: median, share above 30 words, longest.

    python tools/sentences.py                  # every page; fails for a held page above a limit
    python tools/sentences.py docs/start.md    # with the sentences that are too long

A sentence ends with ``.``, ``?`` or ``!``, at the end of a paragraph or of an item of a list. A
colon or a semicolon does not end it. Code, tables, headings and HTML are left out. A code span is
one word, and a link counts as its words.
"""

from __future__ import annotations

import re
import statistics
import sys
from pathlib import Path
from typing import Final, NamedTuple

ROOT: Final = Path(__file__).resolve().parents[1]

MEDIAN: Final = (8, 18)
"""Least and largest median of a page, in words."""

LONG: Final = 30
"""Words above which a sentence is long."""

MOST_LONG: Final = 0.03
"""Largest share of long sentences of a page."""

LONGEST: Final = 40
"""Words that no sentence exceeds."""

HELD: Final = (
    "README.md",
    "docs/adding.md",
    "docs/alternatives.md",
    "docs/answers.md",
    "docs/architecture.md",
    "docs/backbones.md",
    "docs/benchmark.md",
    "docs/captions.md",
    "docs/concepts.md",
    "docs/conventions.md",
    "docs/datasets.md",
    "docs/decisions.md",
    "docs/decisions-measured.md",
    "docs/demo.md",
    "docs/dry-run.md",
    "docs/explain.md",
    "docs/faq.md",
    "docs/formats.md",
    "docs/howto/bursts.md",
    "docs/howto/classifier.md",
    "docs/howto/cross-validation.md",
    "docs/howto/deploy.md",
    "docs/howto/gpu.md",
    "docs/howto/label-next.md",
    "docs/howto/label-sets.md",
    "docs/howto/monitor.md",
    "docs/howto/no-labels.md",
    "docs/howto/outside.md",
    "docs/howto/siglip.md",
    "docs/howto/vectors.md",
    "docs/index.md",
    "docs/install.md",
    "docs/methods/duo.md",
    "docs/methods/outside.md",
    "docs/methods/vilu.md",
    "docs/methods/vilu_plus.md",
    "docs/methods/vilu_zero.md",
    "docs/monitor.md",
    "docs/monitor-measured.md",
    "docs/performance.md",
    "docs/python.md",
    "docs/readings.md",
    "docs/reliability.md",
    "docs/report.md",
    "docs/scale.md",
    "docs/serving.md",
    "docs/serving-measured.md",
    "docs/sharing.md",
    "docs/stability.md",
    "docs/start.md",
    "docs/summary.md",
    "docs/tables.md",
    "docs/triage.md",
    "docs/troubleshooting.md",
)
"""Pages that must keep the limits."""

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
        """Words of every sentence."""
        return [len(sentence.split()) for sentence in self.sentences]

    @property
    def faults(self) -> list[str]:
        """Limits that the page exceeds."""
        faults = []
        median = statistics.median(self.lengths)
        if not MEDIAN[0] <= median <= MEDIAN[1]:
            faults.append(f"median {median:g}, not {MEDIAN[0]} to {MEDIAN[1]}")
        share = sum(length > LONG for length in self.lengths) / len(self.lengths)
        if share > MOST_LONG:
            faults.append(f"{share:.0%} above {LONG} words, at most {MOST_LONG:.0%}")
        if max(self.lengths) > LONGEST:
            faults.append(f"longest {max(self.lengths)} words, at most {LONGEST}")
        return faults


def read_page(path: Path) -> Page:
    """The sentences of a Markdown page."""
    sentences = []
    for paragraph in _paragraphs(path.read_text(encoding="utf-8")):
        sentences += _sentences(paragraph)
    return Page(path, sentences)


def _paragraphs(text: str) -> list[str]:
    """Paragraphs and items of lists, each as one line of plain words."""
    text = re.sub(r"```.*?```", "\n\n", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    paragraphs = []
    current: list[str] = []
    for line in [*text.splitlines(), ""]:
        is_left_out = line.startswith(("|", "#", "    ", "<", "![", ">"))
        begins_item = re.match(r"\s*([-*]|\d+\.)\s", line) is not None
        if is_left_out or begins_item or not line.strip():
            if current:
                paragraphs.append(" ".join(current))
            current = []
        if not is_left_out and line.strip():
            current.append(re.sub(r"^\s*([-*]|\d+\.)\s+", "", line).strip())
    return [_plain(paragraph) for paragraph in paragraphs]


def _plain(text: str) -> str:
    """Text without marks of Markdown. A code span is one word."""
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"`[^`]*`", "Code", text)  # with a capital, since it may begin a sentence
    return re.sub(r"[*_]{1,2}(\S[^*_]*)[*_]{1,2}", r"\1", text)


def _sentences(paragraph: str) -> list[str]:
    """The sentences of a paragraph. A full stop after an abbreviation or in a number ends none."""
    for number, abbreviation in enumerate(ABBREVIATIONS):
        paragraph = paragraph.replace(abbreviation, f"\0{number}")
    parts = re.split(r"(?<=[.!?])[)\"”]?\s+(?=[\"“(]?[A-Z0-9\0])", paragraph)
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
        name = path.resolve().relative_to(ROOT).as_posix()
        lengths = page.lengths
        share = sum(length > LONG for length in lengths) / len(lengths)
        is_held = name in HELD
        mark = ""
        if page.faults and is_held:
            failed.append(f"{name}: {'; '.join(page.faults)}")
            mark = " NO"
        elif is_held:
            mark = " held"
        median = statistics.median(lengths)
        print(f"{name:40} {len(lengths):9} {median:7g} {share:6.0%} {max(lengths):8}{mark}")
        if names:
            _print_long(page)
    for failure in failed:
        print(f"too long to read at once: {failure}")
    return 1 if failed else 0


def _print_long(page: Page) -> None:
    for sentence, length in zip(page.sentences, page.lengths, strict=True):
        if length > LONG:
            print(f"  {length} words: {sentence}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
