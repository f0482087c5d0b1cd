"""Every script of examples/ runs, keeps what it asserts, and prints what examples/README.md says that it prints."""

from __future__ import annotations

import re
import runpy
import warnings
from pathlib import Path

import pytest

import vilu

FOLDER = Path(__file__).resolve().parents[1] / "examples"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "example_data")
SLOW = {"compare_methods", "label_next", "no_labels", "none_of_the_classes", "service", "trust_photos"}
"""They embed photos, or start commands."""
PAGE = (FOLDER / "README.md").read_text(encoding="utf-8")


def in_words(text: str) -> str:
    """The text without its numbers, which another processor may move, and in which spaces and lines are one."""
    return " ".join(re.sub(r"[+−-]?\d[\d,.]*", "#", text).split())


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in SCRIPTS]
)
def test_runs_and_prints_what_the_page_says(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    known = dict(vilu.PREDICTORS)
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # pytest makes errors of them
        try:
            runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
        finally:
            for added in vilu.PREDICTORS.keys() - known.keys():
                del vilu.PREDICTORS[added]
    (promised,) = re.findall(rf"^## \[{name}\.py\].*?^```\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert in_words(promised) in in_words(capsys.readouterr().out)


def test_the_page_has_every_script_and_its_question() -> None:
    assert re.findall(r"^\| (.*?) \| \[(\w+)\.py\]", PAGE, re.MULTILINE) == [
        (question_of(name), name) for name in re.findall(r"^\| .*? \| \[(\w+)\.py\]", PAGE, re.MULTILINE)
    ]
    assert sorted(re.findall(r"^\| .*? \| \[(\w+)\.py\]", PAGE, re.MULTILINE)) == SCRIPTS


def question_of(name: str) -> str:
    """The first line of the script, as far as it goes."""
    return (FOLDER / f"{name}.py").read_text(encoding="utf-8").splitlines()[0].removeprefix('"""')
