"""Run the notebooks from top to bottom, and keep the printed output.

    python tools/notebooks.py                              # all notebooks in notebooks/
    python tools/notebooks.py notebooks/own_classifier.ipynb

A notebook runs in a temporary folder, with examples/ on the import path. Equal runs leave equal
files: no times, execution counts or Python versions are kept.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any, Final

import nbformat
from nbclient import NotebookClient

ROOT: Final = Path(__file__).resolve().parents[1]
FOLDER: Final = ROOT / "notebooks"

TIMEOUT: Final = 600
"""Maximum time for a cell, in seconds."""

PATH_CELL: Final = f"import sys; sys.path.insert(0, {str(ROOT / 'examples')!r})"


def run_notebook(notebook: Any) -> None:  # noqa: ANN401 - nbformat has no types
    """Run all cells in a temporary folder. Raises nbclient's error if a cell fails."""
    path_cell = nbformat.v4.new_code_cell(PATH_CELL)
    notebook.cells.insert(0, path_cell)
    with tempfile.TemporaryDirectory() as folder:
        try:
            resources = {"metadata": {"path": folder}}
            client = NotebookClient(notebook, timeout=TIMEOUT, resources=resources)
            client.execute()
        finally:
            notebook.cells.remove(path_cell)


def remove_run_metadata(notebook: Any) -> None:  # noqa: ANN401
    """Remove metadata that differs between equal runs."""
    notebook.metadata.pop("language_info", None)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type != "code":
            continue
        cell.execution_count = None
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = None


def main(names: list[str]) -> None:
    """Run notebooks, and write the notebooks with the outputs."""
    paths = [Path(name) for name in names] or sorted(FOLDER.glob("*.ipynb"))
    for path in paths:
        notebook = nbformat.read(path, as_version=4)
        run_notebook(notebook)
        remove_run_metadata(notebook)
        nbformat.write(notebook, path)
        print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
