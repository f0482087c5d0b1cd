"""Test that the notebooks run from top to bottom and print what they keep."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def printed(notebook) -> list[str]:
    """Return the output of every code cell without digits, which another processor may change."""
    texts = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            text = "".join(output.get("text", "") for output in cell.outputs)
            texts.append("".join(mark for mark in text if not mark.isdigit()))
    return texts


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_prints_what_it_keeps(path: Path) -> None:
    tool = runpy.run_path(str(ROOT / "tools" / "notebooks.py"))
    notebook = nbformat.read(path, as_version=4)
    kept = printed(notebook)
    tool["run_notebook"](notebook)
    assert [len(text.split("\n")) for text in printed(notebook)] == [
        len(text.split("\n")) for text in kept
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_keeps_an_output_and_no_path_of_a_machine(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert any(cell.outputs for cell in cells)
    assert str(Path.home()) not in path.read_text(encoding="utf-8")
    assert all(cell.execution_count is None for cell in cells)
