"""What decides the result of a cell: parameters, data and code."""

from __future__ import annotations

import ast
import sys
from functools import cache, partial
from importlib.util import resolve_name
from pathlib import Path

from vilu.artifacts.hashing import digest
from vilu.errors import UsageError
from vilu.metrics.catalog import METRICS
from vilu.predictors.contract.parameters import parameters
from vilu_bench.studies.cells import Cell, Origin, origin_of, scored_set_of, selects
from vilu_bench.studies.config import MAX_EPOCHS, Config
from vilu_bench.studies.data import Workbench
from vilu_bench.studies.fit import predictor_of

SOURCES = Path(__file__).parents[2]
LISTS = frozenset({"vilu.predictors", "vilu.registry"})
"""They name every method; what a method takes from them is in its own modules."""

SHARED = (
    "vilu.outcomes.evaluate",
    "vilu_bench.studies.data",
    "vilu_bench.studies.result",
    "vilu.embeddings.source",
)
"""What decides every result beside the method."""


@cache
def code_digest(*modules: str) -> str:
    """Hash of modules, ``SHARED``, and all that they import at module level from vilu; comments do not count.

    Of a module outside vilu, what it imports from its own package counts as well.
    """
    if lost := [name for name in modules if _file(name) is None]:
        raise UsageError(
            f"{lost[0]} has no source file, so nothing would tell when its code changes. Put it in a file."
        )
    found: dict[str, str] = {}
    waiting = [*modules, *SHARED]
    while waiting:
        name = waiting.pop()
        file = _file(name)
        if name not in found and name not in LISTS and file is not None:
            found[name], imported = _read(name, file)
            waiting += imported
    return digest(sorted(found.items()))


@cache
def _read(module: str, file: Path) -> tuple[str, tuple[str, ...]]:
    """The code of a module without comments and docstrings, and what it may import from vilu or its own package."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    imported = []
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            package = module if file.name == "__init__.py" else module.rpartition(".")[0]
            source = (
                resolve_name("." * node.level + (node.module or ""), package)
                if node.level
                else str(node.module)
            )
            imported += [source, *(f"{source}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            imported += [alias.name for alias in node.names]
    for part in ast.walk(tree):
        if isinstance(part, ast.Module | ast.ClassDef | ast.FunctionDef):
            part.body = [step for step in part.body if not _is_text(step)] or [ast.Pass()]
    ours = ("vilu.", f"{module.partition('.')[0]}.")
    return digest(ast.unparse(tree)), tuple(name for name in imported if name.startswith(ours))


def _is_text(step: ast.stmt) -> bool:
    """Whether a statement is a docstring."""
    return (
        isinstance(step, ast.Expr)
        and isinstance(step.value, ast.Constant)
        and isinstance(step.value.value, str)
    )


def _file(module: str) -> Path | None:
    """The source of a module of vilu, or of one outside that is loaded; None where the name is no module."""
    top, *steps = module.split(".")
    if top not in {"vilu", "vilu_bench"}:
        source = getattr(sys.modules.get(module), "__file__", None)
        return None if source is None else Path(source)
    place = SOURCES.joinpath(top, *steps)
    return next(
        (path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()), None
    )


def decided_by(bench: Workbench, cell: Cell) -> dict[str, object]:
    """Everything that decides the result of a cell, as plain JSON."""
    config, origin = bench.config, origin_of(bench.config, cell)
    predictor, scored = predictor_of(config, cell), scored_set_of(config, cell)
    return {
        "code": code_of(config, cell),
        "method": predictor.name,
        "parameters": {name: getattr(predictor, name) for name in parameters(predictor)},
        "steps": config.entries[cell.method].steps,
        "max_epochs": MAX_EPOCHS,
        "train": _rows_of(bench, origin) if origin.train else None,
        "test": bench.fingerprint(scored.data, scored.role, scored.pool_size),
        "halves_seed": scored.halves_seed,
        **_division(bench, scored.division_seed, scored.data),
        "across_preprocessing": scored.across_preprocessing,
        "metrics": list(config.metrics),
        "resamples": config.resamples,
    }


def code_of(config: Config, cell: Cell) -> str:
    """Hash of the code that decides the result of a cell; one of another hash is of older code."""
    origin, predictor = origin_of(config, cell), predictor_of(config, cell)
    sources = {
        "vilu.predictors.vilu.fine_tuning": origin.start,
        "vilu.embeddings.pairs": origin.pool_size,
    }
    others = [module for module, wanted in sources.items() if wanted is not None]
    kernels = [METRICS[name].kernel for name in config.metrics]
    modules = (
        (kernel.func if isinstance(kernel, partial) else kernel).__module__ for kernel in kernels
    )
    others += [
        module for module in modules if not module.startswith("vilu.")
    ]  # the code of our metrics is in ``SHARED``
    return code_digest(*predictor.modules, *others)


def _division(bench: Workbench, seed: int | None, *data: str) -> dict[str, object]:
    """Which rows of a set, or of several, are fitted on and which tested on; nothing where all are two sets."""
    shares = [bench.config.data[name].fit_share for name in data]
    return (
        {}
        if seed is None
        else {"fit_share": shares if len(data) > 1 else shares[0], "division_seed": seed}
    )


def _rows_of(bench: Workbench, origin: Origin) -> dict[str, object]:
    """Names the rows of a fit, and of the fit that it begins from."""
    selected = bench.config.data[origin.train[0]].validation is not None and selects(origin)
    return {
        "rows": [bench.fingerprint(data, "train") for data in origin.train],
        "validation": bench.fingerprint(origin.train[0], "validation") if selected else None,
        "budget": origin.budget,
        "rows_seed": origin.rows_seed,
        "halves_seed": origin.halves_seed,
        **_division(bench, origin.division_seed, *origin.train),
        "across_preprocessing": origin.across_preprocessing,
        "pool_size": origin.pool_size,
        **({"unlabelled": True} if origin.unlabelled else {}),
        "start": None if origin.start is None else _rows_of(bench, origin.start),
    }
