"""The map in docs/architecture.md, held to the code."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "vilu"

BASE = {"errors", "document", "space", "validate", "files", "progress", "device", "columns", "similarity"}
TABLES = {"tables", "layout", "outcomes", "outcome_columns", "results", "evaluation", "metrics", "tally"}
MAY_IMPORT = {
    **dict.fromkeys(BASE, BASE),
    "types": BASE,
    "pairs": BASE | {"types"},
    "embeddings": BASE | {"types", "pairs"},
    "subset": BASE | {"types"},
    "pseudo": BASE | {"types", "pairs"},
    "metrics": {"errors"},
    **dict.fromkeys(TABLES - {"metrics"}, BASE | TABLES),
    "nn": BASE | {"types", "metrics"},
    "scoring": BASE | TABLES | {"types", "predictors", "nn", "decision"},
    "calibration": BASE | {"types", "predictors", "outcomes", "decision", "scoring", "scores"},
    "card": {"backbones"},
    "predictors": BASE | {"types", "pairs", "embeddings", "metrics", "nn", "card"},
    "backbones": BASE | {"types"},
    "datasets": BASE | {"types"},
    "store": BASE | {"types", "pairs", "backbones", "datasets"},
    "executors": BASE | {"store", "datasets", "backbones", "types"},
    "pool_sizes": BASE | {"types", "pairs", "predictors", "scoring", "evaluation", "results"},
    "scores": BASE | TABLES | {"types", "pairs", "predictors", "nn", "store", "decision"},
    "decision": BASE | TABLES | {"types", "predictors"},
    "explaining": BASE | TABLES | {"types", "predictors", "nn"},
    "sharing": BASE | {"types", "embeddings", "nn", "predictors", "backbones"},
    "report": BASE | TABLES,
    "page": BASE | TABLES | {"types", "predictors", "scores", "store", "datasets", "decision", "report"},
    "demo": None,
    "benchmark": None,
    "studies": BASE | {"benchmark", "report", "outcomes", "metrics"},
    "cli": None,
}
HEAVY = {"torch", "open_clip", "timm", "transformers", "torchvision", "matplotlib", "pandas", "sklearn", "pyarrow"}
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imported(tree: ast.AST) -> set[str]:
    """Modules named in import statements, wherever they stand."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_rooms_import_only_what_the_map_allows(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":
        return
    assert room in MAY_IMPORT, f"{room} is not on the map"
    allowed = MAY_IMPORT[room]
    if allowed is None:
        return
    rooms = {entry.stem for entry in PACKAGE.iterdir()}
    used = {m.split(".")[1] for m in imported(ast.parse(path.read_text())) if m.startswith("vilu.")}
    assert (used & rooms) - allowed - {room} == set()


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_model_libraries_stay_in_their_rooms(path: Path) -> None:
    used = {m.split(".")[0] for m in imported(ast.parse(path.read_text()))}
    if room_of(path) != "backbones":
        assert used & {"open_clip", "timm", "transformers", "torchvision"} == set()
    if room_of(path) != "report":
        assert "matplotlib" not in used


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_and_functions_can_be_read_in_one_sitting(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 300
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            docstring = ast.get_docstring(node) or ""
            code = (node.end_lineno or 0) - node.body[0].lineno + 1 - len(docstring.splitlines())
            assert code <= 50, f"{node.name} has {code} lines"


@pytest.mark.parametrize(
    ("code", "heavy"),
    [
        ("import vilu", HEAVY),
        ("import vilu; vilu.metrics.auroc([0.1, 0.9], [0, 1])", HEAVY),
        ("import sys; sys.argv = ['vilu', '--help']; from vilu.cli import main; main()", HEAVY),
        ("import vilu; vilu.ViLU; vilu.EmbeddingStore", HEAVY - {"torch", "pyarrow"}),
    ],
)
def test_heavy_libraries_are_imported_late(code: str, heavy: set[str]) -> None:
    check = (
        f"import atexit, sys\natexit.register(lambda: sys.stderr.write(repr(sorted(set(sys.modules) & {heavy!r}))))\n"
    )
    done = subprocess.run([sys.executable, "-c", check + code], capture_output=True, text=True, check=True)
    assert done.stderr == "[]"


def test_every_public_name_exists() -> None:
    import vilu

    assert sorted(vilu.__all__) == dir(vilu)
    for name in vilu.__all__:
        assert getattr(vilu, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = vilu.nothing
