"""Compares the seconds for small fits with the earlier, longer fits on the same rows.

There are 1,430 rows and 123 classes, D = 512. Seconds are processor time in a single thread, so
other programs matter little. "Before" is a fit with 300 epochs and batches of 128 rows: a twentieth
of the epochs is run, and the time is multiplied by twenty. ``vilu_plus`` had more folds before, and
so has no such number.
"""

from __future__ import annotations

import time
import warnings

import numpy as np
import torch

import vilu
from vilu.embeddings.memory import Embeddings
from vilu.predictors.contract.parameters import build_predictor

N, K, D = 1_430, 123, 512
BEFORE = {"epochs": 300, "batch_size": 128}
PART = 20
METHODS = ("lvu", "vilu", "mc_dropout", "deep_ensemble", "pvu", "lmn", "probvlm")


def rows() -> Embeddings:
    """Make images around the class texts. About a fifth of the answers is wrong."""
    rng = np.random.default_rng(0)
    text = rng.normal(size=(K, D)) + 2 * rng.normal(size=D)
    target = rng.integers(K, size=N)
    image = text[target] + 8 * rng.normal(size=(N, D)) * rng.random((N, 1))
    return Embeddings(image, text, target=target)


def seconds(name: str, data: Embeddings, **values: int) -> float:
    """Measure the processor seconds for a fit."""
    predictor = build_predictor(vilu.PREDICTORS[name], {"device": "cpu", **values})
    start = time.process_time()
    predictor.fit(data)
    return time.process_time() - start


def main() -> dict[str, float]:
    """Print a table. Return the seconds, and the ratios to before for methods with epochs."""
    warnings.simplefilter("ignore")  # on unit norm, and on probabilities of degenerate rows
    torch.set_num_threads(1)
    data = rows()
    seconds("lvu", data, epochs=1)  # not measured: torch imports modules at the first step
    print(f"fits of {N:,} rows against {K} classes, D = {D}, one thread, seconds of the processor")
    figures = {"fit_vilu_plus": seconds("vilu_plus", data)}
    print(f"  vilu_plus {figures['fit_vilu_plus']:.1f}")
    for name in METHODS:
        before = PART * seconds(
            name, data, epochs=BEFORE["epochs"] // PART, batch_size=BEFORE["batch_size"]
        )
        figures[f"fit_{name}"] = now = seconds(name, data)
        figures[f"fit_{name}_of_before"] = now / before
        print(f"  {name} {now:.1f}, before {before:.0f}")
    return figures


if __name__ == "__main__":
    main()
