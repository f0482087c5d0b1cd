"""Make tables of answers with known truth from a seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import vilu


def columns(n: int, first: int = 0, *, features: int = 0) -> dict[str, Any]:
    """Return columns that depend on a hidden certainty h.

    An answer is right if h + 0.5 * noise > -1. Each column sees h with its own noise.
    ``uncertainty_b`` falls with h. ``width`` also falls with h, but weakly.
    """
    rng = np.random.default_rng([n, first, features])
    hidden = rng.normal(size=n)
    table = {
        "id": [f"row{first + row}" for row in range(n)],
        "answer": ["cat"] * n,
        "score_a": hidden + rng.normal(size=n),
        "uncertainty_b": np.exp(-hidden + rng.normal(size=n)),
        "width": rng.normal(size=n) - 0.3 * hidden,
        "correct": (hidden + 0.5 * rng.normal(size=n) > -1).astype(int),
    }
    if features:
        noise = rng.normal(size=(n, features - 1))
        table["features"] = np.column_stack([hidden + 0.3 * rng.normal(size=n), noise])
    return table


def table(n: int, first: int = 0, *, features: int = 0) -> vilu.AnswerTable:
    return vilu.open_table(columns(n, first, features=features))


def written(path: Path, content: dict[str, Any], only: tuple[str, ...] = ()) -> Path:
    """Write the columns `only`, or all columns, to a CSV file, and put the features beside it."""
    vectors = content.get("features")
    names = [name for name in only or content if name != "features"]
    rows = zip(*(list(content[name]) for name in names), strict=True)
    lines = [",".join(names), *(",".join(map(str, row)) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    if vectors is not None:
        np.save(path.with_suffix(".features.npy"), vectors)
    return path
