"""Make outcomes with known numbers for page tests, and images for their ids."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from vilu.outcomes.outcomes import Outcomes

NAMES = ("ant", "bee", "cat", "dog")


def outcomes_of(
    n: int = 400, *, seed: int = 0, method: str = "vilu_plus", noise: float = 0.25, **fields
) -> Outcomes:
    """Return answers and a noisy failure probability. About 40 % of the answers are wrong.

    The failures are the same for every ``seed``.
    """
    rng = np.random.default_rng(0)
    failure, prediction = rng.random(n) < 0.4, rng.integers(len(NAMES), size=n)
    target = np.where(failure, (prediction + 1) % len(NAMES), prediction)
    scores = np.where(failure, 0.7, 0.3) + noise * np.random.default_rng(seed).normal(size=n)
    known = {
        "ids": [f"row-{i}" for i in range(n)],
        "class_names": NAMES,
        "dataset": "toy",
        "split": "test",
        "is_probability": True,
        "provenance": {"space": "feed"},
        **fields,
    }
    return Outcomes(
        np.round(np.clip(scores, 0, 1), 3),
        failure.astype(int),
        prediction,
        target,
        method=method,
        **known,
    )


def write_pictures(path: Path, n: int, damaged: frozenset[int] = frozenset()) -> Path:
    """Write a Parquet file with small images, under the keys from ``outcomes_of``."""
    content = []
    for i in range(n):
        buffer = BytesIO()
        Image.new("RGB", (48, 32), (i % 256, 80, 120)).save(buffer, "PNG")
        content.append(b"<html>not found</html>" if i in damaged else buffer.getvalue())
    table = pa.table(
        {
            "image": content,
            "key": [f"row-{i}" for i in range(n)],
            "label": [NAMES[i % 4] for i in range(n)],
        }
    )
    pq.write_table(table, path)
    return path
