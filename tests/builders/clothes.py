"""Write a few photos from the demo."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq


def write_few_photos(path: Path, few: Mapping[str, int]) -> None:
    """Write the given number of photos per split from the demo's table, evenly spaced over all
    photos.
    """
    whole = pq.read_table(str(resources.files("vilu").joinpath("assets", "clothing.parquet")))
    rows: list[int] = []
    for split, n in few.items():
        of_split = np.flatnonzero(pc.equal(whole["split"], split).to_numpy())
        rows.extend(of_split[np.linspace(0, len(of_split) - 1, n).astype(int)].tolist())
    pq.write_table(whole.take(rows), path)
