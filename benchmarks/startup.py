"""Seconds of whole processes: ``vilu --help``, imports, commands on 1,000 rows, an empty Python."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

VILU = ["-m", "vilu.cli"]
COMMANDS = {
    "python": ["-c", "pass"],
    "import torch": ["-c", "import torch"],
    "import vilu": ["-c", "import vilu"],
    "vilu --help": [*VILU, "--help"],
    "vilu score": [*VILU, "score", "predictor", "store", "-o", "scores.parquet"],
    "vilu evaluate": [*VILU, "evaluate", "scores.parquet"],
    "vilu calibrate": [
        *VILU,
        "calibrate",
        "predictor",
        "store",
        "--max-risk",
        "0.5",
        "--overwrite",
    ],
}
REPEATS = 5
INSTALLED = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
"""Environment with compiled modules, as in an installed package.

The first round compiles the modules, and is not counted.
"""
ROWS, K, D = 1_000, 10, 64


def run(arguments: list[str], folder: Path) -> float:
    """Run a process, and return the seconds."""
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, *arguments], capture_output=True, check=True, cwd=folder, env=INSTALLED
    )
    return time.perf_counter() - start


def make(folder: Path) -> None:
    """Make a store and a predictor in the folder."""
    rng = np.random.default_rng(0)
    text, target = rng.normal(size=(K, D)), rng.integers(K, size=ROWS)
    image = text[target] + 2 * rng.normal(size=(ROWS, D))
    np.savez(
        folder / "a.npz",
        image=image,
        text=text,
        target=target,
        class_names=[f"class {i}" for i in range(K)],
    )
    scale = ["--logit-scale", "20", "--logit-bias", "0"]
    run([*VILU, "import", "a.npz", "-o", "store", *scale], folder)
    run([*VILU, "fit", "store", "-o", "predictor", "--method", "mcm"], folder)


def main() -> dict[str, float]:
    """Print and return the medians."""
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make(root)
        for repeat in range(REPEATS + 1):
            for name, arguments in COMMANDS.items():
                if name == "vilu score":  # the command refuses an existing output
                    (root / "scores.parquet").unlink(missing_ok=True)
                seconds = run(arguments, root)
                if repeat:
                    times[name].append(seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    median_texts = [f"{name} {value:.2f} s" for name, value in medians.items()]
    listed = ", ".join(median_texts)
    print(f"whole processes, medians of {REPEATS}, {ROWS:,} rows: {listed}")
    return medians


if __name__ == "__main__":
    main()
