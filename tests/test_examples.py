"""Test that every script in examples/ runs and gives the output and drawings that are kept."""

from __future__ import annotations

import re
import shutil
import sys
import warnings

import pytest
from tools import gallery

import vilu

FOLDER = gallery.FOLDER
PAGE = (FOLDER / "README.md").read_text(encoding="utf-8")
NUMBER = re.compile(r"[+−-]?\d[\d,]*(?:\.\d+)?")


def in_words(text: str) -> str:
    """Return the text with # for its numbers, and without table rules.

    The width of a table rule follows from the numbers.
    """
    return " ".join(NUMBER.sub("#", text).replace("-", "").split())


def numbers(text: str) -> list[float]:
    return [float(found.replace(",", "").replace("−", "-")) for found in NUMBER.findall(text)]


def tolerances(text: str) -> list[float]:
    """Return how far another processor may move each number.

    The limit is a fifth of the number. At least 3 is allowed for a number with fewer than two
    decimals, and 0.05 for any other.
    """
    decimals = [len(found.partition(".")[2]) for found in NUMBER.findall(text)]
    return [
        max(abs(n) / 5, 3 if d < 2 else 0.05) for n, d in zip(numbers(text), decimals, strict=True)
    ]


# One script starts a server three times, and one runs a triage with 340 photos. Smaller ones are
# in tests/service and tests/triage.
SLOW = {"service", "trust_photos"}
NEEDS = {"ocr_words": "tesseract"}
"""Programs that examples need. Debian has them as packages."""
EACH = [
    pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in gallery.NAMES
]


@pytest.mark.parametrize("name", EACH)
def test_runs_and_gives_what_is_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which(NEEDS.get(name, "python3")) is None:
        pytest.skip(f"needs {NEEDS[name]}: apt-get install tesseract-ocr")
    monkeypatch.syspath_prepend(FOLDER)
    known = dict(vilu.PREDICTORS)
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # pytest makes errors from warnings
        try:
            told, figure = gallery.run_example(name)
        finally:
            for module in (name, "example_data"):
                sys.modules.pop(module, None)
            for added in vilu.PREDICTORS.keys() - known.keys():
                del vilu.PREDICTORS[added]
    kept = (FOLDER / "output" / f"{name}.txt").read_text(encoding="utf-8")
    again = f"if that is as it should be: python tools/gallery.py {name}"
    assert in_words(told) == in_words(kept), again
    for now, before, tolerance in zip(numbers(told), numbers(kept), tolerances(kept), strict=True):
        assert now == pytest.approx(before, abs=tolerance), again
    drawn = [] if figure is None else [gallery.picture_path(name, figure)]
    assert sorted((FOLDER / "pictures").glob(f"{name}.*")) == drawn, again


def test_what_is_kept_belongs_to_a_script() -> None:
    kept = {path.stem for folder in ("output", "pictures") for path in (FOLDER / folder).iterdir()}
    assert kept == set(gallery.NAMES)


@pytest.mark.parametrize("name", gallery.NAMES)
def test_is_a_script_of_30_to_100_lines(name: str) -> None:
    text = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    assert text.endswith('\n\nif __name__ == "__main__":\n    main()\n')
    assert 30 <= text.count("\n") <= 100


def test_the_page_has_every_script_and_its_question() -> None:
    rows = re.findall(r"^\| (.*?) \| \[(\w+)\.py\]", PAGE, re.MULTILINE)
    assert rows == [(question_of(name), name) for _, name in rows]
    assert sorted(name for _, name in rows) == gallery.NAMES


def question_of(name: str) -> str:
    """Return the question on the script's first line."""
    return (FOLDER / f"{name}.py").read_text(encoding="utf-8").splitlines()[0].removeprefix('"""')
