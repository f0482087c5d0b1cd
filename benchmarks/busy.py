"""Times a command while another program computes: ``python -m benchmarks.busy``.

The command fits ``vilu_plus`` (3,000 rows, 200 classes). The command runs alone, and beside a
program in another session. This program uses all cores except the last, so at least two cores are
needed. Both cases are timed with two settings, in turn: the default wait in torch's OpenMP
(libgomp), and the wait set by vilu (``GOMP_SPINCOUNT=3000``). A fit that takes more than
``MAX_SECONDS`` seconds is ended.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

SPIN_COUNTS = {
    "as torch waits": "300000",
    "as vilu waits": "3000",
}  # 300000 is the default of libgomp
ROWS, K, D, REPEATS, MAX_SECONDS = 3_000, 200, 256, 3, 60.0


def run(folder: Path, spins: str, *arguments: str) -> float:
    """Run a command with ``GOMP_SPINCOUNT`` set to ``spins``, and return the seconds."""
    begun = time.perf_counter()
    try:
        subprocess.run(
            [sys.executable, "-m", "vilu.cli", *arguments],
            capture_output=True,
            check=True,
            cwd=folder,
            env={**os.environ, "GOMP_SPINCOUNT": spins},
            timeout=MAX_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return MAX_SECONDS
    return time.perf_counter() - begun


def main() -> dict[str, float]:
    """Print and return the medians."""
    rng, figures = np.random.default_rng(0), dict[str, float]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text, target = rng.normal(size=(K, D)), rng.integers(K, size=ROWS)
        image, names = (
            text[target] + 2 * rng.normal(size=(ROWS, D)),
            [f"class {i}" for i in range(K)],
        )
        np.savez(folder / "a.npz", image=image, text=text, target=target, class_names=names)
        run(
            folder,
            "3000",
            "import",
            "a.npz",
            "-o",
            "store",
            "--logit-scale",
            "20",
            "--logit-bias",
            "0",
        )
        for n_busy in (0, max((os.cpu_count() or 2) - 1, 1)):
            busy_command = [sys.executable, "-c", "while True: pass"]
            busy_processes = [
                subprocess.Popen(busy_command, start_new_session=True) for _ in range(n_busy)
            ]
            times: dict[str, list[float]] = {wait: [] for wait in SPIN_COUNTS}
            for turn in range(REPEATS):
                for wait, spins in SPIN_COUNTS.items():
                    fit = (
                        "fit",
                        "store",
                        "-o",
                        f"{n_busy}-{turn}-{spins}",
                        "--method",
                        "vilu_plus",
                    )
                    times[wait].append(run(folder, spins, *fit))
            for process in busy_processes:
                process.kill()
                process.wait()
            for wait, seconds in times.items():
                figures[f"{wait}, {n_busy} beside"] = median = statistics.median(seconds)
                print(
                    f"{wait}, {n_busy} beside: {median:.1f} s ({min(seconds):.1f} to "
                    f"{max(seconds):.1f})",
                    flush=True,
                )
    return figures


if __name__ == "__main__":
    main()
