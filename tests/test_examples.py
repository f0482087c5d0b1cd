"""Every script of examples/ runs, keeps what it asserts,
and prints and draws what is kept for the site.
"""

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
    """The text with # for its numbers; how tables are aligned follows from them."""
    return " ".join(NUMBER.sub("#", text).replace("-", "").split())


def numbers(text: str) -> list[float]:
    return [float(found.replace(",", "").replace("−", "-")) for found in NUMBER.findall(text)]


def tolerances(text: str) -> list[float]:
    """What another processor may move:
    a fifth of a number, three rows or points of a percent, some hundredths.
    """
    decimals = [len(found.partition(".")[2]) for found in NUMBER.findall(text)]
    return [
        max(abs(n) / 5, 3 if d < 2 else 0.05) for n, d in zip(numbers(text), decimals, strict=True)
    ]


# a server that is started three times, a triage of 340 photos: tests/service and tests/triage do so
# anyway, and smaller
SLOW = {"service", "trust_photos"}
NEEDS = {"ocr_words": "tesseract"}
"""Programs that examples need; Debian has them as packages."""
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
        warnings.simplefilter("default")  # pytest makes errors of them
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
    """The first line of the script, as far as it goes."""
    return (FOLDER / f"{name}.py").read_text(encoding="utf-8").splitlines()[0].removeprefix('"""')
