"""A hash of the code behind a method, so that a changed method is run again."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import vilu
from vilu.space import digest

PACKAGE = Path(vilu.__file__).parent
CATALOGUE = "vilu.predictors"
"""Its ``__init__`` imports every method; what a method takes from it is in the method's own modules."""

SHARED = ("vilu.evaluation", "vilu.benchmark.rows", "vilu.benchmark.resampling", "vilu.subset")
"""What decides every result beside the method."""


@cache
def code_digest(*modules: str) -> str:
    """Hash of modules, ``SHARED``, and all that they import at module level from vilu; comments do not count."""
    found: dict[str, str] = {}
    waiting = [*modules, *SHARED]
    while waiting:
        name = waiting.pop()
        if name not in found and name != CATALOGUE and _file(name) is not None:
            found[name], imported = _read(name)
            waiting += imported
    return digest(sorted(found.items()))


@cache
def _read(module: str) -> tuple[str, tuple[str, ...]]:
    """The code of a module without comments and docstrings, and what it may import from vilu."""
    path = _file(module)
    tree = ast.parse("" if path is None else path.read_text(encoding="utf-8"))
    imported = []
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module:
            imported += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            imported += [alias.name for alias in node.names]
    for part in ast.walk(tree):
        if isinstance(part, ast.Module | ast.ClassDef | ast.FunctionDef):
            part.body = [step for step in part.body if not _is_text(step)] or [ast.Pass()]
    return digest(ast.unparse(tree)), tuple(name for name in imported if name.startswith("vilu."))


def _is_text(step: ast.stmt) -> bool:
    """Whether a statement is a docstring."""
    return isinstance(step, ast.Expr) and isinstance(step.value, ast.Constant) and isinstance(step.value.value, str)


def _file(module: str) -> Path | None:
    """The source of a module of vilu; None where the name is no module."""
    place = PACKAGE.joinpath(*module.split(".")[1:])
    return next((path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()), None)
