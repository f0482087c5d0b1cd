"""Seconds until ``vilu --help`` and ``import vilu`` are done, whole processes, beside an empty Python."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

COMMANDS = {
    "python": ["-c", "pass"],
    "import vilu": ["-c", "import vilu"],
    "vilu --help": ["-m", "vilu.cli", "--help"],
}
REPEATS = 7


def main() -> dict[str, float]:
    """Print and return medians."""
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for repeat in range(REPEATS + 1):
        for name, arguments in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
            if repeat:
                times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"start-up, medians of {REPEATS}: " + ", ".join(f"{name} {value:.2f} s" for name, value in medians.items()))
    return medians


if __name__ == "__main__":
    main()
