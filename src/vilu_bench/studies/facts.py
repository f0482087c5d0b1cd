"""All facts that decide a cell's result: parameters, data and code."""

from __future__ import annotations

import ast
import sys
from collections.abc import Sequence
from functools import cache, partial
from importlib.util import resolve_name
from pathlib import Path

from vilu.artifacts.hashing import digest
from vilu.errors import UsageError
from vilu.metrics.catalog import METRICS
from vilu.predictors.contract.parameters import parameters
from vilu_bench.studies.cells import (
    Cell,
    FitInputs,
    fit_inputs_of,
    may_select_on_validation,
    scored_set_of,
)
from vilu_bench.studies.config import MAX_EPOCHS, Config
from vilu_bench.studies.data import StudyData
from vilu_bench.studies.fit import predictor_of

SOURCE_FOLDER = Path(__file__).parents[2]  # folder of the packages vilu and vilu_bench
REGISTRY_MODULES = frozenset({"vilu.predictors", "vilu.registry"})
"""Modules left out of the hash, because they import every method.

A method that gets code through such a module lists the code's own module in its ``modules``.
"""

SHARED_MODULES = (
    "vilu.outcomes.evaluate",
    "vilu_bench.studies.data",
    "vilu_bench.studies.result",
    "vilu.embeddings.source",
)
"""Modules that decide the result of every method."""


@cache
def code_digest(*modules: str) -> str:
    """Hash the code in ``modules``, in ``SHARED_MODULES``, and in all vilu modules imported there.

    Imports within functions are ignored. If a module is outside vilu, the modules imported from its
    own package are hashed, too. Comments and docstrings do not change the hash.
    """
    for name in modules:
        if _source_file(name) is None:
            raise UsageError(
                f"{name} has no source file, so nothing would tell when its code changes. "
                "Put it in a file."
            )
    hashes: dict[str, str] = {}  # maps a module's name to the hash of the code
    names_to_hash = [*modules, *SHARED_MODULES]
    while names_to_hash:
        name = names_to_hash.pop()
        if name in hashes or name in REGISTRY_MODULES:
            continue
        file = _source_file(name)
        if file is not None:  # without a file, ``name`` is not a module but an object in a module
            hashes[name], imported = _hash_and_imports(name, file)
            names_to_hash += imported
    return digest(sorted(hashes.items()))


@cache
def _hash_and_imports(module: str, file: Path) -> tuple[str, tuple[str, ...]]:
    """Hash a module's code, and find the imported names from vilu and the module's own package."""
    source = file.read_text(encoding="utf-8")
    tree = ast.parse(source)
    own_package = module.partition(".")[0]
    followed_prefixes = ("vilu.", f"{own_package}.")
    imported = [
        name for name in _imported_names(tree, module, file) if name.startswith(followed_prefixes)
    ]
    _remove_docstrings(tree)
    code = ast.unparse(tree)  # unparsed code has no comments
    return digest(code), tuple(imported)


def _imported_names(tree: ast.Module, module: str, file: Path) -> list[str]:
    """List all imported modules, and objects in modules, at a module's top level."""
    package = module  # the package where relative imports begin
    if file.name != "__init__.py":
        package, _, _ = module.rpartition(".")
    names = []
    for node in tree.body:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:  # number of leading dots
                source = resolve_name("." * node.level + source, package)
            names.append(source)
            # an imported name may be a submodule
            names += [f"{source}.{alias.name}" for alias in node.names]
    return names


def _remove_docstrings(tree: ast.Module) -> None:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            code = [statement for statement in node.body if not _is_docstring(statement)]
            node.body = code or [ast.Pass()]  # a body must have a statement


def _is_docstring(statement: ast.stmt) -> bool:
    if not isinstance(statement, ast.Expr):
        return False
    if not isinstance(statement.value, ast.Constant):
        return False
    return isinstance(statement.value.value, str)


def _source_file(module: str) -> Path | None:
    """Find a module's source file.

    Return None if the module has no such file. A module outside vilu is only found if it is loaded.
    """
    top_package, *submodules = module.split(".")
    if top_package not in {"vilu", "vilu_bench"}:
        loaded_from = getattr(sys.modules.get(module), "__file__", None)
        if loaded_from is None:
            return None
        return Path(loaded_from)
    stem = SOURCE_FOLDER.joinpath(top_package, *submodules)
    for path in (stem.with_suffix(".py"), stem / "__init__.py"):
        if path.is_file():
            return path
    return None


def deciding_facts(study_data: StudyData, cell: Cell) -> dict[str, object]:
    """Collect all facts that decide a cell's result, as plain JSON."""
    config = study_data.config
    fit_inputs = fit_inputs_of(config, cell)
    predictor = predictor_of(config, cell)
    scored_set = scored_set_of(config, cell)
    return {
        "code": code_hash_of(config, cell),
        "method": predictor.name,
        "parameters": {name: getattr(predictor, name) for name in parameters(predictor)},
        "steps": config.method_entries[cell.method].steps,
        "max_epochs": MAX_EPOCHS,
        "train": _facts_of_rows(study_data, fit_inputs) if fit_inputs.train else None,
        "test": study_data.fingerprint(scored_set.data, scored_set.role, scored_set.pool_size),
        "halves_seed": scored_set.halves_seed,
        **_division_facts(study_data, scored_set.division_seed, (scored_set.data,)),
        "across_preprocessing": scored_set.across_preprocessing,
        "metrics": list(config.metrics),
        "resamples": config.resamples,
    }


def code_hash_of(config: Config, cell: Cell) -> str:
    """Hash the code that decides a cell's result.

    A result with another hash was made by other code.
    """
    fit_inputs = fit_inputs_of(config, cell)
    modules = [*predictor_of(config, cell).modules]
    if fit_inputs.start is not None:
        modules.append("vilu.predictors.vilu.fine_tuning")
    if fit_inputs.pool_size is not None:
        modules.append("vilu.embeddings.pairs")
    for name in config.metrics:
        module = _module_of_metric(name)
        if not module.startswith("vilu."):  # the code of our metrics is in ``SHARED_MODULES``
            modules.append(module)
    return code_digest(*modules)


def _module_of_metric(name: str) -> str:
    """Return the module with a metric's kernel."""
    kernel = METRICS[name].kernel
    if isinstance(kernel, partial):
        kernel = kernel.func
    return kernel.__module__


def _division_facts(
    study_data: StudyData, seed: int | None, data: Sequence[str]
) -> dict[str, object]:
    """Return the facts that decide how ``data`` is divided into training and test rows.

    If ``seed`` is None, the rows are not divided, and there are no facts.
    """
    if seed is None:
        return {}
    settings_of_data = study_data.config.data
    shares = [settings_of_data[name].fit_share for name in data]
    return {"fit_share": shares if len(data) > 1 else shares[0], "division_seed": seed}


def _facts_of_rows(study_data: StudyData, fit_inputs: FitInputs) -> dict[str, object]:
    """Return the facts on a fit's rows, including the rows of the earlier fit (``start``)."""
    validation = None
    if (
        may_select_on_validation(fit_inputs)
        and study_data.config.data[fit_inputs.train[0]].validation is not None
    ):
        validation = study_data.fingerprint(fit_inputs.train[0], "validation")
    facts = {
        "rows": [study_data.fingerprint(data, "train") for data in fit_inputs.train],
        "validation": validation,
        "budget": fit_inputs.budget,
        "rows_seed": fit_inputs.rows_seed,
        "halves_seed": fit_inputs.halves_seed,
        **_division_facts(study_data, fit_inputs.division_seed, fit_inputs.train),
        "across_preprocessing": fit_inputs.across_preprocessing,
        "pool_size": fit_inputs.pool_size,
    }
    if fit_inputs.unlabelled:
        facts["unlabelled"] = True
    facts["start"] = None
    if fit_inputs.start is not None:
        facts["start"] = _facts_of_rows(study_data, fit_inputs.start)
    return facts
