"""Test that the Python on the pages for beginners runs as written, on simulated embeddings."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

import vilu

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "docs" / "python.md",
    *sorted((ROOT / "docs" / "howto").glob("*.md")),
]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
SLOW_PAGES = {"cross-validation"}  # more than ten seconds
WITH_PYTHON = [
    pytest.param(page, id=page.stem, marks=[pytest.mark.slow] if page.stem in SLOW_PAGES else [])
    for page in PAGES
    if BLOCK.search(page.read_text(encoding="utf-8"))
]


@pytest.fixture
def names_of_readers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return what the pages assume: a model's arrays, and a predictor's scores."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    simulated = importlib.import_module("example_data").simulated
    image, text, labels = simulated(1500, seed=1)
    outcomes = vilu.score(vilu.MCM(), vilu.Embeddings(image, text, target=labels, logit_scale=20.0))
    return {
        "image": image,
        "text": text,
        "labels": labels,
        "names": [f"class {number}" for number in range(len(text))],
        "new_images": simulated(300, seed=2).image,
        "logits": 20.0 * image @ text.T,
        "features": image,
        "new_features": simulated(300, seed=2).image,
        "outcomes": outcomes,
    }


@pytest.mark.filterwarnings("ignore:.* of none of the classes")
@pytest.mark.parametrize("page", WITH_PYTHON)
def test_the_python_of_a_page_runs(
    page: Path,
    names_of_readers: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for block in BLOCK.findall(page.read_text(encoding="utf-8")):
        exec(compile(block, str(page), "exec"), names_of_readers)  # noqa: S102 - our own pages


def test_every_page_for_beginners_shows_something_to_run() -> None:
    without = [page.name for page in PAGES if "```" not in page.read_text(encoding="utf-8")]
    assert without == []
