"""What decides the result of a cell: parameters, data and code."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import vilu
from vilu.benchmark.cells import Cell, Origin, origin_of, scored_set_of, selects
from vilu.benchmark.config import MAX_EPOCHS
from vilu.benchmark.data import Workbench
from vilu.benchmark.fit import predictor_of
from vilu.embeddings.space import digest
from vilu.predictors.parameters import parameters

PACKAGE = Path(vilu.__file__).parent
CATALOGUE = "vilu.predictors"
"""Its ``__init__`` imports every method; what a method takes from it is in the method's own modules."""

SHARED = ("vilu.outcomes.evaluate", "vilu.benchmark.data", "vilu.benchmark.result", "vilu.embeddings.source")
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


def decided_by(bench: Workbench, cell: Cell) -> dict[str, object]:
    """Everything that decides the result of a cell, as plain JSON."""
    config, origin, predictor = bench.config, origin_of(bench.config, cell), predictor_of(bench, cell)
    scored = scored_set_of(config, cell)
    return {
        "vilu": vilu.__version__,
        "code": code_digest(*predictor.modules, *_modules_of(origin)),
        "method": predictor.name,
        "parameters": {name: getattr(predictor, name) for name in parameters(predictor)},
        "steps": config.entries[cell.method].steps,
        "max_epochs": MAX_EPOCHS,
        "train": _rows_of(bench, origin) if origin.train else None,
        "test": bench.fingerprint(scored.data, scored.role, scored.pool_size),
        "halves_seed": scored.halves_seed,
        "across_preprocessing": scored.across_preprocessing,
        "metrics": list(config.metrics),
        "resamples": config.resamples,
    }


def _modules_of(origin: Origin) -> list[str]:
    """Where a fit gets its start and its rows from, beside the method."""
    parts = {"vilu.predictors.init": origin.start, "vilu.embeddings.pairs": origin.pool_size}
    return [module for module, wanted in parts.items() if wanted is not None]


def _rows_of(bench: Workbench, origin: Origin) -> dict[str, object]:
    """Names the rows of a fit, and of the fit that it begins from."""
    selected = bench.config.data[origin.train[0]].validation is not None and selects(origin)
    return {
        "rows": [bench.fingerprint(data, "train") for data in origin.train],
        "validation": bench.fingerprint(origin.train[0], "validation") if selected else None,
        "budget": origin.budget,
        "rows_seed": origin.rows_seed,
        "halves_seed": origin.halves_seed,
        "across_preprocessing": origin.across_preprocessing,
        "pool_size": origin.pool_size,
        "start": None if origin.start is None else _rows_of(bench, origin.start),
    }


def fingerprint_of(bench: Workbench, cell: Cell) -> str:
    """Hash of ``decided_by``."""
    return digest(decided_by(bench, cell))
