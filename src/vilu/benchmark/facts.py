"""What decides the result of a cell, so that a finished one is known to hold."""

from __future__ import annotations

import vilu
from vilu.benchmark.cells import Cell, Origin, origin_of, scored_set_of, selects
from vilu.benchmark.code import code_digest
from vilu.benchmark.config import MAX_EPOCHS
from vilu.benchmark.fits import predictor_of
from vilu.benchmark.workbench import Workbench
from vilu.predictors.parameters import parameters
from vilu.space import digest


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
    parts = {"vilu.predictors.init": origin.start, "vilu.pseudo": origin.pool_size}
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
