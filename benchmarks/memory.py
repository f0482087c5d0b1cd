"""Peak memory of fit and score above the data: 50,000 rows, K = 1,000, D = 512 (Linux only)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

N, K, D = 50_000, 1_000, 512


def peak_mb() -> float:
    """Return the largest resident size in MB since the last reset."""
    status = Path("/proc/self/status").read_text()
    line = next(text for text in status.splitlines() if text.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def child() -> None:
    """Make the data, fit and score. Print the resident size before, and the peaks."""
    import vilu

    rng = np.random.default_rng(0)
    text = rng.standard_normal((K, D), dtype=np.float32)
    target = rng.integers(K, size=N)
    image = rng.standard_normal((N, D), dtype=np.float32)
    for start in range(0, N, 1000):  # in blocks, so memory has no peak while the data are made
        block = slice(start, start + 1000)
        image[block] += (
            1.5 * text[target[block]] * rng.random((len(target[block]), 1), dtype=np.float32)
        )
        image[block] /= np.linalg.norm(image[block], axis=1, keepdims=True)
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    data = vilu.Embeddings(image, text, target=target)
    warm = vilu.Embeddings(image[:2000], text, target=target[:2000])
    vilu.ViLU(epochs=1).fit(
        warm
    )  # thread pools and libraries belong to the program, not to the data
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_mb()
    predictor = vilu.ViLU(epochs=1)
    predictor.fit(data)
    fitted = peak_mb() - before
    predictor.predict_uncertainty(data)
    print(before, fitted, peak_mb() - before)


def main() -> dict[str, float]:
    """Run ``child`` in a separate process, and print the peaks."""
    done = subprocess.run(
        [sys.executable, "-c", "from benchmarks.memory import child; child()"],
        capture_output=True,
        text=True,
        check=True,
    )
    before, fit, both = map(float, done.stdout.split())
    print(
        f"memory, N={N:,}, K={K:,}, D={D}: program and data {before:,.0f} MB; "
        f"above them, fit {fit:,.0f} MB, fit and score {both:,.0f} MB"
    )
    return {"memory_fit_and_score_mb": both}


if __name__ == "__main__":
    main()
