"""Test that every measured number in README and the first pages has a source in claims.toml."""

from __future__ import annotations

import ast
import operator
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

ROOT: Final = Path(__file__).resolve().parents[1]
CLAIMS: Final[list[dict[str, Any]]] = tomllib.loads(
    (ROOT / "tests" / "claims.toml").read_text(encoding="utf-8")
)["claim"]
PAGES: Final = (
    "README.md",
    "docs/start.md",
    "docs/python.md",
    "docs/decisions.md",
    "docs/demo.md",
    "docs/summary.md",
)
MEASURED: Final = re.compile(
    r"(?<![\w.,])(?:\d[\d,]*\.\d+|\d[\d,]*(?= ?%)|\d{1,3}(?:,\d{3})+|\d{4,})(?![\w.]*\d)"
)
"""A number with decimals, in percent, or with four or more digits."""
CHOSEN: Final = frozenset({1, 2, 5, 10, 20, 60, 90, 95, 100})
"""Percentages that a reader asks for, as in "5 % at 95 % confidence"."""
LEFT_OUT: Final = re.compile(r"\[arXiv[^\]]*\]\([^)]*\)|\]\([^)]*\)|`[^`]*`")
"""Link targets, code, and the paper's number."""
MEASURED_ONCE: Final = re.compile(r"once at [0-9a-f]{7,}")
OF_OTHER_SOURCES: Final = ("docs/datasets.md", "docs/reliability.md")
"""A page with published facts, and a page with promises.

Each promise has its test file (tests/test_docs.py).
"""
MADE_BY: Final = re.compile(
    r"python -m\s+benchmarks|vilu\s+(?:benchmark|render)|make bench|[Mm]easured\s+once at commit"
)
"""A text that says how to make numbers again, or at which commit they were made."""
INTERVALS: Final = re.compile(r"^\|.*\d\.\d.*\|$", re.MULTILINE)
"""A table row with a decimal number."""
OPERATORS: Final[dict[type, Callable[[Any, Any], Any]]] = {
    ast.Sub: operator.sub,
    ast.Add: operator.add,
    ast.Pow: operator.pow,
}


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def numbers_in(text: str) -> list[float]:
    """Return the measured numbers in a text."""
    return [float(number.replace(",", "")) for number in MEASURED.findall(text)]


def all_numbers_in(text: str) -> set[float]:
    """Return all numbers in a text, also small whole ones and those in code."""
    numbers = re.findall(r"\d[\d,_]*(?:\.\d+)?", text)
    return {float(number.replace(",", "").replace("_", "")) for number in numbers}


def calculated(formula: str) -> float:
    """Return the value of a formula with numbers."""

    def value(node: ast.expr) -> Any:
        if isinstance(node, ast.BinOp):
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        assert isinstance(node, ast.Constant), formula
        return node.value

    return float(value(ast.parse(formula, mode="eval").body))


def statements(page: str) -> list[str]:
    """Return sentences and table rows, without code, headings and quoted output."""
    text = re.sub(r"^```.*?^```", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    if page == "docs/demo.md":
        text = text.replace(quoted_of_the_demo(text), "")
    text = LEFT_OUT.sub(" ", text)
    blocks = re.split(r"\n(?=\s*[-|#>]|\n)", text)
    sentences = []
    for block in blocks:
        flat = " ".join(block.split())
        is_row = flat.startswith("|")
        sentences += [flat] if is_row else re.split(r"(?<=[.!?]) (?=[A-Z*\[])", flat)
    return [sentence for sentence in sentences if not sentence.startswith("#")]


def quoted_of_the_demo(text: str) -> str:
    """Return the output that docs/demo.md quotes. A slow test compares it with a run."""
    return text[text.index("> The compact model") : text.index("A small model fails")]


def plain(text: str) -> str:
    """Return the text in the form that ``statements`` gives."""
    return " ".join(LEFT_OUT.sub(" ", text).split())


@pytest.mark.parametrize("page", PAGES)
def test_every_measured_number_has_a_source(page: str) -> None:
    claims = [plain(claim["text"]) for claim in CLAIMS if claim["page"] == page]
    known = ("Python 3.11", "(Waudby-Smith & Ramdas 2020)", "ICCV 2025", "at least 60 %")
    without = []
    for statement in statements(page):
        rest = statement
        for claim in [*claims, *known]:
            rest = rest.replace(claim, "")
        if any(number not in CHOSEN for number in numbers_in(rest)):
            without.append(rest.strip())
    assert without == [], "claims.toml has no source of these numbers"


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim["text"][:40])
def test_a_claim_stands_on_its_page_and_its_numbers_in_its_source(claim: dict[str, Any]) -> None:
    page = " ".join(text_of(claim["page"]).split())
    assert " ".join(claim["text"].split()) in page
    if "source" not in claim:
        return
    source = text_of(claim["source"]).splitlines()
    known: set[float] = set()
    for wanted in claim["lines"]:
        rows = [line for line in source if wanted in line]
        assert rows, f"{claim['source']} has no line with {wanted!r}"
        for row in rows:
            known |= all_numbers_in(row)
    for number, formula in claim.get("derived", {}).items():
        assert all_numbers_in(formula) <= known | {2.0, 14.0, 100.0}, formula
        assert calculated(formula) == pytest.approx(float(number))
        known.add(float(number))
    missing = [number for number in numbers_in(claim["text"]) if number not in known | {5.0}]
    assert missing == [], f"{claim['source']} does not hold these numbers"


def test_tables_of_measurements_say_what_made_them() -> None:
    """The command or commit is in the table's section, in one above it, or at the page's top."""
    without = []
    for page in sorted((ROOT / "docs").rglob("*.md")):
        name = page.relative_to(ROOT).as_posix()
        if name in {*PAGES, *OF_OTHER_SOURCES}:
            continue
        first, *others = re.split(
            r"^(?=##+ )", page.read_text(encoding="utf-8"), flags=re.MULTILINE
        )
        is_made = MADE_BY.search(first) is not None
        above = is_made
        for section in others:
            title = section.partition("\n")[0]
            has_one = MADE_BY.search(section) is not None
            if title.startswith("## "):
                above = is_made or has_one
            if len(INTERVALS.findall(section)) > 3 and not (above or has_one):
                without.append(f"{name}: {title}")
    assert without == []


def test_the_size_of_the_photos_of_the_demo() -> None:
    size = (ROOT / "src" / "vilu" / "assets" / "clothing.parquet").stat().st_size
    assert f"(CC0, {size / 1e6:.1f} MB)" in text_of("docs/demo.md")


@pytest.mark.parametrize("by", sorted({claim["by"] for claim in CLAIMS}))
def test_what_makes_the_numbers_again_is_there(by: str) -> None:
    if MEASURED_ONCE.fullmatch(by):
        return
    if by.startswith("python -m "):
        module = by.removeprefix("python -m ").replace(".", "/")
        assert (ROOT / f"{module}.py").is_file()
    elif by.startswith("vilu benchmark "):
        studies = ROOT / "src" / "vilu_bench" / "configs"
        study = by.removeprefix("vilu benchmark ")
        assert (studies / f"{study}.toml").is_file()
    else:
        assert (ROOT / by).is_file()
